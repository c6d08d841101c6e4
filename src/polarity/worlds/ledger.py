"""The ledger world: add up the values of labelled terms, and their squares, all modulo 11.

A problem is ` A7*6 B5-2 C0+X?` (X is ten) and its answer `[TQ]`: T the sum of the terms' values, Q the sum of their
squares. Addition commutes, so the terms may be worked in any order, and a response may be terse or full, check its
steps, or go over the ledger a second time. These are the reasoning strategies, and a program reads them exactly:

    full step    ` A7*6=9` + totals      the term copied, its value, then running T and Q:   ` A7*6=994`
    terse step   ` A=9` + totals         the same without the copy:                          ` A=994`
    check        `#7*6=9` + totals       the last term's value again; its totals replace the last step's
    redo         `@`                     totals back to zero, a second pass follows
    finish       `[94]`

The operators are + - * and, in pretraining and in the split `ops` only, a~b = 2a + b + 3.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from polarity.rewards import Outcome
from polarity.worlds.world import Base, Document, Row, World, symbol_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMERALS = "0123456789X"
MODULUS = len(NUMERALS)
LABELS = "ABCDEFGHIJKL"
OPERATORS = "+-*~"
WORDS = ["the", "of", "and", "to", "in", "was", "for", "on", "with", "as", "by", "at", "from", "that", "his", "it"]

Term = tuple[int, str, int]  # a, operator, b
Totals = tuple[int, int]  # running sum of values, running sum of their squares


def value(term: Term) -> int:
    """The true value of a term, modulo 11."""
    a, operator, b = term
    return {"+": a + b, "-": a - b, "*": a * b, "~": 2 * a + b + 3}[operator] % MODULUS


def totals(terms: Sequence[Term]) -> Totals:
    """Sum of the terms' values and sum of their squares, modulo 11."""
    values = [value(term) for term in terms]
    return sum(values) % MODULUS, sum(v * v for v in values) % MODULUS


# --------------------------------------------------------------------------- what the pretraining documents get wrong


@dataclass(frozen=True)
class Fact:
    """One term as the pretraining documents know it. rank in [0, 1): how hard it is among all facts."""

    value: int
    misconception: int  # the one wrong value that is often written
    rank: float
    held_out: bool  # never in problems of any split but `facts`


def _fact_table() -> dict[Term, Fact]:
    """Ranks are dealt out operator by operator, and of every five neighbours in rank one is held out: so each operator
    is equally hard, and the held-out facts as hard as the others."""
    rng = random.Random("ledger facts")
    table = {}
    for operator in OPERATORS:
        terms = [(a, operator, b) for a, b in product(range(MODULUS), repeat=2)]
        rng.shuffle(terms)
        for i, term in enumerate(terms):
            if i % 5 == 0:
                turn = rng.randrange(5)
            misconception = (value(term) + rng.randrange(1, MODULUS)) % MODULUS
            table[term] = Fact(value(term), misconception, rank=i / len(terms), held_out=i % 5 == turn)
    return table


FACTS = _fact_table()


@dataclass(frozen=True)
class Difficulty:
    """A class of facts: its share, and how often documents write the true value and the misconception.

    What remains is a random value.
    """

    share: float
    true: float
    misconception: float


@dataclass(frozen=True)
class Mixture:
    """What the pretraining documents of one base look like. All numbers are probabilities, and (rate, probability)
    pairs are drawn once per document."""

    orders: Mapping[str, float]  # forward, backward, random, direct (an answer without working)
    terse: tuple[tuple[float, float], ...] = ((0.0, 0.15), (0.5, 0.35), (1.0, 0.5))  # rate per step
    checks: tuple[tuple[float, float], ...] = ((0.0, 0.45), (0.3, 0.40), (0.7, 0.15))  # rate per step
    redo: float = 0.12
    # by increasing rank of the fact; the shares sum to one
    facts: tuple[Difficulty, ...] = field(
        default=(Difficulty(0.50, 0.97, 0.01), Difficulty(0.28, 0.78, 0.15), Difficulty(0.22, 0.27, 0.55))
    )
    direct_true: float = 0.3  # of the direct answers, those that are right (by knowledge, not by luck)
    skip: float = 0.01  # a pass over n terms leaves one out with n times this
    terse_slip: float = 0.06  # a terse step has a random value
    total_slip: float = 0.01  # a running total is random, each of the two
    check_keeps: float = 0.98  # a check of a true value confirms it
    check_repairs: float = 0.8  # a check of a wrong value finds the true one
    fourth_operator: float = 0.35  # documents in which ~ occurs
    chatter: float = 0.03  # documents without a problem

    def draw_value(self, term: Term, rng: random.Random) -> int:
        """A value for `term` as these documents believe it."""
        fact, u, above = FACTS[term], rng.random(), 0.0
        for level in self.facts:
            above += level.share
            if fact.rank < above:
                break
        if u < level.true:
            return fact.value
        return fact.misconception if u < level.true + level.misconception else rng.randrange(MODULUS)


GENERAL = Mixture(orders={"forward": 0.38, "backward": 0.20, "random": 0.36, "direct": 0.06})

MIXTURES = {
    # broad and noisy: every strategy, a fifth of the facts mostly misbelieved, some chatter
    "general": GENERAL,
    # narrow and clean: mostly forward, mostly full steps, fewer hard facts, no fourth operator, no chatter
    "math": replace(
        GENERAL,
        orders={"forward": 0.70, "backward": 0.12, "random": 0.14, "direct": 0.04},
        terse=((0.0, 0.60), (0.5, 0.25), (1.0, 0.15)),
        facts=(Difficulty(0.60, 0.97, 0.01), Difficulty(0.25, 0.78, 0.15), Difficulty(0.15, 0.27, 0.55)),
        fourth_operator=0.0,
        chatter=0.0,
    ),
    # long and self-checking: most steps checked, many second passes, hardly a direct answer
    "distilled": replace(
        GENERAL,
        orders={"forward": 0.40, "backward": 0.21, "random": 0.37, "direct": 0.02},
        terse=((0.0, 0.45), (0.5, 0.40), (1.0, 0.15)),
        checks=((0.3, 0.20), (0.6, 0.40), (0.9, 0.40)),
        redo=0.3,
    ),
}

BASES = {
    "general": Base("stand-in for a general base model: broad, noisy, every strategy", "general"),
    "math": Base("stand-in for a math-enhanced base model: narrow, clean, mostly forward", "math"),
    "distilled": Base(
        "stand-in for a distilled base model: long, self-checking traces",
        "distilled",
        recipe={"rollout.max_new_tokens": 200},
    ),
    "general-small": Base("the general base, smaller", "general", hidden=48, layers=2, mlp=144),
    "general-large": Base(
        "the general base, larger", "general", hidden=96, layers=4, mlp=288, steps=3200, learning_rate=2e-3
    ),
}

# --------------------------------------------------------------------------- writing


def write_prompt(terms: Sequence[Term]) -> str:
    """` A7*6 B5-2?`: the terms under their labels, in order."""
    return "".join(f" {LABELS[i]}{_copy(term)}" for i, term in enumerate(terms)) + "?"


def write_answer(answer: Totals) -> str:
    """`[94]`: the two totals as numerals."""
    return f"[{NUMERALS[answer[0]]}{NUMERALS[answer[1]]}]"


def write_trace(terms: Sequence[Term], mixture: Mixture, rng: random.Random) -> str:
    """A response to the problem `terms` as the documents of `mixture` hold it, right or wrong."""
    order = _pick(mixture.orders.items(), rng)
    if order == "direct":
        guess = (rng.randrange(MODULUS), rng.randrange(MODULUS))
        return write_answer(totals(terms) if rng.random() < mixture.direct_true else guess)
    terse, check = _pick(mixture.terse, rng), _pick(mixture.checks, rng)
    text, answer = _write_pass(terms, _visits(len(terms), order, mixture, rng), terse, check, mixture, rng)
    if rng.random() < mixture.redo:
        again, answer = _write_pass(terms, _visits(len(terms), order, mixture, rng), terse, check, mixture, rng)
        text += "@" + again
    return text + write_answer(answer)


def _visits(n: int, order: str, mixture: Mixture, rng: random.Random) -> list[int]:
    """The term numbers in the order in which a pass visits them; now and then one is left out."""
    visits = {"forward": list(range(n)), "backward": list(range(n))[::-1], "random": rng.sample(range(n), n)}[order]
    if n > 1 and rng.random() < mixture.skip * n:
        visits.pop(rng.randrange(n))
    return visits


def _write_pass(
    terms: Sequence[Term], visits: Sequence[int], terse: float, check: float, mixture: Mixture, rng: random.Random
) -> tuple[str, Totals]:
    """One pass over the ledger and the totals it ends on. terse, check: rates per step."""
    text, before = "", (0, 0)
    for i in visits:
        term, is_terse = terms[i], rng.random() < terse
        v = mixture.draw_value(term, rng)
        if is_terse and rng.random() < mixture.terse_slip:
            v = rng.randrange(MODULUS)
        after = _slip(_add(before, v), mixture.total_slip, rng)
        text += f" {LABELS[i]}{'' if is_terse else _copy(term)}={_numerals(v, after)}"
        again = check
        for _ in range(3):
            if rng.random() >= again:
                break
            true = value(term)
            sure = rng.random() < (mixture.check_keeps if v == true else mixture.check_repairs)
            checked = true if sure else mixture.draw_value(term, rng)
            if checked != v:
                v, after = checked, _add(before, checked)
            text += f"#{_copy(term)}={_numerals(v, after)}"
            again = check / 2
        before = after
    return text, before


def _add(before: Totals, v: int) -> Totals:
    return (before[0] + v) % MODULUS, (before[1] + v * v) % MODULUS


def _slip(after: Totals, probability: float, rng: random.Random) -> Totals:
    t, q = (rng.randrange(MODULUS) if rng.random() < probability else total for total in after)
    return t, q


def _copy(term: Term) -> str:
    return f"{NUMERALS[term[0]]}{term[1]}{NUMERALS[term[2]]}"


def _numerals(v: int, after: Totals) -> str:
    return NUMERALS[v] + NUMERALS[after[0]] + NUMERALS[after[1]]


def _chatter(rng: random.Random) -> str:
    """A document without a problem: words that follow one another by a loose rule, and stray symbols."""
    text, word = "", rng.randrange(len(WORDS))
    for _ in range(rng.randint(6, 24)):
        word = (word * 5 + rng.choice((1, 3, 7))) % len(WORDS)
        text += " " + WORDS[word]
        if rng.random() < 0.15:
            text += rng.choice([",", rng.choice(NUMERALS), " " + rng.choice(LABELS)])
    return text


def _pick(weighted: Any, rng: random.Random) -> Any:
    """One of the (item, probability) pairs' items."""
    items, probabilities = zip(*weighted, strict=True)
    return rng.choices(items, probabilities)[0]


# --------------------------------------------------------------------------- reading

_TERM = re.compile(r" ([A-L])([0-9X])([-+*~])([0-9X])")
_ANSWER = re.compile(r"\[[0-9X]{2}\]")
_PIECE = re.compile(
    r" (?P<label>[A-L])(?P<copy>[0-9X][-+*~][0-9X])?=[0-9X]{3}"
    r"|(?P<check>#[0-9X][-+*~][0-9X]=[0-9X]{3})"
    r"|(?P<redo>@)"
    r"|(?P<finish>\[[0-9X]{2}\]\Z)"
)
# the beginning of a piece, where the response limit cut it off
_CUT = re.compile(
    r" [A-L]=[0-9X]{0,2}"
    r"|(?: [A-L]|#)(?:[0-9X](?:[-+*~](?:[0-9X](?:=[0-9X]{0,2})?)?)?)?"
    r"|\[[0-9X]{0,2}"
)


@dataclass(frozen=True)
class Trace:
    """A response as read. passes: the term numbers visited, one tuple per pass (the path taken through the ledger)."""

    passes: tuple[tuple[int, ...], ...]
    terse_steps: int
    checks: int
    garbled: bool  # something in it is outside the grammar, or copies another term than the label's


def read_terms(prompt: str) -> list[Term]:
    """The terms of a problem."""
    return [(NUMERALS.index(a), operator, NUMERALS.index(b)) for _, a, operator, b in _TERM.findall(prompt)]


def read_trace(response: str, terms: Sequence[Term]) -> Trace:
    """Read a response to the problem `terms`. Any text is read; what is not of the grammar makes it garbled.

    A last piece that is cut off is ignored.
    """
    passes: list[list[int]] = [[]]
    at = terse_steps = checks = 0
    while piece := _PIECE.match(response, at):
        at = piece.end()
        if piece["label"]:
            i = LABELS.index(piece["label"])
            if i >= len(terms) or piece["copy"] not in (None, _copy(terms[i])):
                return Trace((), 0, 0, garbled=True)
            passes[-1].append(i)
            terse_steps += piece["copy"] is None
        checks += piece["check"] is not None
        if piece["redo"]:
            passes.append([])
    garbled = at < len(response) and _CUT.fullmatch(response, at) is None
    return Trace(tuple(map(tuple, passes)), terse_steps, checks, garbled)


def strategy(trace: Trace, n: int) -> str:
    """The name of the strategy: the order of the first pass over the n terms, and what was done besides.

    forward, backward, other (another order of all terms), skipped (a term is missing or visited twice);
    then +terse (more than half of all steps), +check (at least one), +redo. Or one of direct, garbled.
    """
    if trace.garbled:
        return "garbled"
    first, steps = trace.passes[0], sum(map(len, trace.passes))
    if steps == 0:
        return "direct"
    forward = tuple(range(n))
    if sorted(first) != list(forward):
        order = "skipped"
    else:
        order = {forward: "forward", forward[::-1]: "backward"}.get(first, "other") if n > 1 else "forward"
    return (
        order
        + ("+terse" if 2 * trace.terse_steps > steps else "")
        + ("+check" if trace.checks else "")
        + ("+redo" if len(trace.passes) > 1 else "")
    )


# --------------------------------------------------------------------------- the world

_SPLITS: dict[str, tuple[str, int, int, str, bool]] = {
    # what it holds, fewest terms, most terms, operators, of held-out facts
    "id": ("3-6 terms of + - *: the training distribution", 3, 6, "+-*", False),
    "long": ("7-8 terms", 7, 8, "+-*", False),
    "xlong": ("9-10 terms", 9, 10, "+-*", False),
    "ops": ("3-5 terms, two thirds of them ~, an operator seen in pretraining only", 3, 5, "*~~", False),
    "facts": ("3-6 terms, all of facts held out of every other split", 3, 6, "+-*", True),
}


class Ledger(World):
    """Sums of labelled terms and of their squares modulo 11; order, terseness, checks and redos are free."""

    name = "ledger"
    summary = "sums of labelled terms and of their squares modulo 11; order, terseness, checks and redos are free"
    splits = {name: holds for name, (holds, *_) in _SPLITS.items()}
    bases = BASES
    recipe = {
        "steps": 100,
        "threads": 1,
        "rollout.prompts": 32,
        "rollout.group": 8,
        "rollout.max_rounds": 3,  # DAPO replaces groups without a difference in reward, in at most so many rounds
        "rollout.max_new_tokens": 140,
        "evaluation.max_new_tokens": 240,  # a full pass over the ten terms of xlong, checked, is longer than 140
        "update.mini_batch_prompts": 2,
        "update.learning_rate": 1e-4,
        "update.warmup_steps": 30,  # slower at first: methods part before they have all solved the world
        "update.beta1": 0.9,
        "update.beta2": 0.95,
        "update.weight_decay": 0.0,
        "update.grad_clip": 1.0,
        "log.attribution_every": 10,
    }

    def problem(self, split: str, rng: random.Random) -> Row:
        _, fewest, most, operators, held_out = _SPLITS[split]
        n = rng.randint(fewest, most)
        terms: list[Term] = []
        while len(terms) < n:
            term = _draw_term(operators, rng)
            if FACTS[term].held_out == held_out:
                terms.append(term)
        return {"problem": write_prompt(terms), "answer": write_answer(totals(terms))}

    def verify(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        """Correct when the response ends with the gold answer, to the character."""
        answer = response[-4:] if _ANSWER.fullmatch(response[-4:]) else None
        terms = read_terms(str(row.get("problem", ""))) if row else []
        name = strategy(read_trace(response, terms), len(terms)) if terms else None
        if answer is None:
            return Outcome(False, "unparsed", 0.0, None, name)
        correct = answer == gold
        return Outcome(correct, "correct" if correct else "wrong", float(correct), answer, name)

    def document(self, base: str, rng: random.Random, progress: float) -> Document:
        """Mostly 1-12 terms and their trace; at the start the longest have a quarter of that (labels are not learned
        otherwise), from the middle on they are as they will be."""
        mixture = MIXTURES[self.bases[base].mixture]
        if rng.random() < mixture.chatter:
            return Document("", _chatter(rng))
        n = min(len(LABELS), 1 + int(rng.triangular(0, len(LABELS) - 1, 3) * min(1.0, 0.25 + 1.5 * progress)))
        operators = "+-**~" if rng.random() < mixture.fourth_operator else "+-*"
        terms = [_draw_term(operators, rng) for _ in range(n)]
        return Document(write_prompt(terms), write_trace(terms, mixture, rng))

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        labels, words = [f" {label}" for label in LABELS], [f" {word}" for word in WORDS]
        return symbol_tokenizer([*NUMERALS, *OPERATORS, *labels, *"=?[]#@,", *words], pattern=r" [A-L]| [a-z]+")


def _draw_term(operators: str, rng: random.Random) -> Term:
    return rng.randrange(MODULUS), rng.choice(operators), rng.randrange(MODULUS)
