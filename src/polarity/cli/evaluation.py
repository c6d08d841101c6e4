"""polarity eval."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polarity.cli.options import EVAL_KEYS, Parser, add_keys, make_parser, overrides, positive, table
from polarity.errors import UserError


def evaluate(arguments: Sequence[str]) -> int:
    given = _parser(arguments).parse(arguments)
    sources = [name for name in ("target", "server", "responses") if getattr(given, name) is not None]
    if len(sources) != 1:
        raise UserError("give one of MODEL_OR_RUN, --server URL --model NAME, and --responses FILE.jsonl")
    if (given.served is None) != (given.server is None):
        raise UserError("--server URL and --model NAME go together; NAME is what the server calls its model")
    if given.compare is not None and (given.out is None or given.out.suffix == ".json"):
        raise UserError("--compare needs the problems of this evaluation on disk; add --out DIR")
    keys = overrides(given)
    if given.split:
        keys["evaluation.splits"] = f"[{given.split}]"
    benchmarks = given.benchmark.split(",") if given.benchmark else []
    where: dict[str, Any] = {"benchmarks": benchmarks, "data": given.data, "out": given.out}
    where["progress"] = sys.stderr.isatty()
    how = {"samples": given.samples, "protocol": given.protocol}

    from polarity.studies import evaluate as study

    if given.responses is not None:
        found = study.grade_responses(given.responses, keys, **where)
    elif given.server is not None:
        from polarity.evaluation import Server

        server = Server(given.server, given.served, chat=given.chat, concurrency=given.concurrency)
        found = study.evaluate_server(server, keys, **where, **how)
    else:
        found = study.evaluate_model(given.target, keys, **where, **how)
    print(table(study.result_table(found)))
    for level in study.level_lines(found):
        print(level)
    notes = list(found.get("notes", []))
    if given.compare is not None:
        notes += _compare(found["directory"], given.compare)
    for note in notes:
        print(f"note: {note}")
    if found["directory"]:
        print(f"evaluation: {Path(found['directory']).resolve()}")
    return 0


def _compare(directory: str, other: Path) -> list[str]:
    """Print the comparison of two evaluations on disk; returns what is to be noted about it."""
    from polarity.evaluation import compare_evaluations
    from polarity.studies.evaluate import comparison_table

    compared = compare_evaluations(Path(directory), other)
    print("\n" + table(comparison_table(compared)))
    return list(compared["notes"])


def _parser(arguments: Sequence[str]) -> Parser:
    parser = make_parser(
        "eval", "MODEL_OR_RUN | --server URL --model NAME | --responses FILE.jsonl [--benchmark A,B | --data FILE] ...",
        "Sample responses to evaluation problems (or read them from a file), verify them, and print pass@k.",
        "polarity eval runs/five/a3po/seed_0 --samples 64\n"
        "  polarity eval my_model/ --benchmark aime24,math500 --protocol a3po --out evaluations/mine\n"
        "  polarity eval --server http://localhost:8000/v1 --model Qwen/Qwen3-4B --benchmark amc23 --protocol nsr\n"
        "  polarity eval --responses generated.jsonl --benchmark math500\n"
        "  polarity eval my_model/ --benchmark aime24 --out evaluations/mine --compare evaluations/base",
    )  # fmt: skip
    parser.add_argument(
        "target", type=Path, nargs="?", metavar="MODEL_OR_RUN", help="a model directory, or a run (its last checkpoint)"
    )
    parser.add_argument("--server", metavar="URL", help="an OpenAI-compatible server (vLLM, SGLang); ends in /v1")
    parser.add_argument("--model", dest="served", metavar="NAME", help="the server's name for its model")
    parser.add_argument("--chat", action="store_true", help="the server puts its chat template around the problem")
    parser.add_argument("--concurrency", type=positive, default=32, metavar="N", help="calls to the server at a time")
    parser.add_argument("--responses", type=Path, metavar="FILE.jsonl", help="responses made elsewhere, to be graded")
    parser.add_argument("--benchmark", metavar="A,B,...", help="benchmarks, NAME or NAME=PATH (see docs/data.md)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="problems to evaluate, instead of a world's")
    parser.add_argument("--split", metavar="A,B,...", help="splits of a world or run (default: all)")
    parser.add_argument("--protocol", metavar="NAME", help="a paper's sampling: a3po, nsr, nsr_qwen3 or greedy")
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="responses for each problem (default: the protocol's, or 64)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="results and samples; goes on with what is there")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="another evaluation of the same problems")
    add_keys(parser, arguments, EVAL_KEYS)
    return parser
