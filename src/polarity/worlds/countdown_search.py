"""Countdown's arithmetic, and the careless searchers that write its pretraining texts (grammar: countdown.py)."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

LIMIT = 60  # the largest number that can be written
OPERATORS = "+-*/"
ROUNDS = 3  # how often a search is begun
HELD_OUT = 0.2  # share of the number sets that occur in no training problem, neither of RL nor of pretraining

Board = tuple[int, ...]


class Step(NamedTuple):
    """One equation `a op b = c`."""

    a: int
    op: str
    b: int
    c: int

    def symbols(self) -> list[str]:
        return [f" {self.a}", f" {self.op}", f" {self.b}", " =", f" {self.c}"]


class Branch(NamedTuple):
    """A way on from a board: the equation that is written, the join it stands for, and the numbers it leaves."""

    written: Step
    join: Step
    rest: Board


# --- arithmetic -----------------------------------------------------------------------------------------------


def value(a: int, op: str, b: int) -> int | None:
    """`a op b`, None where it is no positive whole number."""
    if op == "/":
        return a // b if b and a % b == 0 and a else None
    result = a + b if op == "+" else a - b if op == "-" else a * b
    return result if result > 0 else None


def joins(a: int, b: int, operators: str = OPERATORS) -> list[Step]:
    """The legal equations of two numbers, larger operand first."""
    a, b = max(a, b), min(a, b)
    steps = []
    for op in operators:
        c = value(a, op, b)
        if c is not None and c <= LIMIT:
            steps.append(Step(a, op, b, c))
    return steps


def pairs(board: Board) -> Iterable[tuple[int, int, Board]]:
    """Every choice of two numbers of the board, with the rest."""
    for i in range(len(board)):
        for j in range(i + 1, len(board)):
            yield board[i], board[j], board[:i] + board[i + 1 : j] + board[j + 1 :]


@lru_cache(maxsize=20_000)
def reach(board: Board, operators: str = OPERATORS) -> dict[int, float]:
    """Target -> the share of random play-outs that end there (each legal join equally likely). `board` is sorted."""
    if len(board) == 1:
        return {board[0]: 1.0}
    children = [tuple(sorted((*rest, step.c))) for a, b, rest in pairs(board) for step in joins(a, b, operators)]
    shares: dict[int, float] = {}
    for child in children:
        for target, share in reach(child, operators).items():
            shares[target] = shares.get(target, 0.0) + share / len(children)
    return shares


def play_out(board: Board, rng: random.Random, operators: str = OPERATORS) -> list[Step]:
    """Random legal joins until one number is left (fewer when no join is legal)."""
    steps: list[Step] = []
    while len(board) > 1:
        options = [(step, rest) for a, b, rest in pairs(board) for step in joins(a, b, operators)]
        if not options:
            break
        step, rest = rng.choice(options)
        steps.append(step)
        board = (*rest, step.c)
    return steps


def held_out(numbers: Iterable[int]) -> bool:
    """Whether this set of numbers is kept for the split `numbers`; decided by a hash, so by nothing else."""
    digest = hashlib.blake2b(" ".join(map(str, sorted(numbers))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < HELD_OUT


# --- pretraining texts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """How one imperfect writer searches. Drawn once per text, so a text is consistent and its habits are learnable."""

    strategy: str  # depth, breadth, backward or guess
    insight: float  # chance that the join that leads to a solution is tried first
    lookahead: float  # chance that two last numbers are judged at a glance: the hit is written, or one miss
    careful: bool  # a claim is recomputed while it is written, and withdrawn when it does not hold
    budget: int  # tokens of search before giving up
    slip: float = 0.01  # chance that a result is wrong
    wishful: float = 0.004  # chance that a miss is written as a hit
    skip: float = 0.15  # chance that a branch is overlooked
    dull: float = 0.60  # the same for a join with 1


def draw_habits(rng: random.Random) -> Habits:
    return Habits(
        strategy=rng.choices(("depth", "breadth", "backward", "guess"), (0.46, 0.15, 0.33, 0.06))[0],
        insight=rng.choices((0.0, 0.4, 0.9), (0.3, 0.3, 0.4))[0],
        lookahead=rng.choices((0.0, 0.5, 1.0), (0.4, 0.3, 0.3))[0],
        careful=rng.random() < 0.6,
        budget=rng.randint(70, 150),
    )


# With a number x of the board, the goal g is made of y when ...: what is written, and the join it stands for.
_SUBGOALS = (("g-x", "y+x"), ("g+x", "y-x"), ("x-g", "x-y"), ("g/x", "y*x"), ("g*x", "y/x"), ("x/g", "x/y"))


class Searcher:
    """Writes one response, symbol by symbol. `solution` is a known solution, of which only insight makes use."""

    def __init__(self, numbers: Board, target: int, solution: Sequence[Step], habits: Habits, rng: random.Random):
        self.numbers, self.target, self.habits, self.rng = numbers, target, habits, rng
        self.solution = list(solution)
        self.hints = (_backward_hints if habits.strategy == "backward" else _forward_hints)(numbers, solution)
        self.symbols: list[str] = []

    def response(self) -> str:
        rng, habits = self.rng, self.habits
        if habits.strategy == "guess":
            self.claim(self.solution if rng.random() < 0.3 * habits.insight else play_out(self.numbers, rng))
        elif not self.found():
            self.symbols.append("?")
            if rng.random() < 0.3:
                self.claim(play_out(self.numbers, rng))
        return "".join(self.symbols)

    def found(self) -> bool:
        """Search from the start, over again where branches were overlooked."""
        for i in range(ROUNDS):
            if self.spent():
                break
            self.symbols += ["<", ";"] if i else []
            if self.explore(self.numbers, self.target, [], []):
                return True
        return False

    def spent(self) -> bool:
        return len(self.symbols) > self.habits.budget

    def explore(self, board: Board, goal: int, before: list[Step], after: list[Step]) -> bool:
        """Search below one node; True when a claim was made and kept.

        before: the joins that led to this board; after: the joins that take `goal` on to the target.
        """
        if len(board) == 2:
            return self.finish(board, goal, before, after)
        for i, (written, join, rest) in enumerate(self.branches(board, goal)):
            if self.spent():
                return False
            if self.habits.strategy == "backward":
                self.symbols += self.back(board, " >", f" {goal}") if i else []
                self.symbols += [" >", *written.symbols(), *number_symbols(rest), ";"]
                found = self.explore(rest, written.c, before, [join, *after])
            else:
                self.symbols += self.back(board) if i else []
                self.symbols += [*written.symbols(), *number_symbols(rest), ";"]
                found = self.explore((written.c, *rest), goal, [*before, join], after)
            if found:
                return True
        return False

    def back(self, board: Board, *goal: str) -> list[str]:
        """Return to a board, which is written out unless it is the problem's."""
        return ["<", ";"] if board == self.numbers else ["<", *number_symbols(board), *goal, ";"]

    def branches(self, board: Board, goal: int) -> list[Branch]:
        """The branches to enter from here, in order; breadth writes the ones it looks at."""
        rng, habits = self.rng, self.habits
        if habits.strategy == "backward":
            options = self.subgoals(board, goal)
        else:
            joined = [(self.write_up(s), rest) for a, b, rest in pairs(board) for s in joins(a, b)]
            options = [Branch(step, step, rest) for step, rest in joined]
        options = [o for o in options if rng.random() >= (habits.dull if 1 in (o.join.a, o.join.b) else habits.skip)]
        rng.shuffle(options)
        if habits.strategy == "breadth":
            options = options[: rng.randint(2, 5)]
            for option in options:
                self.symbols += [*option.written.symbols(), ","]
            options.sort(key=lambda option: abs(option.written.c - goal))
        hint = self.hints.get(tuple(sorted(board)))
        if hint is not None and rng.random() < habits.insight:
            options.sort(key=lambda option: not _same(option.join, hint))
        return options

    def finish(self, board: Board, goal: int, before: list[Step], after: list[Step]) -> bool:
        """Two numbers left: try their joins against the goal."""
        a, b = board
        options = joins(a, b)
        self.rng.shuffle(options)
        if self.rng.random() < self.habits.lookahead:
            options = sorted(options, key=lambda step: step.c != goal)[:1]
        for step in options:
            step = self.write_up(step)
            if step.c != goal and self.rng.random() < self.habits.wishful:
                step = step._replace(c=goal)
            self.symbols += [f" {step.op}", f" {step.c}"]
            if step.c == goal and self.claim([*before, step, *after]):
                return True
        return False

    def write_up(self, step: Step) -> Step:
        """A join as this writer puts it: operands in either order where that is the same, now and then a slip."""
        if step.op in "+*" and self.rng.random() < 0.5:
            step = step._replace(a=step.b, b=step.a)
        return step._replace(c=self.slip(step.c))

    def subgoals(self, board: Board, goal: int) -> list[Branch]:
        """Every way to make the goal of a number of the board and another one, which the rest is then to make."""
        found = []
        for i, x in enumerate(board):
            for subgoal, joining in _SUBGOALS:
                (left, op, right), (a, inverse, b) = tuple(subgoal), tuple(joining)
                number = {"g": goal, "x": x}
                y = value(number[left], op, number[right])
                if y is not None and y <= LIMIT:
                    number["y"] = self.slip(y)
                    written = Step(number[left], op, number[right], number["y"])
                    join = Step(number[a], inverse, number[b], goal)
                    found.append(Branch(written, join, board[:i] + board[i + 1 :]))
        return found

    def slip(self, number: int) -> int:
        if self.rng.random() < self.habits.slip:
            return min(LIMIT, max(1, number + self.rng.choice((-10, -2, -1, 1, 2, 10))))
        return number

    def claim(self, steps: Sequence[Step]) -> bool:
        """Write the claim. A careful writer recomputes, and stops at the first equation that does not hold."""
        written: list[Step] = []
        for step in steps:
            true = value(step.a, step.op, step.b)
            if self.habits.careful and true != step.c:
                if true is not None and true <= LIMIT:
                    written.append(step._replace(c=true))
                self.symbols += ["[", *claim_symbols(written), "]"]
                return False
            written.append(step)
        self.symbols += ["[", *claim_symbols(written), "]"]
        return True


def number_symbols(board: Iterable[int]) -> list[str]:
    return [f" {n}" for n in board]


def claim_symbols(steps: Sequence[Step]) -> list[str]:
    return [symbol for i, step in enumerate(steps) for symbol in ([","] if i else []) + step.symbols()]


def _same(step: Step, other: Step) -> bool:
    return step.op == other.op and sorted(step[::2]) == sorted(other[::2])


def _forward_hints(numbers: Board, solution: Sequence[Step]) -> dict[Board, Step]:
    """Sorted board -> the solution's next join."""
    hints = {}
    board = Counter(numbers)
    for step in solution:
        hints[tuple(sorted(board.elements()))] = step
        board.subtract((step.a, step.b))
        board[step.c] += 1
    return hints


def _backward_hints(numbers: Board, solution: Sequence[Step]) -> dict[Board, Step]:
    """Sorted board -> the solution's last join of it, as far as each of these joins takes in one given number."""
    hints = {}
    board = Counter(numbers)
    for before, step in zip(reversed(solution[:-1]), reversed(solution), strict=False):
        given = step.b if before.c == step.a else step.a
        if before.c not in (step.a, step.b) or not board[given]:
            break
        hints[tuple(sorted(board.elements()))] = step
        board[given] -= 1
    return hints
