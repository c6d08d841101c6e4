"""The comparison table of the A3PO paper, derived from the definitions and extended to every method."""

import pytest

from polarity.methods import METHODS, method_table
from polarity.methods.table import table_row


def told(row):
    return row["adaptive"], row["asymmetric"], row["shaping"]


@pytest.mark.parametrize(
    ("paper", "name", "adaptive", "asymmetric", "level"),
    [
        ("GRPO", "grpo", False, False, "none"),
        ("DAPO", "dapo", False, True, "none"),
        ("DAPO w/ Fork Tokens", "fork_tokens", False, True, "token"),
        ("W-REINFORCE", "w_reinforce", False, True, "polarity"),
        ("Lp-Reg", "lp_reg", False, True, "token"),
        ("ASPO", "aspo", False, True, "polarity"),
        ("A3PO", "a3po", True, True, "token"),
    ],
)
def test_the_seven_rows_of_the_paper(paper, name, adaptive, asymmetric, level):
    assert told(table_row(METHODS[name])) == (adaptive, asymmetric, level), paper


# name: adaptive, asymmetric, level
NEIGHBOURS = {
    "grpo_zhu": (False, False, "none"),
    "ppo": (False, False, "none"),
    "psr": (False, True, "polarity"),
    "nsr": (False, True, "polarity"),
    "psr_group": (False, True, "polarity"),
    "nsr_group": (False, True, "polarity"),
    "reinforce": (False, False, "none"),
    "aspo_archer": (False, True, "polarity"),
    "a3po_no_pl": (True, True, "token"),
    "a3po_no_nh": (True, True, "token"),
    "a3po_no_adaptive": (False, True, "token"),
    "dr_grpo": (False, False, "none"),
    "rloo": (False, False, "none"),
    "reinforce_pp": (False, False, "none"),
    "reinforce_pp_baseline": (False, False, "none"),
    "gspo": (False, True, "none"),  # 3e-4 below, 4e-4 above
    "gspo_token": (False, True, "none"),
    "cispo": (False, False, "none"),
    "gmpo": (False, False, "none"),
    "sapo": (False, True, "none"),
    "bapo": (True, True, "none"),  # bounds searched for each mini-batch
    "clip_cov": (False, False, "token"),
    "kl_cov": (False, False, "token"),
    "entropy_advantage": (False, True, "token"),
    "ar": (False, False, "token"),
    "opsm": (False, True, "polarity"),
    "two_sided": (False, True, "none"),
}


def test_the_table_has_every_method_of_the_catalog():
    rows = {row["name"]: row for row in method_table()}
    assert list(rows) == list(METHODS)
    assert {name: told(rows[name]) for name in NEIGHBOURS} == NEIGHBOURS
    assert len(NEIGHBOURS) + 7 == len(METHODS)
    assert all(row["source"] for row in rows.values())


@pytest.mark.parametrize(
    ("base", "changes", "adaptive", "asymmetric", "level"),
    [
        ("grpo", {"shaping.positive_weight": 0.5}, False, True, "polarity"),
        ("grpo", {"shaping.positive_weight": 0.5, "shaping.negative_weight": 0.5}, False, False, "polarity"),
        ("grpo", {"surrogate.high": 0.28}, False, True, "none"),
        ("a3po", {"shaping.positive.scale.start": 1, "shaping.negative.scale.start": 1}, False, True, "token"),
        ("grpo", {"token_mask": {}}, False, False, "token"),
        ("gspo", {"surrogate.high": 3e-4}, False, False, "none"),
        ("sapo", {"surrogate.negative": 1.0}, False, False, "none"),
        ("w_reinforce", {"advantage.positive": 1.0}, False, False, "none"),
        ("two_sided", {"surrogate.dual": None}, False, False, "none"),
        ("dapo", {"shaping.probability_weight": {}}, False, True, "token"),
        ("polarity_p0.5n1", {}, False, True, "polarity"),
        ("token_positive_low_prob", {}, False, True, "token"),
    ],
)
def test_the_table_is_derived_from_definitions(base, changes, adaptive, asymmetric, level):
    assert told(table_row(METHODS[base].vary(changes))) == (adaptive, asymmetric, level)


def test_what_a_row_says_of_the_parts():
    assert table_row(METHODS["w_reinforce"])["advantage"] == "+0.1 / -1"
    assert table_row(METHODS["rloo"])["advantage"] == "leave_one_out"
    assert table_row(METHODS["dapo"])["loss"] == "clip 0.2 / 0.28 / 10"
    assert table_row(METHODS["cispo"])["loss"] == "cispo - / 0.2"
    assert table_row(METHODS["bapo"])["loss"] == "bapo 0.6-0.9 / 1.2-3 / 3"
    filtered = METHODS["psr"].vary({"filter.dynamic_sampling": True})
    assert table_row(filtered)["filter"] == "positive + dynamic"
