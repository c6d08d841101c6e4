"""Catalog, table, changes by dotted path, and what a configuration may say. Documented examples run as printed."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError

from polarity.errors import UserError
from polarity.methods import METHODS, LossInputs, Method, build_method

DOC = Path(__file__).parents[2] / "docs" / "own_method.md"
# As the papers' tables have them, then their neighbours
NAMES = [
    *("grpo", "grpo_zhu", "dapo", "ppo", "psr", "nsr", "psr_group", "nsr_group", "w_reinforce", "reinforce"),
    *("fork_tokens", "lp_reg", "aspo", "aspo_archer", "a3po", "a3po_no_pl", "a3po_no_nh", "a3po_no_adaptive"),
    *("dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gspo", "gspo_token", "cispo", "gmpo", "sapo"),
    *("bapo", "clip_cov", "kl_cov", "entropy_advantage", "ar", "opsm", "two_sided"),
]
FAMILIES = ["polarity_p0.5n1", "polarity_p10n.25", "token_positive_high_entropy", "token_negative_low_prob"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), re.DOTALL)


# catalog


def test_catalog_iterates_literal_names_and_resolves_families():
    assert list(METHODS) == NAMES
    assert len(METHODS) == 34
    for name in [*METHODS, *FAMILIES]:
        assert name in METHODS
        assert METHODS[name].name == name
    assert "nsr_50_then_dapo" not in METHODS  # a sequence is not a method: build_method makes it
    assert None not in METHODS
    assert "polarity_p0.5" not in METHODS
    assert "token_positive_middle_prob" not in METHODS
    with pytest.raises(KeyError, match="did you mean 'a3po'"):
        METHODS["a3p0"]
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["dapo"]  # type: ignore[index]


def test_ratio_and_scale_of_families_can_be_set():
    m = METHODS["token_negative_high_prob"]
    assert (m.shaping.negative.ratio, m.shaping.negative.scale, m.shaping.positive) == (0.2, 5.0, None)
    damped = m.vary({"shaping.negative.ratio": 0.5, "shaping.negative.scale": 0.2})
    shaped = damped.shape(torch.tensor([-1.0]), torch.tensor([[-1.0, 0.0]]), None, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(shaped, torch.tensor([[-1.0, -0.2]]))


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("grpo", set()),
        ("grpo_zhu", {"logp_ref", "entropy"}),
        ("dapo", {"resample"}),
        ("a3po", {"resample"}),
        ("psr", {"entropy"}),
        ("psr_group", set()),
        ("fork_tokens", {"resample", "entropy", "select"}),
        ("ppo", {"values", "logp_ref", "entropy"}),
        ("reinforce_pp", set()),
        ("lp_reg", {"select", "logp_proxy"}),
        ("aspo", {"logp_ref"}),
        ("aspo_archer", {"logp_ref", "entropy"}),
        ("gspo", set()),
        ("bapo", {"select"}),
        ("clip_cov", {"select"}),
        ("kl_cov", {"select"}),
        ("entropy_advantage", {"entropy_old"}),
        ("ar", set()),
        ("opsm", {"logp_rollout"}),
        ("token_positive_low_prob", {"resample"}),
        ("token_positive_low_entropy", {"resample", "entropy_old"}),
    ],
)
def test_needs_are_exact(name, needs):
    assert METHODS[name].needs == needs


def test_rows_of_zero_advantage_may_be_skipped_only_without_other_terms():
    skip = {name for name in METHODS if METHODS[name].skips_zero_advantage}
    regularised = {"grpo_zhu", "ppo", "psr", "nsr", "w_reinforce", "reinforce", "aspo", "aspo_archer"}
    assert set(METHODS) - skip == regularised | {"lp_reg", "kl_cov"}


def test_every_field_is_documented():
    seen, todo = set(), [Method]
    while todo:
        model = todo.pop()
        seen.add(model)
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            todo += [m for m in models_in(field.annotation) if m not in seen]
    assert len(seen) > 10


def models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in models_in(inner)]


# changes


def test_vary_validates_and_leaves_the_original_alone():
    a3po = METHODS["a3po"]
    assert a3po.vary({"shaping.positive.ratio": 0.1}).shaping.positive.ratio == 0.1
    assert a3po.vary({"shaping": {"positive": {"ratio": 0.1}}}) == a3po.vary({"shaping.positive.ratio": 0.1})
    assert a3po.shaping.positive.ratio == 0.2
    assert a3po.vary({}) == a3po
    with pytest.raises(ValidationError):
        a3po.name = "other"


def test_vary_sets_parts_that_were_absent_and_drops_what_an_alternative_replaces():
    assert METHODS["dapo"].vary({"overlong.buffer": 100}).overlong.factor == 1.0
    decay = METHODS["a3po"].vary({"shaping.positive.scale.until": 0.5}).shaping.positive.scale
    assert (decay.per_step, decay.until, decay.start) == (None, 0.5, 2.0)
    signed = METHODS["grpo"].vary({"advantage.kind": "signed", "advantage.positive": 0.3}).advantage
    assert (signed.kind, signed.positive) == ("signed", 0.3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a3p0", "unknown method 'a3p0'; did you mean 'a3po'"),
        ({"base": "a3p0"}, "did you mean 'a3po'"),
        ({"base": "a3po", "shapping": {}}, "unknown method key 'shapping'; did you mean 'shaping'"),
        ({"base": "a3po", "shaping": {"positive": {"ration": 0.1}}}, "'shaping.positive.ration'; did you mean 'ratio'"),
        ({"base": "a3po", "shaping.positive.scale.stat": 3}, "'shaping.positive.scale.stat'; did you mean 'start'"),
        ({"base": "a3po", "shaping.positive.ratio": 1.5}, "'shaping.positive.ratio': input should be less than"),
        (
            {"base": "a3po", "shaping.positive.ratio": "many"},
            "'shaping.positive.ratio': input should be a valid number",
        ),
        ({"base": "a3po", "shaping.positive.scale": -1}, "'shaping.positive.scale': input should be greater"),
        ({"base": "a3po", "shaping.positive.scale.start": 0.5}, "write the number itself"),
        ({"base": "a3po", "shaping.positive.scale": {"per_step": 1, "until": 0.5}}, "exactly one of per_step"),
        ({"base": "dapo", "shaping.positive.ratio": 0.1}, "'shaping.positive.end' is missing"),
        ({"base": "dapo", "advantage.kind": "sined"}, "'advantage.kind': 'sined' is not a kind; did you mean 'signed'"),
        ({"base": "dapo", "surrogate.dual": 0.5}, "'surrogate.dual': input should be greater than 1"),
        ({"base": "dapo", "surrogate.low": float("nan")}, "'surrogate.low'"),
        ({"base": "dapo", "correction": {"cap": 2}}, "say which kind (truncated, masked)"),
        ({"base": "dapo", "correction": {"kind": "masked", "low": 3}}, "low 3 must be below high 2"),
        ({"base": "dapo", "token_mask.scope": "step"}, "needs entropy_from: old"),
        ({"base": "psr", "overlong.buffer": 10}, "set overlong: null"),
        ({"base": "a3po", "filter.polarity": "positive"}, "set shaping.negative: null"),
        ({"base": "dapo", "surrogate": 1, "surrogate.low": 0.1}, "set one"),
        ({"surrogate": {"high": 0.3}}, "'name' is missing"),
        ({"base": 3}, "a base is a name"),
        (3, "expected a name"),
        ("no_such_file:my_method", "no module 'no_such_file'"),
        ("math:pi", "is float, not a polarity.methods.Method"),
    ],
)
def test_mistakes_are_one_line_that_names_the_fix(spec, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build_method(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("base", [*METHODS, *FAMILIES])
def test_a_dumped_method_reads_back_as_itself(base):
    m = build_method({"base": base, "aggregation": "seq_mean_token_sum"}, steps=90, decay_until=0.667)
    text = yaml.safe_dump({"base": base, **m.model_dump()})
    assert build_method(yaml.safe_load(text), steps=90, decay_until=0.3) == m


# a user's own method, as documented


@pytest.fixture
def in_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_method", "curious_file", "unclipped_file"):
        sys.modules.pop(name, None)


def test_documented_ten_line_method(in_directory):
    source = next(block for block in blocks("python") if "my_method =" in block)
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    (in_directory / "my_method.py").write_text(source)
    m = build_method("my_method:my_method")
    assert m.name == "rare_tokens"
    assert m.surrogate == METHODS["dapo"].surrogate
    logp = torch.tensor([[-3.0, -1.0, float("nan")], [-3.0, -1.0, -9.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    a, correct = torch.tensor([1.0, -1.0]), torch.tensor([True, False])
    assert m.shape(a, logp, None, mask, correct=correct).tolist() == [[2, 1, 0], [-1, -1, -1]]
    changed = build_method({"base": "my_method:my_method", "threshold": -0.5, "surrogate.high": 0.3})
    assert changed.shape(a, logp, None, mask, correct=correct).tolist() == [[2, 2, 0], [-1, -1, -1]]
    assert type(changed) is type(m) is type(m.vary({"name": "again"}))
    with pytest.raises(UserError, match="did you mean 'threshold'"):
        m.vary({"treshold": 1.0})
    with pytest.raises(UserError, match="make an instance of it"):
        build_method("my_method:RareTokens")


def test_documented_needs_and_loss_of_ones_own(in_directory):
    for name in ("curious", "unclipped"):
        (in_directory / f"{name}_file.py").write_text(next(b for b in blocks("python") if f"{name} =" in b))
    curious, unclipped = build_method("curious_file:curious"), build_method("unclipped_file:unclipped")
    assert curious.needs == {"entropy_old"}
    mask = torch.tensor([[True, True, False]])
    entropy = torch.tensor([[0.5, 3.0, float("nan")]])
    assert curious.shape(torch.tensor([2.0]), entropy, entropy, mask).tolist() == [[1.0, 2.0, 0.0]]
    logp = torch.tensor([[3.0, 0.0, float("nan")]])
    out = unclipped.loss(LossInputs(logp, torch.zeros(1, 3), torch.ones(1, 3), mask))
    assert out.loss.item() == pytest.approx(-(torch.tensor(3.0).exp().item() + 1) / 2)


def test_documented_yaml():
    changed, parts = (build_method(yaml.safe_load(b)["method"], steps=100, decay_until=0.9) for b in blocks("yaml"))
    assert changed.shaping.negative is None
    assert changed.shaping.positive.scale.value(25) == pytest.approx(2.0)
    assert changed.filter.dynamic_sampling
    assert (parts.name, parts.advantage.positive, parts.surrogate.high) == ("gentle", 0.5, 0.28)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_mask": "fork"}, r"'token_mask': give a mapping, for example {kind: fork}"),
        ({"token_mask": 5}, r"'token_mask': give a mapping"),
        ({"correction": "truncated"}, r"'correction': give a mapping, for example {kind: truncated}"),
        ({"surrogate": "gspo"}, r"'surrogate': give a mapping, for example {kind: gspo}"),
        ({"advantage": "signed"}, r"'advantage': give a mapping, for example {kind: signed}"),
        ({"filter": "positive"}, r"'filter': give a mapping"),
    ],
)
def test_a_word_where_a_part_belongs_is_told_how_to_write_it(changes, message):
    with pytest.raises(UserError, match=message):
        build_method({"base": "dapo", **changes})


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"method": "nsr", "steps": 0}, {"method": "dapo"}], "method key 'phases.0.steps'"),
        ([{"method": "nsr", "steps": "five"}, {"method": "dapo"}], "not 'five'"),
        ([{"method": {"base": "nsr", "shaping.positve": 1}, "steps": 2}, {"method": "dapo"}], "phases.0.method: "),
    ],
)
def test_mistakes_in_phases_are_short(phases, message):
    with pytest.raises(UserError, match=message) as caught:
        build_method({"phases": phases})
    assert len(str(caught.value)) < 200
