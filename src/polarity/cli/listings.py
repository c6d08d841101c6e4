"""polarity methods, polarity worlds: what there is."""

import sys
from collections.abc import Sequence
from pathlib import Path

from polarity.cli.options import make_parser, table, word
from polarity.errors import UserError


def methods(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "methods", "[NAME]",
        "List the training methods, or show every part of one as YAML (what --method.KEY can change).",
        "polarity methods\n  polarity methods a3po\n  polarity methods polarity_p0.5n1",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", metavar="NAME", help="a method, a family member, or module:NAME")
    given = parser.parse(arguments)

    from polarity.methods import FAMILIES, SEQUENCE, SOURCES, build_method, method_table

    if given.name is None:
        rows = method_table()
        print(table([list(rows[0]), *([word(value) for value in row.values()] for row in rows)]))
        print("\n" + "\n".join(f"[{mark}] {paper}" for mark, paper in SOURCES.items()))
        print(f"\nfamilies: {', '.join(FAMILIES)}\nsequences: {SEQUENCE}, for example nsr_50_then_dapo")
        return 0
    import yaml

    print(yaml.safe_dump(build_method(given.name).model_dump(mode="json"), sort_keys=False, width=120), end="")
    return 0


def worlds(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "worlds", "[list | show NAME | build NAME [--base BASE] [--out DIR]]",
        "List the worlds, show one, or pretrain its tiny base models again.",
        "polarity worlds\n  polarity worlds show ledger\n  polarity worlds build ledger --base general",
    )  # fmt: skip
    parser.add_argument("action", nargs="?", choices=("list", "show", "build"), default="list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a world, or module:NAME of your own")
    parser.add_argument("--base", metavar="BASE", help="build: only this base model (default: all of the world's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="build: gets a folder for each base (default: bases)")
    given = parser.parse(arguments)
    if given.action != "list" and given.name is None:
        raise UserError(f"which world? for example polarity worlds {given.action} ledger")

    from polarity.worlds import WORLDS, resolve_world

    if given.action == "list":
        print(table([["world", "bases", "what"], *([w.name, ", ".join(w.bases), w.summary] for w in WORLDS.values())]))
        return 0
    world = resolve_world(given.name)
    if given.action == "show":
        print(f"{world.name}: {world.summary}\n")
        print(table([["split", "holds"], *([name, text] for name, text in world.splits.items())]) + "\n")
        print(table([["base", "what"], *([name, base.summary] for name, base in world.bases.items())]) + "\n")
        print(table([["setting", "this world's default"], *([key, str(value)] for key, value in world.recipe.items())]))
        return 0
    from polarity.studies.cards import write_card
    from polarity.worlds.pretrain import build

    for base in [given.base] if given.base else world.bases:
        out = (given.out or Path("bases")) / f"{world.name}-{base}"
        build(world, base, out, progress=sys.stderr.isatty())
        write_card(world, base, out)
        print((out / "README.md").read_text() + f"\nbase model: {out}")
    return 0
