"""Weights over a run: the decay of a preset against the run's length, and closed loops that follow a measurement."""

import math
import re

import pytest
import torch
import yaml

from polarity.errors import UserError
from polarity.methods import METHODS, build_method
from polarity.methods.schedules import ClosedLoop, LinearDecay, weight_at
from polarity.methods.table import table_row

POSITIVE, NEGATIVE = "shaping.positive.scale", "shaping.negative.scale"


def scales(m):
    return [part.scale for _, part in m.shaping.parts]


def loop(**fields):
    return {"kind": "closed_loop", "low": 0.2, "high": 0.4, **fields}


def following(state=None, method=None, **metrics):
    """State after a step with these metrics (`__` stands for `/`)."""
    return method.update_state(state, {name.replace("__", "/"): value for name, value in metrics.items()})


# decays over a run


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
        UserError, match=r"decays over 200 rollout steps but the run, or the phase, has 100; set decay_until .*per_step"
    ):
        build_method("a3po", steps=100)
    assert build_method("a3po", steps=200) == METHODS["a3po"]
    assert build_method("a3po_no_adaptive", steps=10) == METHODS["a3po_no_adaptive"]


# closed loops

ONE_SIDED = METHODS["a3po"].vary({POSITIVE: loop(start=1.5), "shaping.negative": None})


@pytest.mark.parametrize(
    ("entropy", "weight"), [(0.1, 1.55), (0.2, 1.5), (0.3, 1.5), (0.4, 1.5), (0.5, 1.45), (math.nan, 1.5)]
)
def test_the_weight_rises_below_the_band_falls_above_it_and_stays_inside(entropy, weight):
    state = following(None, ONE_SIDED, entropy__mean=entropy)
    assert state == {POSITIVE: pytest.approx(weight)}


def test_the_weight_moves_one_step_at_a_time_between_floor_and_ceiling():
    m = ONE_SIDED.vary({f"{POSITIVE}.step": 0.4, f"{POSITIVE}.ceiling": 2.5, f"{POSITIVE}.floor": 0.8})
    seen, state = [], None
    for entropy in [0.0] * 4 + [9.0] * 6:
        state = following(state, m, entropy__mean=entropy)
        seen.append(state[POSITIVE])
    assert seen == pytest.approx([1.9, 2.3, 2.5, 2.5, 2.1, 1.7, 1.3, 0.9, 0.8, 0.8])


def test_a_step_that_did_not_measure_holds_the_weight():
    assert following(None, ONE_SIDED, reward__mean=1.0) == {POSITIVE: 1.5}
    assert following({POSITIVE: 2.2}, ONE_SIDED) == {POSITIVE: 2.2}


def test_a_mismatch_loop_watches_the_mismatch():
    m = ONE_SIDED.vary({f"{POSITIVE}.metric": "mismatch", f"{POSITIVE}.low": 0.0, f"{POSITIVE}.high": 0.02})
    assert m.watches == {"mismatch/mean"}
    assert ONE_SIDED.watches == {"entropy/mean"}
    assert METHODS["a3po"].watches == frozenset()
    assert following(None, m, entropy__mean=9.0, mismatch__mean=0.01) == {POSITIVE: 1.5}
    assert following(None, m, entropy__mean=0.0, mismatch__mean=0.05) == {POSITIVE: pytest.approx(1.45)}


def test_each_side_follows_its_own_loop():
    m = METHODS["a3po"].vary(
        {POSITIVE: loop(), NEGATIVE: loop(metric="mismatch", low=0.01, high=0.02, start=2.0, step=0.5)}
    )
    assert m.watches == {"entropy/mean", "mismatch/mean"}
    state = following(None, m, entropy__mean=0.0, mismatch__mean=0.5)
    assert state == {POSITIVE: pytest.approx(1.05), NEGATIVE: pytest.approx(1.5)}
    state = following(state, m, entropy__mean=0.3, mismatch__mean=0.0)
    assert state == {POSITIVE: pytest.approx(1.05), NEGATIVE: pytest.approx(2.0)}


def test_the_state_is_what_shape_weighs_with():
    logp, mask = torch.tensor([[-3.0, -1.0, -2.0]]), torch.ones(1, 3, dtype=torch.bool)

    def weight(state, step=0):
        return ONE_SIDED.shape(torch.tensor([1.0]), logp, None, mask, step=step, state=state).tolist()

    assert weight(None) == [[1.5, 1.0, 1.0]]
    assert weight({POSITIVE: 2.25}, step=250) == [[2.25, 1.0, 1.0]]  # the step itself changes nothing
    assert weight({NEGATIVE: 2.25}) == [[1.5, 1.0, 1.0]]


def test_open_loops_leave_the_state_alone():
    assert METHODS["a3po"].update_state(None, {"entropy/mean": 1.0}) is None
    other = {"somewhere.else": 3.0}
    assert METHODS["dapo"].update_state(other, {"entropy/mean": 1.0}) is other
    assert following(other, ONE_SIDED, entropy__mean=0.3) == {"somewhere.else": 3.0, POSITIVE: 1.5}


def test_weight_at_reads_numbers_decays_and_loops():
    closed = ClosedLoop(low=0.2, high=0.4, start=1.5)
    assert ONE_SIDED.shaping.weights(0, {POSITIVE: 2.0}) == {"positive": 2.0}
    assert METHODS["a3po"].shaping.weights(100, None) == {"positive": 1.5, "negative": 1.5}
    assert weight_at(0.2, 9, {POSITIVE: 7.0}, POSITIVE) == 0.2
    assert weight_at(LinearDecay(start=2.0, per_step=0.5), 1, {POSITIVE: 7.0}, POSITIVE) == 1.5
    assert weight_at(closed, 9, {POSITIVE: 2.0}, POSITIVE) == 2.0
    assert weight_at(closed, 9, {}, POSITIVE) == weight_at(closed, 9, None, POSITIVE) == 1.5


def test_a_closed_loop_from_yaml_and_by_dotted_path():
    text = """
    base: a3po
    shaping:
      positive: {scale: {kind: closed_loop, metric: entropy, low: 0.2, high: 0.4, start: 1.5}}
      negative: null
    """
    m = build_method(yaml.safe_load(text), steps=20, decay_until=0.5)
    assert m == ONE_SIDED
    assert build_method(yaml.safe_load(yaml.safe_dump(m.model_dump())), steps=20) == m
    assert m.vary({f"{POSITIVE}.high": 0.5}).shaping.positive.scale == ClosedLoop(low=0.2, high=0.5, start=1.5)
    back = m.vary({POSITIVE: {"kind": "decay", "start": 2.0, "per_step": 0.1}})
    assert back.shaping.positive.scale == LinearDecay(start=2.0, per_step=0.1)


def test_a_closed_loop_is_adaptive_unless_it_cannot_move():
    assert table_row(ONE_SIDED)["adaptive"]
    fixed = ONE_SIDED.vary({POSITIVE: loop(start=2.0, floor=2.0, ceiling=2.0)})
    assert not table_row(fixed)["adaptive"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 0.5}, "low 0.5 is above high 0.4: the band is empty"),
        ({"start": 0.5}, "start 0.5 is not between floor 1 and ceiling 3"),
        ({"ceiling": 0.9}, "start 1 is not between floor 1 and ceiling 0.9"),
        ({"step": 0}, "'shaping.positive.scale.step': input should be greater than 0"),
        ({"metric": "entrpy"}, "'shaping.positive.scale.metric'"),
        ({"hihg": 1}, "'shaping.positive.scale.hihg'; did you mean 'high'"),
        ({"kind": "closed_lop"}, "'closed_lop' is not a kind"),
        ({"high": None}, "'shaping.positive.scale.high'"),
    ],
)
def test_mistakes_in_a_closed_loop_are_one_line_that_names_the_fix(fields, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build_method({"base": "a3po", POSITIVE: {**loop(), **fields}})
    assert "\n" not in str(error.value)


def test_the_band_must_be_given():
    with pytest.raises(UserError, match=r"shaping\.positive\.scale\.(low|high)' is missing"):
        build_method({"base": "a3po", POSITIVE: {"kind": "closed_loop"}})
