"""polarity data check, polarity data filter."""

import sys
from collections.abc import Sequence
from pathlib import Path

from polarity.cli.options import EVAL_KEYS, add_keys, make_parser, overrides, positive
from polarity.errors import UserError, nearest

USAGE = """\
usage: polarity data check TRAIN [--against BENCH ...] [--out CLEAN.jsonl]
       polarity data filter MODEL TRAIN --out KEPT.jsonl [--samples N]

check   duplicates, conflicting answers, overlap with benchmarks; `polarity data check --help`
filter  drop problems that a model solves always or never; `polarity data filter --help`
"""


def data(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    commands = {"check": _check, "filter": _filter}
    if arguments[0] not in commands:
        raise UserError(f"unknown command 'data {arguments[0]}'; {nearest(arguments[0], commands)}")
    return commands[arguments[0]](arguments[1:])


def _check(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "data check", "TRAIN [--against BENCH ...] [--threshold SHARE] [--out CLEAN.jsonl] [--json FINDINGS.json]",
        "Find duplicates, conflicting answers, and problems that stand in a benchmark too; write what is clean.",
        "polarity data check train.jsonl --against aime24 amc23 math500 math --out clean.jsonl\n"
        "  polarity data check hf:org/name:train --against aime24=my_copies/aime24.jsonl",
    )  # fmt: skip
    parser.add_argument("train", metavar="TRAIN", help="a file, a directory, or hf:org/name:split")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="BENCH", help="benchmarks (aime24, or aime24=FILE), or files"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="SHARE",
        help="more than this share of 13-grams in common is contamination (default: 0.5)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="CLEAN.jsonl", help="write the problems that are left")
    parser.add_argument("--json", type=Path, metavar="FINDINGS.json", help="write what was found, row by row")
    given = parser.parse(arguments)

    from polarity.studies.data_check import check_data

    print(check_data(given.train, given.against, threshold=given.threshold, out=given.out, findings=given.json).table())
    return 0


def _filter(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "data filter", "MODEL TRAIN --out KEPT.jsonl [--samples N] [--KEY VALUE ...]",
        "Sample responses to every problem and keep those that are solved sometimes, with their pass rate.",
        "polarity data filter my_model/ clean.jsonl --out trainable.jsonl --data.verifier math --data.template a3po",
    )  # fmt: skip
    parser.add_argument("target", type=Path, metavar="MODEL", help="directory of a Hugging Face causal LM")
    parser.add_argument("train", metavar="TRAIN", help="a file, a directory, or hf:org/name:split")
    parser.add_argument("--out", type=Path, required=True, metavar="KEPT.jsonl", help="the problems that are kept")
    parser.add_argument(
        "--samples", type=positive, default=8, metavar="N", help="responses for each problem (default: 8)"
    )
    add_keys(parser, arguments, EVAL_KEYS)
    given = parser.parse(arguments)

    from polarity.studies.data_filter import filter_with_model

    found = filter_with_model(
        given.target, given.train, given.out, overrides(given), samples=given.samples, progress=sys.stderr.isatty()
    )
    print(found.summary())
    return 0
