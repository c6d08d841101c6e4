r"""Whether an answer states the same as the reference: True, False, or None where that takes a computer algebra system.

Conventions, all of them in one place:
- numbers and formulas are equal when their values are, exactly; a rounded value is another value;
- the order counts in tuples, intervals and matrices, not in lists and sets; a set may repeat an element, a list may
  not;
- a tuple may lose its brackets; an interval and a set may not; `x = 3, y = 2` is a tuple in the order of the names;
- `x = 5` and `5` agree, `x = 5` and `y = 5` do not; equations that are multiples of each other agree, and so do an
  inequality and the interval it describes;
- a unit may be missing on either side; two known units must measure the same, and are converted exactly; a word that
  is no known unit says nothing; of a percentage, the sign may be missing, and 50% is also 0.5; 5 is never 500 or 0.05;
- degrees are not radians; numerals must agree digit by digit, and in their base where both name one;
- letters of a multiple choice may have brackets, a full stop, or the option's text after them.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from polarity.rewards import algebra
from polarity.rewards.answers import (
    INFINITY,
    MINUS_INFINITY,
    Answer,
    Based,
    Group,
    Matrix,
    Ratio,
    Relation,
    Scalar,
    Words,
    interval,
    is_name,
    read,
    structure,
)
from polarity.rewards.effort import refill
from polarity.rewards.expressions import DEPTH, MINUS_ONE, Tree, is_readable_elsewhere
from polarity.rewards.latex import Tokens, depth, tokenize

Decide = Callable[[str, str], bool | None]  # whether two formulas in LaTeX are equal, where this module cannot tell

_OPTION = re.compile(r"(?:option|choice|answer)?[\s:]*[(\[]?([A-Za-z])(?:[)\].:](?:\s.*)?)?", re.IGNORECASE | re.DOTALL)
_LETTER = re.compile(r"\(?([A-Z])\)?")
_MARKUP = re.compile(r"\\[a-zA-Z]+\*?|[{}$~]")
_FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "=": "=", "\\neq": "\\neq"}


def matches(gold: str, answer: str, decide: Decide | None = None) -> bool | None:
    """Whether `answer` states the same as `gold`, both as written.

    decide: asked about formulas that algebra leaves open.
    """
    gold_tokens, tokens = tokenize(gold), tokenize(answer)
    if gold_tokens == tokens:
        return bool(tokens)
    if not gold_tokens or not tokens or max(depth(gold_tokens), depth(tokens)) > DEPTH:
        return False
    letter = _LETTER.fullmatch("".join(gold_tokens))
    option = _OPTION.fullmatch(_plain(answer)) if letter else None
    if letter and option:
        return letter[1] == option[1].upper()
    refill()
    reference, read_answer = read(gold), read(answer)
    if isinstance(reference, Words) or isinstance(read_answer, Words):
        return _letters(gold) == _letters(answer) != ""
    if isinstance(reference, Group) and isinstance(read_answer, Scalar) and "," in answer:
        read_answer = structure(tokenize(answer.replace(",", ", ")))  # a list of numbers and not 200,100 = 200100
    return same(reference, read_answer, decide)


def _plain(text: str) -> str:
    return _MARKUP.sub(" ", text).strip()


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", _plain(text).lower())


def same(gold: Answer, answer: Answer, decide: Decide | None = None) -> bool | None:
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _same_relation(gold, answer, decide)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return gold == answer
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return _same_scalar(gold, answer, decide)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _same_matrix(gold, answer, decide)
    if isinstance(gold, Group) or isinstance(answer, Group):
        return _same_group(gold, answer, decide)
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        words = not gold.words or not answer.words or gold.words == answer.words
        return words and _in_order(gold.parts, answer.parts, decide)
    for ratio, other in ((gold, answer), (answer, gold)):
        if isinstance(ratio, Ratio):
            if not isinstance(other, Scalar) or _is_time(ratio):
                return False
            return _same_scalar(_as_fraction(ratio), other, None) is True
    if isinstance(gold, Based) and isinstance(answer, Based):
        return gold == answer
    based, other = (gold, answer) if isinstance(gold, Based) else (answer, gold)
    return isinstance(other, Scalar) and other.tokens == (based.digits,)  # type: ignore[union-attr]


def _is_time(ratio: Ratio) -> bool:
    """Whether h:mm or h:mm:ss may be meant."""
    minutes = ratio.parts[1].tokens
    return len(ratio.parts) != 2 or (len(minutes) > 0 and len(minutes[0]) == 2 and minutes[0] < "60")


def _as_fraction(ratio: Ratio) -> Scalar:
    return Scalar(("\\frac", "{", *ratio.parts[0].tokens, "}", "{", *ratio.parts[1].tokens, "}"))


def every(verdicts: Sequence[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def _in_order(gold: Sequence[Answer], answer: Sequence[Answer], decide: Decide | None) -> bool | None:
    if len(gold) != len(answer):
        return False
    return every([same(left, right, decide) for left, right in zip(gold, answer, strict=True)])


def _in_any_order(gold: Sequence[Answer], answer: Sequence[Answer], decide: Decide | None) -> bool | None:
    """Every element of each side has an equal on the other."""
    if len(gold) * len(answer) > 2500:
        return sorted(map(repr, gold)) == sorted(map(repr, answer))
    verdicts = [[same(left, right, decide) for right in answer] for left in gold]
    found = [_some(row) for row in verdicts] + [_some([row[at] for row in verdicts]) for at in range(len(answer))]
    return every(found)


def _some(verdicts: Sequence[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def _same_scalar(gold: Scalar, answer: Scalar, decide: Decide | None) -> bool | None:
    if gold.percent != answer.percent:
        signed, plain = (gold, answer) if gold.percent else (answer, gold)
        return _some([_equal(signed, plain, decide), _equal(signed, plain, None, Fraction(1, 100))])
    if gold.unit is not None and answer.unit is not None and gold.unit != answer.unit:
        dimensions, factor = gold.unit
        other_dimensions, other_factor = answer.unit
        return dimensions == other_dimensions and _equal(gold, answer, decide, factor / other_factor)
    return _equal(gold, answer, decide)


def _equal(gold: Scalar, answer: Scalar, decide: Decide | None, factor: Fraction = Fraction(1)) -> bool | None:
    """Whether gold * factor is the answer."""
    if gold.tokens == answer.tokens and factor == 1:
        return True
    verdict = None
    if gold.tree is not None and answer.tree is not None:
        tree: Tree = gold.tree if factor == 1 else ("mul", ("number", factor), gold.tree)
        verdict = algebra.equal(tree, answer.tree)
    if verdict is None and any(side.tree is None and not is_readable_elsewhere(side.tokens) for side in (gold, answer)):
        return False
    if verdict is None and decide is not None and factor == 1:
        return decide(latex(gold.tokens), latex(answer.tokens))
    return verdict


def latex(tokens: Tokens) -> str:
    return " ".join(f"\\text{{{token[1:]}}}" if token[0] == '"' else token for token in tokens)


def _same_matrix(gold: Answer, answer: Answer, decide: Decide | None) -> bool | None:
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        if len(gold.rows) != len(answer.rows):
            return False
        return every([_in_order(left, right, decide) for left, right in zip(gold.rows, answer.rows, strict=True)])
    matrix, other = (gold, answer) if isinstance(gold, Matrix) else (answer, gold)
    assert isinstance(matrix, Matrix)
    if isinstance(other, Group) and other.items and all(isinstance(row, Group) for row in other.items):
        rows = Matrix(tuple(row.items for row in other.items if isinstance(row, Group)))
        return _same_matrix(matrix, rows, decide) if matrix is gold else _same_matrix(rows, matrix, decide)
    cells = [cell for row in matrix.rows for cell in row]
    vector = len(matrix.rows) == 1 or all(len(row) == 1 for row in matrix.rows)
    if vector and isinstance(other, Group) and other.kind in ("()", ","):
        return _in_order(cells, other.items, decide) if matrix is gold else _in_order(other.items, cells, decide)
    return False


_LISTS = (",", "and", "or")


def _same_group(gold: Answer, answer: Answer, decide: Decide | None) -> bool | None:
    gold, answer = _simplified(gold), _simplified(answer)
    if not isinstance(gold, Group) or not isinstance(answer, Group):
        whole, other = (gold, answer) if isinstance(gold, Group) else (answer, gold)
        if isinstance(whole, Group) and whole.kind == "{}" and len(whole.items) == 1:
            return same(gold.items[0], answer, decide) if whole is gold else same(gold, answer.items[0], decide)  # type: ignore[union-attr]
        if not isinstance(whole, Group):
            return same(gold, answer, decide)
        number = _thousands(whole) if whole is answer else None
        return isinstance(other, Scalar) and number is not None and same(other, number, decide)
    kinds = (gold.kind, answer.kind)
    if "\\cup" in kinds:
        return _in_any_order(_parts(gold), _parts(answer), decide)
    if all(kind in _LISTS or kind == "{}" for kind in kinds):
        if "{}" not in kinds and len(gold.items) != len(answer.items):
            return False
        return _in_any_order(gold.items, answer.items, decide)
    loose = len(gold.items) != 2 and all(kind in ("()", "[]") for kind in kinds)
    if gold.kind == answer.kind or loose or (set(kinds) - set(_LISTS) == {"()"}):
        return _in_order(gold.items, answer.items, decide)
    return False


def _parts(group: Group) -> list[Answer]:
    """The intervals and points of a union."""
    if group.kind == "{}":
        return list(group.items)
    return (
        [
            part
            for item in group.items
            for part in (_parts(item) if isinstance(item, Group) and item.kind == "{}" else [item])
        ]
        if group.kind == "\\cup"
        else [group]
    )


def _thousands(group: Group) -> Scalar | None:
    """(1,002) where the reference is one number."""
    digits = ["".join(item.tokens) for item in group.items if isinstance(item, Scalar) and not item.unit_tokens]
    fits = (
        group.kind == "()"
        and re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", ",".join(digits))
        and len(digits) == len(group.items)
    )
    return Scalar(("".join(digits),)) if fits else None


def _simplified(answer: Answer) -> Answer:
    """A list of assignments or of inequalities as what it describes."""
    if not isinstance(answer, Group) or answer.kind not in _LISTS:
        return answer
    if all(isinstance(item, Relation) for item in answer.items):
        named = [_definition(item) for item in answer.items]
        if all(named):
            pairs = [pair for pair in named if pair]
            names = {name for name, _ in pairs}
            if len(names) == 1:
                return Group(answer.kind, tuple(structure(value) for _, value in pairs))
            if len(names) == len(pairs):
                return Group("()", tuple(structure(value) for _, value in sorted(pairs)))
        sets = [_solution_set(item) for item in answer.items]
        if answer.kind == "or" and all(sets):
            return Group("\\cup", tuple(part for described in sets if described for part in _parts(described[1])))
    return answer


def _definition(answer: Answer) -> tuple[Tokens, Tokens] | None:
    """(name, value) of `name = value` or `name = ... = value`."""
    if (
        isinstance(answer, Relation)
        and set(answer.operators) == {"="}
        and is_name(answer.sides[0])
        and answer.sides[-1]
    ):
        return answer.sides[0], answer.sides[-1]
    return None


def _solution_set(answer: Answer) -> tuple[Tokens, Group] | None:
    """(variable, set) of an inequality that bounds one variable, or of `variable \\in set`."""
    if not isinstance(answer, Relation) or "=" in answer.operators:
        return None
    sides, operators = answer.sides, answer.operators
    if operators == ("\\in",):
        described = structure(sides[1])
        return (sides[0], described) if isinstance(described, Group) and is_name(sides[0]) else None
    if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]):
        sides, operators = sides[::-1], (_FLIPPED.get(operators[0], ""),)
    if len(sides) == 2 and is_name(sides[0]):
        name, bound, operator = sides[0], sides[1], operators[0]
        if operator == "\\neq":
            return name, Group("\\cup", (interval(MINUS_INFINITY, bound), interval(bound, INFINITY)))
        if operator in ("<", "\\leq"):
            return name, interval(MINUS_INFINITY, bound, "()" if operator == "<" else "(]")
        if operator in (">", "\\geq"):
            return name, interval(bound, INFINITY, "()" if operator == ">" else "[)")
    if len(sides) == 3 and is_name(sides[1]):
        if all(operator in (">", "\\geq") for operator in operators):
            sides, operators = sides[::-1], tuple(_FLIPPED[operator] for operator in operators[::-1])
        if all(operator in ("<", "\\leq") for operator in operators):
            kind = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
            return sides[1], interval(sides[0], sides[2], kind)
    return None


def _same_relation(gold: Answer, answer: Answer, decide: Decide | None) -> bool | None:
    definition, other_definition = _definition(gold), _definition(answer)
    described, other_described = _solution_set(gold), _solution_set(answer)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        if definition and other_definition:
            verdict = _same_definition(definition, other_definition, decide)
            return (
                verdict is not False or _proportional(gold, answer, None) is True
                if _equations(gold, answer)
                else verdict
            )
        elif described and other_described:
            same_name = described[0] == other_described[0]
            verdict = same_name and _same_group(described[1], other_described[1], decide)
            verdict = verdict or _same_chain(gold, answer, decide)
        else:
            verdict = _same_chain(gold, answer, decide)
        return verdict if verdict or not _equations(gold, answer) else _proportional(gold, answer, decide)
    if definition and not _is_product(definition[0]):
        return same(structure(definition[1]), answer, decide)
    if other_definition:
        return same(gold, structure(other_definition[1]), decide)
    if described:
        return _same_group(described[1], answer, decide) if isinstance(answer, Group) else False
    if other_described:
        return _same_group(gold, other_described[1], decide) if isinstance(gold, Group) else False
    relation, other = (gold, answer) if isinstance(gold, Relation) else (answer, gold)
    assert isinstance(relation, Relation)
    if set(relation.operators) == {"="} and all(_closed(side) for side in relation.sides):  # 2 + 3 = 5
        values = [structure(side) for side in relation.sides]
        if relation is gold:
            return _some([same(value, other, decide) for value in values])
        return every([same(other, value, decide) for value in values])
    return False


def _closed(tokens: Tokens) -> bool:
    """Whether a formula has a value, without variables."""
    return bool(tokens) and not any(len(token) == 1 and token.isalpha() and token not in "ei" for token in tokens)


def _is_product(name: Tokens) -> bool:
    """xy, which makes `xy = 3` an equation where the reference says so; AB is a segment."""
    return len(name) > 1 and all(len(token) == 1 and token.islower() for token in name)


def _same_definition(gold: tuple[Tokens, Tokens], answer: tuple[Tokens, Tokens], decide: Decide | None) -> bool | None:
    name, value = gold
    other_name, other_value = answer
    function, other_function = (len(n) == 4 and n[1] == "(" for n in (name, other_name))
    if function and other_function and name[2] != other_name[2]:
        if not (name[2].isalpha() and other_name[2].isalpha()) or name[2] in other_value:
            return False
        swap = {other_name[2]: name[2]}  # f(n) = n^2 is f(x) = x^2
        other_name, other_value = (
            tuple(swap.get(token, token) for token in part) for part in (other_name, other_value)
        )
    curve = (function and other_name == ("y",)) or (other_function and name == ("y",))
    if name != other_name and name[0].lower() != other_name[0].lower() and not curve:
        return False
    return same(structure(value), structure(other_value), decide)


def _same_chain(gold: Relation, answer: Relation, decide: Decide | None) -> bool | None:
    """a < b < c, read from either end."""
    verdicts = []
    for sides, operators in (
        (answer.sides, answer.operators),
        (answer.sides[::-1], tuple(_FLIPPED.get(operator, "") for operator in answer.operators[::-1])),
    ):
        if operators == gold.operators:
            pairs = zip(gold.sides, sides, strict=True)
            verdicts.append(every([same(structure(left), structure(right), decide) for left, right in pairs]))
    return _some(verdicts)


def _equations(*relations: Relation) -> bool:
    return all(relation.operators == ("=",) for relation in relations)


def _proportional(gold: Relation, answer: Relation, decide: Decide | None) -> bool | None:
    """Whether left - right of one equation is a constant multiple of that of the other."""
    trees = [Scalar(side).tree for relation in (gold, answer) for side in relation.sides]
    verdict = None
    if None not in trees:
        a, b, c, d = (tree for tree in trees if tree is not None)
        verdict = algebra.multiples(("add", a, ("mul", MINUS_ONE, b)), ("add", c, ("mul", MINUS_ONE, d)))
    if verdict is None and decide is not None:
        return decide(*(" = ".join(latex(side) for side in relation.sides) for relation in (gold, answer)))
    return verdict
