"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so `polarity --help` is quick.

Exit codes: 0 done; 1 a run of a comparison failed; 2 bad input, one line on stderr; 130 stopped with Ctrl-C.
"""

import os
import sys
from collections.abc import Callable, Sequence

from polarity import __version__
from polarity.cli.data import data
from polarity.cli.evaluation import evaluate
from polarity.cli.listings import methods, worlds
from polarity.cli.report import report, watch
from polarity.cli.runs import compare, train
from polarity.cli.studies import study
from polarity.errors import UserError, nearest

OVERVIEW = """\
usage: polarity COMMAND ...

Reinforcement learning with verifiable rewards, with control over what correct and wrong rollouts each do to the policy.

commands:
  train     train a model with one method
  compare   train with several methods and seeds at the same time; one table, one page
  report    make the page (HTML, opens off-line) of any runs, or serve it while they go on
  watch     runs that go on, in the terminal
  study     measurements on runs: new reasoning paths, logit gradients
  eval      evaluate a model, a run, a server, or responses that were generated elsewhere
  data      check problems for duplicates and contamination; drop what is always or never solved
  methods   list the training methods, or show the parts of one
  worlds    list, show or rebuild the built-in problem worlds and their base models

start here:
  polarity compare --methods dapo,a3po --out runs/first --steps 40
  polarity COMMAND --help
"""


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


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train, "compare": compare, "report": report, "watch": watch, "study": study, "eval": evaluate,
    "data": data, "methods": methods, "worlds": worlds,
}  # fmt: skip
