"""polarity study paths, polarity study gradients."""

import sys
from collections.abc import Sequence
from pathlib import Path

from polarity.cli.options import make_parser, positive, table
from polarity.errors import UserError, nearest

USAGE = """\
usage: polarity study paths INITIAL LATER ... [--server URL --judge MODEL] [--out FILE]
       polarity study gradients RUN [--step N] [--out FILE]

paths      which reasoning paths training found that the initial policy does not take; `polarity study paths --help`
gradients  what a correct and what a wrong response do to the logits; `polarity study gradients --help`
"""


def study(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    commands = {"paths": _paths, "gradients": _gradients}
    if arguments[0] not in commands:
        raise UserError(f"unknown command 'study {arguments[0]}'; {nearest(arguments[0], commands)}")
    return commands[arguments[0]](arguments[1:])


def _paths(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "study paths", "INITIAL LATER ... [--server URL --judge MODEL] [--repeats N] [--out FILE]",
        "The share of problems with a reasoning path that none of the initial policy's responses took: by strategy,\n"
        "exactly, where the verifier names strategies (worlds do), or by a language model's judgement.",
        "polarity study paths runs/a3po\n"
        "  polarity study paths runs/dapo runs/dapo runs/nsr --out paths.json\n"
        "  polarity study paths evaluations/base evaluations/step_50 evaluations/step_100 \\\n"
        "      --server http://localhost:8000/v1 --judge Qwen/Qwen3-32B --repeats 3 --out paths.json",
    )  # fmt: skip
    parser.add_argument(
        "initial", type=Path, metavar="INITIAL",
        help="a directory of `polarity eval`, a run's evaluations/step_*.json, or a run (its step 0)",
    )  # fmt: skip
    parser.add_argument(
        "later", type=Path, nargs="*", metavar="LATER",
        help="the same; a run stands for its evaluations after step 0 (default: INITIAL's own)",
    )  # fmt: skip
    parser.add_argument("--server", metavar="URL", help="an OpenAI-compatible server with the judge; ends in /v1")
    parser.add_argument("--judge", metavar="MODEL", help="the server's name for the judge")
    parser.add_argument("--repeats", type=positive, metavar="N", help="ask the judge N times, take the majority [3]")
    parser.add_argument(
        "--characters", type=positive, metavar="N", help="of all responses in one question to the judge [60000]"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="all numbers as JSON; the judge's replies beside it, in FILE.judge.jsonl",
    )
    given = parser.parse(arguments)
    if (given.server is None) != (given.judge is None):
        raise UserError("--server URL and --judge MODEL go together; MODEL is what the server calls the judge")
    if given.server is None and (given.repeats or given.characters):
        raise UserError("--repeats and --characters are for a judge; add --server URL --judge MODEL")
    if given.server is not None and given.out is None:
        raise UserError("a judge's replies are kept, so that nothing is asked twice; add --out FILE.json")

    from polarity.studies.paths import Judge, paths_lines, paths_table, study_paths

    judge = None
    if given.server is not None:
        from polarity.evaluation import Server

        server = Server(given.server, given.judge, chat=True, timeout=600.0)
        asked = {name: value for name in ("repeats", "characters") if (value := getattr(given, name))}
        judge = Judge(server, given.out.with_name(given.out.name + ".judge.jsonl"), **asked)
    found = study_paths(given.initial, given.later, judge=judge, out=given.out, progress=sys.stderr.isatty())
    print(table(paths_table(found)))
    for line in paths_lines(found):
        print(f"note: {line}")
    if given.out:
        print(f"numbers: {given.out.resolve()}")
    return 0


def _gradients(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "study gradients", "RUN [--step N] [--out FILE]",
        "What positive and negative samples do to the logits, measured on a run's logged rollouts.",
        "polarity study gradients runs/a3po\n  polarity study gradients runs/a3po --step 50 --out gradients.json",
    )  # fmt: skip
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--step", type=positive, metavar="N", help="a step with logged rollouts (default: the latest with a checkpoint)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="all numbers as JSON")
    given = parser.parse(arguments)

    from polarity.studies.gradients import study_gradients

    print(study_gradients(given.run, given.step, given.out))
    return 0
