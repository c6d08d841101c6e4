"""The "Answer:" mode reproduces DAPO's scorer, quirks included (every line was settled against the rules it states)."""

import pytest

from polarity.rewards import MathVerifier


@pytest.mark.parametrize(
    ("response", "gold", "correct"),
    [
        ("Answer: 42", "42", True),
        ("answer:   42  ", "42", True),
        ("Answer:\n42", "42", True),  # line ends after the colon are spaces
        ("Answer: 42.", "42", False),  # the full stop stays
        ("Answer: $42$.", "42", True),
        (r"\boxed{42}", "42", False),
        (r"Answer: \(42\)", "42", False),
        ("Answer: **42**", "42", False),
        ("Answer: 007", "7", False),
        ("Answer: 7.0", "7", False),
        (r"Answer: \dfrac{1}{2}", r"\frac{1}{2}", False),
        (r"Answer: \frac12", r"\frac{1}{2}", True),
        (r"Answer: \boxed{42}", "42", True),
        ("Answer: x = 42", "42", True),  # what follows the last equals sign
        ("Answer: 1,000", "1000", True),
        ("Answer: 42 degrees", "42", True),
        ("Answer: 41\nAnswer: 42", "42", True),  # the last one
        ("Answer: 42\nAnswer: 41", "42", False),
        ("Answer: 42" + " " * 10 + "." * 300, "42", False),  # only the last 300 characters count
        ("Answer: banana 3", "banan3", True),  # words are deleted inside words, too
        (r"Answer: \text{42}", "42", True),
        (r"Answer: \sqrt2", r"\sqrt{2}", True),
        (r"Answer: 90^\circ", "90", True),
    ],
)
def test_rules_and_pitfalls(response, gold, correct):
    outcome = MathVerifier("answer")(response, gold)
    assert outcome.correct == correct
    assert outcome.score == float(correct)


def test_no_answer_line_is_unparsed():
    assert MathVerifier("answer")("it is 42", "42").status == "unparsed"
