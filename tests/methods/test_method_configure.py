"""Catalog, table, changes by dotted path, and what a configuration may say. Documented examples run as printed."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError

from polarity.errors import UserError
from polarity.methods import METHODS, LossInputs, Method, build_method, method_table
from polarity.methods.table import table_row

DOC = Path(__file__).parents[2] / "docs" / "own_method.md"
FAMILIES = ["polarity_p0.5n1", "polarity_p10n.25", "token_positive_high_entropy", "token_negative_low_prob"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), re.DOTALL)


# catalog


def test_catalog_iterates_literal_names_and_resolves_families():
    assert list(METHODS) == [
        *("grpo", "grpo_zhu", "dapo", "psr", "nsr", "psr_group", "nsr_group", "w_reinforce", "reinforce"),
        *("fork_tokens", "a3po", "a3po_no_pl", "a3po_no_nh", "a3po_no_adaptive"),
    ]
    for name in [*METHODS, *FAMILIES]:
        assert name in METHODS
        assert METHODS[name].name == name
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
        ("token_positive_low_prob", {"resample"}),
        ("token_positive_low_entropy", {"resample", "entropy_old"}),
    ],
)
def test_needs_are_exact(name, needs):
    assert METHODS[name].needs == needs


def test_rows_of_zero_advantage_may_be_skipped_only_without_other_terms():
    skip = {name for name in METHODS if METHODS[name].skips_zero_advantage}
    assert set(METHODS) - skip == {"grpo_zhu", "psr", "nsr", "w_reinforce", "reinforce"}


def test_table_agrees_with_the_papers():
    rows = {row["name"]: (row["adaptive"], row["asymmetric"], row["shaping"]) for row in method_table()}
    assert list(rows) == list(METHODS)
    assert rows["grpo"] == (False, False, "none")
    assert rows["dapo"] == (False, True, "none")
    assert rows["fork_tokens"] == (False, True, "token")
    assert rows["w_reinforce"] == (False, True, "polarity")
    assert rows["a3po"] == (True, True, "token")
    assert rows["a3po_no_adaptive"] == (False, True, "token")
    assert rows["reinforce"] == (False, False, "none")
    assert rows["psr"][1:] == (True, "polarity")


@pytest.mark.parametrize(
    ("base", "changes", "adaptive", "asymmetric", "level"),
    [
        ("grpo", {"shaping.positive_weight": 0.5}, False, True, "polarity"),
        ("grpo", {"shaping.positive_weight": 0.5, "shaping.negative_weight": 0.5}, False, False, "polarity"),
        ("grpo", {"surrogate.high": 0.28}, False, True, "none"),
        ("a3po", {"shaping.positive.scale.start": 1, "shaping.negative.scale.start": 1}, False, True, "token"),
        ("grpo", {"token_mask": {}}, False, False, "token"),
    ],
)
def test_table_is_derived_from_definitions(base, changes, adaptive, asymmetric, level):
    row = table_row(METHODS[base].vary(changes))
    assert (row["adaptive"], row["asymmetric"], row["shaping"]) == (adaptive, asymmetric, level)


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


# schedules of a run


def scales(m):
    return [part.scale for _, part in m.shaping.parts]


def test_a_presets_decay_gives_way_to_decay_until():
    for scale in scales(build_method("a3po", steps=80, decay_until=0.5)):
        assert scale.until is None
        assert scale.per_step == pytest.approx(1 / 40)
        assert scale.value(40) == 1.0


def test_a_per_step_of_the_users_own_stays():
    spec = {"base": "a3po", "shaping": {"positive": {"scale": {"per_step": 0.01}}}}
    positive, negative = scales(build_method(spec, steps=80, decay_until=0.5))
    assert (positive.per_step, negative.per_step) == (0.01, pytest.approx(1 / 40))


def test_until_is_turned_into_per_step():
    spec = {"base": "a3po", "shaping.positive.scale.until": 0.25, "shaping.negative": None}
    (scale,) = scales(build_method(spec, steps=80, decay_until=0.5))
    assert scale.per_step == pytest.approx(1 / 20)
    (unresolved,) = scales(build_method(spec))
    with pytest.raises(ValueError, match="before the run's length is known"):
        unresolved.value(0)


def test_a_run_too_short_for_the_papers_decay_must_say_what_it_means():
    with pytest.raises(
        UserError, match=r"decays over 200 rollout steps but the run has 100; set decay_until .*per_step"
    ):
        build_method("a3po", steps=100)
    assert build_method("a3po", steps=200) == METHODS["a3po"]
    assert build_method("a3po_no_adaptive", steps=10) == METHODS["a3po_no_adaptive"]


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
