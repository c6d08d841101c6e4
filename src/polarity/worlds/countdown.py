"""The countdown world: reach a target number with arithmetic, by a search that is written out.

A problem is a handful of numbers and a target. A solution joins two of the numbers by + - * or an exact /, puts the
result back, and repeats until one number is left: the target. Every given number is used exactly once, and everything
stays within 1..60. A number, an operator or a sign is one token. The prompt is ` 3 7 8 2 > 24:`; a response is made of

     8 - 7 = 1 3 2;          join two numbers and go on: the board is now 1 3 2
     + 3 - 1 * 2             two numbers left (2 and 1): their joins, as operator and result
    < 1 3 2; <;              a dead end: return to this board, or to the given numbers
     > 24 / 2 = 12 3 7 8;    from the target: 24 is 12 * 2, so make 12 of 3 7 8
     7 + 8 = 15,             a join that is looked at and not followed
    ?                        giving up; a claim after it is a guess
    [ 8 + 7 = 15, 15 - 3 = 12, 12 * 2 = 24]      the claim: the last one alone is verified

Four strategies, each with mistakes of its own, wrote the pretraining texts: depth-first search, breadth (look at
several joins, take the one nearest to the target), backward from the target, and a guess without search. They overlook
branches, begin again and so repeat dead ends, slip in arithmetic, and at times claim what they have not found.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polarity.rewards import Outcome
from polarity.worlds.countdown_search import (
    LIMIT,
    OPERATORS,
    Board,
    Searcher,
    Step,
    claim_symbols,
    draw_habits,
    held_out,
    number_symbols,
    play_out,
    reach,
    value,
)
from polarity.worlds.world import Base, Document, Row, World, symbol_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGEST = 12  # given numbers are 1..12
TARGETS = range(10, 41)  # of all splits but `large`
LARGE_TARGETS = range(41, LIMIT + 1)
GUESSABLE = 1 / 24  # a problem is left out of the splits when more than this share of random play-outs solves it

# --- reading --------------------------------------------------------------------------------------------------

_STEP = r" [0-9]+ [-+*/] [0-9]+ = [0-9]+"
_PIECE = re.compile(
    rf"(?P<subgoal> >{_STEP}(?: [0-9]+)+;)"
    rf"|(?P<enter>{_STEP}(?: [0-9]+)+;)"
    rf"|(?P<look>{_STEP},)"
    r"|(?P<back><(?:(?: [0-9]+)+(?: > [0-9]+)?)?;)"
    rf"|(?P<claim>(?: [-+*/] [0-9]+)?\[(?:{_STEP}(?:,{_STEP})*)?\])"
    r"|(?P<miss> [-+*/] [0-9]+)"
    r"|(?P<give_up>\?)"
)
_CUT_OFF = re.compile(r"[-+*/=><\[, 0-9]{0,120}")  # the beginning of a piece: none of the signs that end one
_EQUATION = re.compile(r" ?([0-9]{1,4}) ?([-+*/]) ?([0-9]{1,4}) ?= ?([0-9]{1,4})")
_LONGEST_CLAIM = 400  # characters


@dataclass(frozen=True)
class Trace:
    """A search as read: how often each kind of piece occurs in it."""

    enters: int = 0  # forward joins that were followed
    subgoals: int = 0  # backward joins that were followed
    looks: int = 0  # joins that were written and not followed at once
    misses: int = 0  # joins of the last two numbers that are not the goal
    backs: int = 0  # returns to an earlier board
    claims: int = 0
    garbled: bool = False  # something in it is outside the grammar


def read_trace(response: str) -> Trace:
    """Read a response. Any text is read; a piece cut off at the end is left out."""
    count: Counter[str] = Counter()
    at = 0
    while piece := _PIECE.match(response, at):
        at = piece.end()
        count[str(piece.lastgroup)] += 1
    return Trace(
        enters=count["enter"],
        subgoals=count["subgoal"],
        looks=count["look"],
        misses=count["miss"],
        backs=count["back"],
        claims=count["claim"],
        garbled=_CUT_OFF.fullmatch(response, at) is None,
    )


def strategy(trace: Trace) -> str:
    """The name of the strategy.

    guess (a claim, or giving up, without a search), straight (each join holds at once: no miss, no return), depth
    (first), breadth (looks before it follows), backward (subgoals only), mixed (backward and forward), garbled.
    """
    if trace.garbled:
        return "garbled"
    if trace.subgoals:
        return "mixed" if trace.enters or trace.looks else "backward"
    if trace.looks:
        return "breadth"
    if not trace.enters and not trace.misses and not trace.backs:
        return "guess"
    return "depth" if trace.misses or trace.backs else "straight"


def read_claim(response: str) -> list[Step] | None:
    """The equations of the claim that ends the response; None when it ends otherwise."""
    tail = response[-_LONGEST_CLAIM:].rstrip()
    start = tail.rfind("[")
    if start < 0 or not tail.endswith("]"):
        return None
    equations = [_EQUATION.fullmatch(text) for text in tail[start + 1 : -1].split(",")]
    if None in equations:
        return None
    return [Step(int(m[1]), m[2], int(m[3]), int(m[4])) for m in equations if m]


def solves(steps: Sequence[Step], numbers: Sequence[int], target: int) -> bool:
    """Whether each equation holds, uses what is there, and together they make the target of all the numbers."""
    board = Counter(numbers)
    for step in steps:
        board.subtract((step.a, step.b))
        if min(board.values()) < 0 or value(step.a, step.op, step.b) != step.c:
            return False
        board[step.c] += 1
    return sorted(board.elements()) == [target]


# --- the world ------------------------------------------------------------------------------------------------

_MOSTLY_THREE = (3, 3, 3, 3, 4)  # drawn from; then the guessable are left out, more of them with three numbers
_SPLITS: dict[str, tuple[str, tuple[int, ...], range, bool, bool]] = {
    # what it holds, how many numbers, targets, whether every solution divides, of held-out number sets
    "id": ("3-4 numbers, targets 10-40: the training distribution", _MOSTLY_THREE, TARGETS, False, False),
    "more": ("5 numbers", (5,), TARGETS, False, False),
    "large": ("targets 41-60, seen in pretraining only", _MOSTLY_THREE, LARGE_TARGETS, False, False),
    "divide": ("every solution divides, seen in pretraining only", _MOSTLY_THREE, TARGETS, True, False),
    "numbers": ("sets of numbers held out everywhere else", _MOSTLY_THREE, TARGETS, False, True),
}


class Countdown(World):
    """Reach a target number with arithmetic, by a search that is written out."""

    name = "countdown"
    summary = "reach a target with + - * / from 3-5 numbers by a written-out search: dead ends, returns, claims"
    splits = {name: holds for name, (holds, *_) in _SPLITS.items()}
    bases = {
        "search": Base(
            "searches depth-first, by breadth and backward, carelessly, and sometimes guesses",
            mixture="searchers",
            steps=6000,
            longest=230,
        ),
    }
    recipe = {
        "steps": 80,
        "threads": 1,
        "rollout.prompts": 32,
        "rollout.group": 8,
        "rollout.max_rounds": 1,  # groups without a difference in reward are dropped, not replaced
        "rollout.max_new_tokens": 180,
        "update.mini_batch_prompts": 2,
        "update.learning_rate": 1e-4,
        "update.beta1": 0.9,
        "update.beta2": 0.95,
        "update.weight_decay": 0.0,
        "update.grad_clip": 1.0,
    }

    def problem(self, split: str, rng: random.Random) -> Row:
        """A solvable problem which random play-outs solve in at most one of 24 cases (5 numbers: not counted).

        A split other than `divide` has a solution without a division.
        """
        _, counts, targets, divides, unseen = _SPLITS[split]
        while True:
            board = _draw_board(rng.choice(counts), rng)
            if held_out(board) != unseen:
                continue
            if len(board) > 4:  # too many solutions to count: a play-out shows one
                possible = [step.c for step in play_out(board, rng, "+-*")[len(board) - 2 :]]
            else:
                plain, all_ = reach(tuple(sorted(board)), "+-*"), reach(tuple(sorted(board)))
                possible = [t for t in sorted(all_) if (t not in plain) == divides and all_[t] <= GUESSABLE]
            possible = [target for target in possible if target in targets]
            if possible:
                return _row(board, rng.choice(possible))

    def verify(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        """Correct when the claim that ends the response makes the target of exactly the given numbers.

        gold: "24 from 3 7 8 2", which says all that is needed; `row` is not read. Earlier claims do not count.
        """
        target, numbers = gold.split(" from ")
        given = [int(number) for number in numbers.split()]
        name = strategy(read_trace(response))
        steps = read_claim(response)
        if steps is None:
            return Outcome(False, "unparsed", 0.0, None, name)
        correct = solves(steps, given, int(target))
        claim = "".join(claim_symbols(steps)).strip()
        return Outcome(correct, "correct" if correct else "wrong", float(correct), claim, name)

    def document(self, base: str, rng: random.Random, progress: float) -> Document:
        """2-5 numbers, at the start mostly 2 (the facts of arithmetic), and a search for a target they can make."""
        late = min(1.0, 2.0 * progress)
        while True:
            n = rng.choices((2, 3, 4, 5), (1.0 - 0.88 * late, 0.5, 0.1 + 0.3 * late, 0.06 * late))[0]
            board = _draw_board(n, rng)
            solution = play_out(board, rng, OPERATORS if rng.random() < 0.3 else "+-*")
            if len(solution) < n - 1 or (n > 2 and held_out(board)):
                continue
            target = solution[-1].c
            if n == 2 or target in TARGETS or (target in LARGE_TARGETS and rng.random() < 0.3):
                searcher = Searcher(board, target, solution, draw_habits(rng), rng)
                return Document(_row(board, target)["problem"], searcher.response())

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        numbers = [f" {n}" for n in range(1, LIMIT + 1)]
        return symbol_tokenizer(
            [*numbers, *(f" {sign}" for sign in "+-*/=>"), *":;,<[]?"], pattern=r" [0-9]+| [-+*/=>]"
        )


def _draw_board(n: int, rng: random.Random) -> Board:
    return tuple(rng.randint(1, LARGEST) for _ in range(n))


def _row(board: Board, target: int) -> Row:
    numbers = "".join(number_symbols(board))
    return {"problem": f"{numbers} > {target}:", "answer": f"{target} from{numbers}"}
