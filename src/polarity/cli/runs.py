"""polarity train, compare."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from polarity.cli.engines import add_engine, cluster_options, recipe, refuse_cluster
from polarity.cli.options import METHOD_HELP, add_keys, add_resume, make_parser, overrides, positive, seeds
from polarity.errors import UserError


def train(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "train", "[CONFIG.yaml] --method NAME [--KEY VALUE ...] [--out DIR] [--resume | --overwrite]",
        "Train a model with one method and write a run directory.",
        "polarity train --method a3po --steps 60 --out runs/a3po\n"
        "  polarity train --method a3po --method.shaping.positive.ratio 0.1 --world ledger --seed 1 --out runs/mine\n"
        "  polarity train config.yaml --update.learning_rate 1e-4 --out runs/mine --overwrite\n"
        "  polarity train --method dapo --model my_model/ --data.train problems.jsonl --out runs/own_data\n"
        "  polarity train --out runs/a3po --resume",
    )  # fmt: skip
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.yaml", help="configuration; options on the command line win"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/METHOD-seed_K)")
    add_resume(parser)
    parser.add_argument("--no-report", action="store_true", help="do not write report.html at the end")
    add_engine(parser)
    add_keys(parser, arguments)
    given = parser.parse(arguments)

    from polarity.config import load_config
    from polarity.engines import embedded

    saved = given.out / "config.yaml" if given.resume and given.out and not given.config else None
    config = load_config(saved if saved and saved.exists() else recipe(given.config), overrides(given))
    name = str(config.method.get("base") or config.method.get("name")).replace(":", ".")
    out = given.out or Path("runs") / f"{name}-seed_{config.seed}"
    how = {"resume": given.resume, "overwrite": given.overwrite, "progress": sys.stderr.isatty()}
    if given.engine == "verl":
        from polarity.engines.verl import launch

        code = launch.train(config, out, **how, **cluster_options(given))
        if code or given.dry_run:
            return code
    else:
        refuse_cluster(given)
        if given.resume and (out / "verl").is_dir():
            raise UserError(f"{out} was trained with the engine verl; add --engine verl")
        embedded.train(config, out, **how)
    if given.no_report:
        print(f"run: {out}")
        return 0
    from polarity.report import write_report

    print(f"report: {write_report([out], out / 'report.html').resolve()}")
    return 0


def compare(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "compare", "[CONFIG.yaml] --methods A,B,... --out DIR [--seeds 0,1,...] [--KEY VALUE ...] [--resume]",
        "Train with several methods and seeds, in parallel processes; print one table and write one page.",
        "polarity compare --methods grpo,dapo,psr,nsr,a3po --seeds 0,1,2 --out runs/five --steps 80\n"
        "  polarity compare --methods dapo,my_file:my_method --out runs/mine --reference dapo\n"
        "  polarity compare --methods grpo,dapo,psr,nsr,a3po --seeds 0,1,2 --out runs/five --steps 80 --resume",
    )  # fmt: skip
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG.yaml", help="configuration; options on the command line win"
    )
    parser.add_argument("--methods", required=True, metavar="A,B,...", help=METHOD_HELP)
    parser.add_argument("--seeds", default="0", metavar="0,1,...", help="one run for each (default: 0)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets METHOD/seed_K/, tables and the page"
    )
    parser.add_argument(
        "--reference", metavar="METHOD", help="differences are taken from it (default: dapo, else the first)"
    )
    parser.add_argument("--jobs", type=positive, metavar="N", help="runs at the same time (default: the cores)")
    add_resume(parser)
    add_keys(parser, arguments)
    given = parser.parse(arguments)

    from polarity.report.summary import markdown
    from polarity.studies.compare import compare as run_all

    for ended in (signal.SIGTERM, signal.SIGHUP):  # a comparison that is ended stops its runs first
        signal.signal(ended, lambda number, _: sys.exit(128 + number))
    methods = [name.strip() for name in given.methods.split(",") if name.strip()]
    found = run_all(
        given.config, overrides(given), methods, seeds(given.seeds), given.out,
        reference=given.reference, jobs=given.jobs, resume=given.resume, overwrite=given.overwrite,
    )  # fmt: skip
    if found.summary:
        print(markdown(found.summary))
        print(f"report: {found.report.resolve() if found.report else None}")
    for name, line in found.failed.items():
        print(f"failed: {name}: {line}", file=sys.stderr)
    if found.failed:
        print(f"see {given.out / 'logs'}; the same command with --resume repeats only these", file=sys.stderr)
    return 1 if found.failed else 0
