"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so `polarity --help` is quick.

Exit codes: 0 done; 1 a run of a comparison failed; 2 bad input, one line on stderr; 130 stopped with Ctrl-C.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from polarity import __version__
from polarity.errors import UserError, nearest

OVERVIEW = """\
usage: polarity COMMAND ...

Reinforcement learning with verifiable rewards, with control over what correct and wrong rollouts each do to the policy.

commands:
  train     train a model with one method
  compare   train with several methods and seeds at the same time; one table, one page
  report    make the page (HTML, opens off-line) of any runs
  eval      evaluate a model or a run
  methods   list the training methods, or show the parts of one
  worlds    list, show or rebuild the built-in problem worlds and their base models

start here:
  polarity compare --methods dapo,a3po --out runs/first --steps 40
  polarity COMMAND --help
"""
MAIN_KEYS = (
    "world", "base", "model", "data.train", "data.verifier", "steps", "seed", "rollout.prompts", "rollout.group",
    "rollout.temperature", "rollout.max_new_tokens", "rollout.max_rounds", "update.mini_batch_prompts",
    "update.learning_rate", "decay_until", "evaluation.every", "evaluation.problems",
)  # fmt: skip
EVAL_KEYS = (
    "world", "data.verifier", "data.template", "data.stop", "evaluation.problems", "evaluation.temperature",
    "evaluation.top_p", "evaluation.max_new_tokens", "rollout.batch_rows", "seed", "dtype", "device", "threads",
)  # fmt: skip
METHOD_HELP = "catalog name (see `polarity methods`), or module:NAME of your own, for example my_file:my_method"


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are UserErrors: one line, with the nearest option where one is unknown."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        found, extra = self.parse_known_args(arguments)
        for text in extra:
            if text.startswith("--"):
                option = text.split("=")[0]
                known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
                raise UserError(f"unknown option {option}; {nearest(option, known)}")
            raise UserError(f"unexpected {text!r}; see `{self.prog} --help`")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. Never raises for what a user can put right."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when PyTorch is imported: idle threads sleep, not spin
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(OVERVIEW, end="")
            return 0
        if words[0] == "--version":
            print(f"polarity {__version__}")
            return 0
        if words[0] not in COMMANDS:
            raise UserError(f"unknown command {words[0]!r}; {nearest(words[0], COMMANDS)}")
        return COMMANDS[words[0]](words[1:])
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"error: no permission for {error.filename}; choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = (
            "; the same command with --resume goes on from the last checkpoint"
            if words[0] in ("train", "compare")
            else ""
        )
        print(f"\nstopped{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe left, as in `polarity methods | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def train(arguments: Sequence[str]) -> int:
    parser = _parser(
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
    _add_resume(parser)
    parser.add_argument("--no-report", action="store_true", help="do not write report.html at the end")
    _add_keys(parser, arguments)
    given = parser.parse(arguments)

    from polarity.config import load_config
    from polarity.engines import embedded

    saved = given.out / "config.yaml" if given.resume and given.out and not given.config else None
    config = load_config(saved if saved and saved.exists() else given.config, _overrides(given))
    name = str(config.method.get("base") or config.method.get("name")).replace(":", ".")
    out = given.out or Path("runs") / f"{name}-seed_{config.seed}"
    embedded.train(config, out, resume=given.resume, overwrite=given.overwrite, progress=sys.stderr.isatty())
    if given.no_report:
        print(f"run: {out}")
        return 0
    from polarity.report import write_report

    print(f"report: {write_report([out], out / 'report.html').resolve()}")
    return 0


def compare(arguments: Sequence[str]) -> int:
    parser = _parser(
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
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs at the same time (default: the cores)")
    _add_resume(parser)
    _add_keys(parser, arguments)
    given = parser.parse(arguments)

    from polarity.report.summary import markdown
    from polarity.studies.compare import compare as run_all

    for ended in (signal.SIGTERM, signal.SIGHUP):  # a comparison that is ended stops its runs first
        signal.signal(ended, lambda number, _: sys.exit(128 + number))
    methods = [name.strip() for name in given.methods.split(",") if name.strip()]
    found = run_all(
        given.config, _overrides(given), methods, _seeds(given.seeds), given.out,
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


def report(arguments: Sequence[str]) -> int:
    parser = _parser(
        "report", "PATH... [--out FILE] [--reference METHOD]",
        "Write one self-contained HTML page about runs: curves, tables, samples. It opens without a network.",
        "polarity report runs/five\n  polarity report runs/a runs/b --out a_and_b.html",
    )  # fmt: skip
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run directory, or a folder of runs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: PATH/report.html; report.html for several paths"
    )
    parser.add_argument(
        "--reference", metavar="METHOD", help="differences are taken from it (default: dapo, else grpo)"
    )
    given = parser.parse(arguments)

    from polarity.report import write_report

    out = given.out or (given.paths[0] / "report.html" if len(given.paths) == 1 else Path("report.html"))
    print(f"report: {write_report(given.paths, out, given.reference).resolve()}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    parser = _parser(
        "eval", "MODEL_OR_RUN [--data FILE.jsonl] [--split A,B,...] [--samples N] [--KEY VALUE ...]",
        "Sample responses to evaluation problems, verify them, and print pass@k for each split.",
        "polarity eval runs/five/a3po/seed_0 --samples 64\n"
        "  polarity eval my_model/ --world ledger --split id,long\n"
        "  polarity eval my_model/ --data problems.jsonl --data.verifier my_file:my_verifier",
    )  # fmt: skip
    parser.add_argument(
        "target", type=Path, metavar="MODEL_OR_RUN", help="a model directory, or a run (its last checkpoint)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE.jsonl", help="problems to evaluate, instead of a world's")
    parser.add_argument("--split", metavar="A,B,...", help="splits (default: all)")
    parser.add_argument(
        "--samples", type=_positive, default=64, metavar="N", help="responses for each problem (default: 64)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write results and samples")
    _add_keys(parser, arguments, EVAL_KEYS)
    given = parser.parse(arguments)
    overrides = _overrides(given)
    if given.split:
        overrides["evaluation.splits"] = f"[{given.split}]"

    from polarity.studies.evaluate import evaluate_model

    found = evaluate_model(given.target, overrides, samples=given.samples, data=given.data, out=given.out)
    names = [name for name, value in next(iter(found["results"].values())).items() if isinstance(value, float)]
    rows = [[split, *(f"{values[name]:.3f}" for name in names)] for split, values in found["results"].items()]
    print(_table([["split", *names], *rows]))
    return 0


def methods(arguments: Sequence[str]) -> int:
    parser = _parser(
        "methods", "[NAME]",
        "List the training methods, or show every part of one as YAML (what --method.KEY can change).",
        "polarity methods\n  polarity methods a3po\n  polarity methods polarity_p0.5n1",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", metavar="NAME", help="a method, a family member, or module:NAME")
    given = parser.parse(arguments)

    from polarity.methods import FAMILIES, SEQUENCE, SOURCES, build_method, method_table

    if given.name is None:
        rows = method_table()
        print(_table([list(rows[0]), *([_word(value) for value in row.values()] for row in rows)]))
        print("\n" + "\n".join(f"[{mark}] {paper}" for mark, paper in SOURCES.items()))
        print(f"\nfamilies: {', '.join(FAMILIES)}\nsequences: {SEQUENCE}, for example nsr_50_then_dapo")
        return 0
    import yaml

    print(yaml.safe_dump(build_method(given.name).model_dump(mode="json"), sort_keys=False, width=120), end="")
    return 0


def worlds(arguments: Sequence[str]) -> int:
    parser = _parser(
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
        print(_table([["world", "bases", "what"], *([w.name, ", ".join(w.bases), w.summary] for w in WORLDS.values())]))
        return 0
    world = resolve_world(given.name)
    if given.action == "show":
        print(f"{world.name}: {world.summary}\n")
        print(_table([["split", "holds"], *([name, text] for name, text in world.splits.items())]) + "\n")
        print(_table([["base", "what"], *([name, base.summary] for name, base in world.bases.items())]) + "\n")
        print(
            _table([["setting", "this world's default"], *([key, str(value)] for key, value in world.recipe.items())])
        )
        return 0
    from polarity.studies.cards import write_card
    from polarity.worlds.pretrain import build

    for base in [given.base] if given.base else world.bases:
        out = (given.out or Path("bases")) / f"{world.name}-{base}"
        build(world, base, out, progress=sys.stderr.isatty())
        write_card(world, base, out)
        print((out / "README.md").read_text() + f"\nbase model: {out}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train, "compare": compare, "report": report, "eval": evaluate, "methods": methods, "worlds": worlds,
}  # fmt: skip


def _parser(name: str, usage: str, about: str, examples: str) -> Parser:
    return Parser(
        prog=f"polarity {name}", usage=f"polarity {name} {usage}", description=about,
        epilog=f"examples:\n  {examples}", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _add_resume(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def _add_keys(parser: Parser, arguments: Sequence[str], only: Sequence[str] = ()) -> None:
    """Configuration keys as options: those of `only`, or all; --help shows the main ones, --help-all every one."""
    from polarity.config import RunConfig, options

    about_keys = (
        "dotted, as in CONFIG.yaml; values are YAML; [default], which a world may change: `polarity worlds show`"
    )
    keys = parser.add_argument_group("configuration keys", about_keys)
    every = bool(only) or "--help-all" in arguments
    if not only:
        parser.add_argument("--help-all", action="help", help="show every configuration key, not only the main ones")
        if "--methods" not in parser.format_usage():
            keys.add_argument("--method", metavar="NAME", help=METHOD_HELP)
        keys.description = (
            f"{about_keys}\n  parts of the method too: --method.shaping.positive.ratio 0.1 (`polarity methods NAME`)"
        )
        for part in dict.fromkeys(word.split("=")[0] for word in arguments if word.startswith("--method.")):
            keys.add_argument(part, metavar="VALUE", help=argparse.SUPPRESS)
    for key, about in options().items():
        if not only or key in only:
            text = f"{about} [{_default(RunConfig, key)}]".replace("%", "%%")
            keys.add_argument(
                f"--{key}", metavar="VALUE", help=text if every or key in MAIN_KEYS else argparse.SUPPRESS
            )


def _default(model: Any, dotted: str) -> Any:
    for part in dotted.split(".")[:-1]:
        model = model.model_fields[part].annotation
    default = model.model_fields[dotted.split(".")[-1]].default
    return "null" if default is None else default


def _overrides(given: argparse.Namespace) -> dict[str, str]:
    """The configuration keys among the parsed options. `method` first: its parts are laid over it."""
    own = {"config", "out", "resume", "overwrite", "no_report", "methods", "seeds", "reference", "jobs"}
    own |= {"target", "data", "split", "samples"}
    found = {key: value for key, value in vars(given).items() if value is not None and key not in own}
    return dict(sorted(found.items(), key=lambda item: item[0] != "method"))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--seeds {text!r} is not a list of whole numbers; write for example --seeds 0,1,2") from None


def _word(value: str | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else value


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as padded columns; the last column is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(t.ljust(w) for t, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
