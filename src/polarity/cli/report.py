"""polarity report, watch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from polarity.cli.options import make_parser
from polarity.errors import UserError


def report(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "report", "PATH... [--out FILE | --live [--port N]] [--reference METHOD]",
        "Write one self-contained HTML page about runs: curves, tables, rollouts. It opens without a network.\n"
        "With --live, serve the same page on this machine, and renew it while the runs go on.",
        "polarity report runs/five\n"
        "  polarity report runs/a runs/b --out a_and_b.html\n"
        "  polarity report --live runs/five\n\n"
        "--live on another machine (only 127.0.0.1 is listened on): there\n"
        "  polarity report --live runs/five --port 8765\n"
        "on the machine you sit at, then open http://127.0.0.1:8765/\n"
        "  ssh -N -L 8765:127.0.0.1:8765 THAT_MACHINE",
    )  # fmt: skip
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run directory, or a folder of runs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: PATH/report.html; report.html for several paths"
    )
    parser.add_argument(
        "--reference", metavar="METHOD", help="differences are taken from it (default: dapo, else grpo)"
    )
    parser.add_argument("--live", action="store_true", help="serve the page until Ctrl-C, instead of writing it")
    parser.add_argument("--port", type=_port, metavar="N", help="of --live (default: the first free one from 8765 on)")
    given = parser.parse(arguments)
    if given.live and given.out:
        raise UserError("--live serves the page and writes none; drop --out or --live")
    if given.port and not given.live:
        raise UserError("--port is of --live; add --live or drop --port")

    if given.live:
        from polarity.report.live import serve

        serve(given.paths, port=given.port, reference=given.reference)
        return 0
    from polarity.report import write_report

    out = given.out or (given.paths[0] / "report.html" if len(given.paths) == 1 else Path("report.html"))
    print(f"report: {write_report(given.paths, out, given.reference).resolve()}")
    return 0


def watch(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "watch", "PATH... [--once]",
        "Show runs in the terminal while they go on: progress, numbers with their course, verdicts.\n"
        "Keys: q quits; with several runs, j and k choose one, t hides the table.",
        "polarity watch runs/five\n  polarity watch runs/a3po --once",
    )  # fmt: skip
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run directory, or a folder of runs")
    parser.add_argument(
        "--once", action="store_true", help="print one frame and end, as when the output is no terminal"
    )
    given = parser.parse(arguments)

    from polarity.report.watch import watch as show

    show(given.paths, once=given.once)
    return 0


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port, 1 to 65535, got {text!r}")
    return int(text)
