"""ChoiceVerifier: which option a response names, by letter or by text."""

import pytest

from polarity.rewards import ChoiceVerifier

ROW = {"options": ["10 nm", "20 nm", "a helium nucleus", "none of these"]}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"... so \boxed{B}", "B"),
        (r"\boxed{A} no, \boxed{\text{B}}", "B"),
        (r"\boxed{(B)}", "B"),
        ("Answer: B", "B"),
        ("The correct answer is (C).", "C"),
        ("**D**", "D"),
        ("I think\nC.", "C"),
        ("Answer: A\nOn second thought, Answer: C", "C"),
        (r"\boxed{20 nm}", "B"),
        ("Answer: a helium nucleus", "C"),
    ],
)
def test_letters_and_texts(response, letter):
    found = ChoiceVerifier()(response, letter, ROW)
    assert (found.correct, found.status, found.extracted) == (True, "correct", letter)
    other = "A" if letter != "A" else "B"
    assert ChoiceVerifier()(response, other, ROW).status == "wrong"


@pytest.mark.parametrize("response", ["", "No idea.", "Answer: A or B", r"\boxed{A, C}", r"\boxed{E}"])
def test_none_or_several_are_unparsed(response):
    assert ChoiceVerifier()(response, "A", ROW).status == "unparsed"


def test_a_reference_that_is_no_option_is_an_error():
    assert ChoiceVerifier()("Answer: A", "G", ROW).status == "error"
    assert ChoiceVerifier()(r"\boxed{C}", "a helium nucleus", ROW).correct
