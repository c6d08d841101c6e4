"""The options of `polarity train` that say where it runs, and recipes by name."""

import argparse
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from polarity.cli.options import Parser, positive
from polarity.errors import UserError

ENGINES = ("embedded", "verl")
# option -> its value when it is not given
CLUSTER: Mapping[str, Any] = {
    "gpus": None,
    "nodes": None,
    "tensor_parallel": None,
    "ray_address": None,
    "verl": [],
    "preset": None,
    "dry_run": False,
}


def add_engine(parser: Parser) -> None:
    group = parser.add_argument_group("where it runs", "docs/verl.md says more about the engine verl")
    group.add_argument(
        "--engine", choices=ENGINES, default="embedded", help="embedded (one process, the default), or verl"
    )
    group.add_argument("--gpus", type=positive, metavar="N", help="verl: GPUs on each node [1]")
    group.add_argument("--nodes", type=positive, metavar="N", help="verl: nodes of the Ray cluster [1]")
    group.add_argument("--tensor-parallel", type=positive, metavar="N", help="verl: GPUs that sample with one copy [1]")
    group.add_argument("--ray-address", metavar="ADDRESS", help="verl: a Ray cluster to join (auto, HOST:PORT)")
    group.add_argument(
        "--verl", action="append", default=[], metavar="KEY=VALUE", help="verl's own key; may be given several times"
    )
    group.add_argument("--preset", metavar="NAME", help="verl: cpu-demo, on this machine's CPU")
    group.add_argument("--dry-run", action="store_true", help="verl: print the exact command and do nothing else")


def refuse_cluster(given: argparse.Namespace) -> None:
    """Raise UserError for an option of the engine verl without that engine."""
    for name, default in CLUSTER.items():
        if getattr(given, name) != default:
            raise UserError(f"--{name.replace('_', '-')} belongs to the engine verl; add --engine verl, or drop it")


def cluster_options(given: argparse.Namespace) -> dict[str, Any]:
    """What polarity.engines.verl.launch.train takes beside configuration and run directory."""
    from polarity.engines.verl.overrides import Cluster

    cluster = Cluster(
        address=given.ray_address,
        nodes=given.nodes or 1,
        gpus=given.gpus or 1,
        tensor_parallel=given.tensor_parallel or 1,
        overrides=tuple(given.verl),
    )
    return {"cluster": cluster, "preset": given.preset, "dry_run": given.dry_run}


def recipe(path: Path | None) -> Path | None:
    """The configuration file: as given, or a shipped recipe where a bare name is no file here."""
    if path is None or path.exists() or path.name != str(path):
        return path
    shipped = Path(str(files("polarity") / "recipes" / path.name))
    return shipped if shipped.exists() else path
