"""Methods that are sequences of methods: which is in force when, their decays, and how a configuration writes them."""

import re
import sys

import pytest
import torch
import yaml
from minibatches import rollout_step, shaped
from pydantic import ValidationError

from polarity.errors import UserError
from polarity.methods import METHODS, Method, Phase, Phases, build_method
from polarity.methods.table import table_row

PLUGIN = """
from polarity.methods import METHODS, Method, Phase, Phases


class Halved(Method):
    factor: float = 0.5

    def shape(self, advantages, *rest, **step):
        return self.factor * super().shape(advantages, *rest, **step)


halved = Halved.build_on(METHODS["dapo"], name="halved")
warm = Phases(name="warm", phases=(Phase(method=METHODS["nsr"], steps=2), Phase(method=halved)))
"""


def phases(*parts):
    """Phases from (method, steps) pairs and a last method."""
    *first, last = parts
    listed = [Phase(method=METHODS[name], steps=steps) for name, steps in first]
    return Phases(name="these", phases=(*listed, Phase(method=METHODS[last])))


def weights(m, s):
    return [part.scale.value(s) for _, part in m.shaping.parts]


# which is in force


def test_at_gives_the_method_in_force_and_what_a_step_needs():
    m = build_method("nsr_50_then_dapo")
    assert (m.name, m.starts) == ("nsr_50_then_dapo", (0, 50))
    assert m.methods == (METHODS["nsr"], METHODS["dapo"])
    assert [m.at(s) for s in (0, 1, 49)] == [METHODS["nsr"]] * 3
    assert [m.at(s) for s in (50, 51, 10**6)] == [METHODS["dapo"]] * 3
    assert "50" in m.source
    assert METHODS["dapo"].at(7) is METHODS["dapo"]
    assert METHODS["dapo"].methods == (METHODS["dapo"],)


def test_what_holds_of_the_whole_run_is_the_union_of_its_phases():
    m = phases(("nsr", 2), ("lp_reg", 3), "fork_tokens")
    assert m.starts == (0, 2, 5)
    assert m.needs == {"entropy", "select", "logp_proxy", "resample"}
    assert m.at(0).needs == {"entropy"}
    assert m.at(4).needs == {"select", "logp_proxy"}
    assert m.compares_group
    assert not phases(("nsr", 2), "psr").compares_group
    assert not m.skips_zero_advantage
    assert phases(("grpo", 2), "dapo").skips_zero_advantage
    assert m.watches == frozenset()


def test_each_phase_keeps_and_shapes_as_its_method_does():
    m, step = build_method("nsr_1_then_psr_group"), rollout_step(0)
    for s, name in ((0, "nsr"), (1, "psr_group"), (9, "psr_group")):
        kept = m.at(s).keep(step.rewards, step.groups, step.correct)
        assert torch.equal(kept, METHODS[name].keep(step.rewards, step.groups, step.correct))
        assert torch.equal(shaped(m.at(s), step, s), shaped(METHODS[name], step, s))


# decays


@pytest.mark.parametrize("local", [0, 1, 100, 199, 200, 250])
def test_a_decay_begins_anew_with_its_phase(local):
    m = phases(("a3po", 30), ("nsr", 20), "a3po")
    step = rollout_step(1)
    assert weights(m.at(50 + local), 50 + local) == pytest.approx(weights(METHODS["a3po"], local))
    torch.testing.assert_close(shaped(m.at(50 + local), step, 50 + local), shaped(METHODS["a3po"], step, local))


def test_a_decay_that_its_phase_cuts_short_ends_with_it():
    m = phases(("a3po", 30), "a3po_no_adaptive")
    assert weights(m.at(29), 29) == pytest.approx([2 - 29 * 0.005] * 2)
    assert [part.scale for _, part in m.at(30).shaping.parts] == [2.0, 2.0]


def test_a_floor_of_its_own_survives_the_delay():
    spec = {"base": "a3po", "shaping.positive.scale": {"start": 5.0, "per_step": 1.0, "floor": 3.5}}
    m = build_method({"phases": [{"method": "grpo", "steps": 7}, {"method": spec}]})
    assert [weights(m.at(s), s)[0] for s in (7, 8, 9, 10)] == [5.0, 4.0, 3.5, 3.5]


def test_decay_until_and_until_are_laid_out_over_the_phase():
    m = build_method("a3po_40_then_a3po", steps=100, decay_until=0.5)
    for s, weight in ((0, 2.0), (10, 1.5), (20, 1.0), (39, 1.0), (40, 2.0), (55, 1.5), (70, 1.0), (99, 1.0)):
        assert weights(m.at(s), s) == pytest.approx([weight] * 2)
    late = {"base": "a3po", "shaping.positive.scale.until": 1.0, "shaping.negative": None}
    m = build_method({"phases": [{"method": "dapo", "steps": 20}, {"method": late}]}, steps=100, decay_until=0.1)
    assert [weights(m.at(s), s) for s in (20, 60, 99)] == [[2.0], [1.5], [pytest.approx(1 + 1 / 80)]]
    own = {"base": "a3po", "shaping": {"positive": {"scale": {"per_step": 0.1}}, "negative": None}}
    m = build_method({"phases": [{"method": own, "steps": 20}, {"method": "dapo"}]}, steps=100, decay_until=0.1)
    assert weights(m.at(5), 5) == [1.5]


@pytest.mark.parametrize(
    ("spec", "steps", "message"),
    [
        ("nsr_50_then_dapo", 50, "its last phase begins after 50 rollout steps and the run has 50"),
        ("nsr_50_then_dapo", 20, "give more steps, or shorter phases"),
        ("a3po_50_then_dapo", 400, "decays over 200 rollout steps but the run, or the phase, has 50"),
        (
            "dapo_250_then_a3po",
            400,
            "decays over 200 rollout steps but the run, or the phase, has 150; set decay_until",
        ),
    ],
)
def test_a_run_or_phase_that_is_too_short_is_refused(spec, steps, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_method(spec, steps=steps)


def test_a_run_that_is_long_enough_is_as_the_catalog_has_it():
    assert build_method("nsr_50_then_dapo", steps=51) == build_method("nsr_50_then_dapo")
    assert build_method("nsr_50_then_a3po", steps=250) == build_method("nsr_50_then_a3po")


# closed loops


def loop(**fields):
    return {"kind": "closed_loop", "low": 0.2, "high": 0.4, **fields}


def test_closed_loops_follow_within_their_phase():
    second = {"base": "a3po", "shaping.positive.scale": loop(start=1.5), "shaping.negative": None}
    m = build_method({"phases": [{"method": "nsr", "steps": 2}, {"method": second}]}, steps=10)
    assert m.watches == {"entropy/mean"}
    state = None
    for s in range(4):  # entropy is too low all along; the first phase has nothing that follows it
        state = m.at(s).update_state(state, {"entropy/mean": 0.1})
    assert state == {"shaping.positive.scale": pytest.approx(1.6)}


def test_a_loop_of_a_later_phase_starts_inside_its_own_range_whatever_the_earlier_one_left():
    strong = {"base": "a3po", "shaping.positive.scale": loop(start=3.0), "shaping.negative": None}
    weak = {"base": "a3po", "shaping.positive.scale": loop(ceiling=1.5), "shaping.negative": None}
    m = build_method({"phases": [{"method": strong, "steps": 1}, {"method": weak}]}, steps=10)
    state = m.at(0).update_state(None, {"entropy/mean": 0.3})
    one, mask = torch.tensor([1.0]), torch.ones(1, 1, dtype=torch.bool)
    assert m.at(1).shape(one, torch.zeros(1, 1), None, mask, step=1, state=state).item() <= 1.5


# names


def test_names_of_sequences_nest_to_the_right_and_flatten():
    m = build_method("nsr_50_then_psr_20_then_polarity_p0.5n1")
    assert [(p.method.name, p.steps) for p in m.phases] == [("nsr", 50), ("psr", 20), ("polarity_p0.5n1", None)]
    assert m.starts == (0, 50, 70)
    assert build_method("token_negative_low_prob_3_then_a3po").methods[0] == METHODS["token_negative_low_prob"]


@pytest.mark.parametrize(
    "name", ["nsr_0_then_dapo", "nsr_then_dapo", "nsr_-1_then_dapo", "nsr_5_then_", "_5_then_dapo"]
)
def test_what_is_no_name_of_a_sequence(name):
    assert name not in METHODS
    with pytest.raises(UserError, match="unknown method"):
        build_method(name)


def test_an_unknown_part_of_a_name_is_the_one_that_is_named():
    for name in ("nrs_50_then_dapo", "dapo_50_then_nrs"):
        with pytest.raises(UserError, match="unknown method 'nrs'; did you mean 'nsr'"):
            build_method(name)


# configuration


def test_a_list_of_phases_in_yaml():
    text = """
    phases:
      - {method: nsr, steps: 50}
      - {method: {base: dapo, surrogate: {high: 0.3}}, steps: 10}
      - method: a3po
    """
    m = build_method(yaml.safe_load(text))
    assert m.name == "nsr_50_then_dapo_10_then_a3po"
    assert m.methods == (METHODS["nsr"], METHODS["dapo"].vary({"surrogate.high": 0.3}), METHODS["a3po"])
    assert build_method({"name": "mine", **yaml.safe_load(text)}).name == "mine"
    assert build_method({"base": "nsr_50_then_dapo", "name": "warm"}).name == "warm"


@pytest.mark.parametrize("spec", ["nsr_50_then_a3po", "a3po_30_then_kl_cov_5_then_aspo_archer", "psr_3_then_ppo"])
def test_a_dumped_sequence_reads_back_as_itself(spec):
    m = build_method(spec, steps=90, decay_until=0.667)
    text = yaml.safe_dump(m.model_dump())
    assert build_method(yaml.safe_load(text), steps=90, decay_until=0.3) == m
    assert build_method(m, steps=90, decay_until=0.667) == m


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"base": "nsr_50_then_dapo", "surrogate.high": 0.3}, "'surrogate' does not apply to a sequence of methods"),
        ({"phases": "nsr"}, "'phases': give a list of {method: NAME or mapping, steps: number}"),
        ({"phases": ["nsr", "dapo"]}, "'phases': give a list"),
        ({"phases": [{"method": "nsr"}, {"method": "dapo"}]}, "every phase but the last needs its number of steps"),
        ({"phases": [{"method": "nsr", "steps": 5}, {"method": "dapo", "steps": 5}]}, "drop its steps"),
        ({"phases": [{"method": "nsr"}]}, "at least 2"),
        ({"phases": []}, "'phases'"),
        ({"base": "dapo", "phases": [{"method": "nsr", "steps": 5}, {"method": "dapo"}]}, "drop base"),
        ({"phases": [{"steps": 5}, {"method": "dapo"}]}, "'phases.0.method' is missing"),
        ({"phases": [{"method": "nsr", "steps": 0}, {"method": "dapo"}]}, "'phases.0.steps'"),
        ({"phases": [{"method": "nsr", "step": 5}, {"method": "dapo"}]}, "'phases.0.step'; did you mean 'steps'"),
        ({"phases": [{"method": "nrs", "steps": 5}, {"method": "dapo"}]}, "did you mean 'nsr'"),
        (
            {"phases": [{"method": "nsr_5_then_psr", "steps": 5}, {"method": "dapo"}]},
            "phases.0.method: 'nsr_5_then_psr' is itself a sequence; list its phases here",
        ),
        (
            {"phases": [{"method": {"base": "dapo", "surrogate.hihg": 1}, "steps": 5}, {"method": "dapo"}]},
            "did you mean 'high'",
        ),
    ],
)
def test_mistakes_in_a_sequence_are_one_line_that_names_the_fix(spec, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build_method(spec)
    assert "\n" not in str(error.value)


def test_phases_made_in_python_are_checked_too():
    with pytest.raises(ValidationError, match="needs its number of steps"):
        Phases(name="x", phases=(Phase(method=METHODS["nsr"]), Phase(method=METHODS["dapo"])))
    with pytest.raises(ValidationError, match="at least 2"):
        Phases(name="x", phases=(Phase(method=METHODS["nsr"]),))


# a user's own method as a phase


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "halved_file.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "halved_file:halved"
    sys.modules.pop("halved_file", None)


@pytest.mark.parametrize("changes", [{}, {"factor": 0.25}])
def test_a_users_method_stays_what_it_is_through_a_dump(plugin, changes):
    method = {"base": plugin, **changes} if changes else plugin
    m = build_method({"phases": [{"method": "nsr", "steps": 2}, {"method": method}]}, steps=9, decay_until=0.5)
    again = build_method(yaml.safe_load(yaml.safe_dump(m.model_dump())), steps=9, decay_until=0.5)
    step = rollout_step(2)
    factor = changes.get("factor", 0.5)
    for built in (m, again):
        assert type(built.at(2)).__name__ == "Halved"
        torch.testing.assert_close(shaped(built.at(2), step), factor * shaped(METHODS["dapo"], step))
    assert again == m


def test_a_users_own_sequence_stays_what_it_is_through_a_dump(plugin):
    m = build_method("halved_file:warm", steps=9)
    renamed = build_method({"base": "halved_file:warm", "name": "mine"}, steps=9)
    again = build_method(yaml.safe_load(yaml.safe_dump({"base": "halved_file:warm", **m.model_dump()})), steps=9)
    assert [type(built.at(2)).__name__ for built in (m, renamed, again)] == ["Halved"] * 3
    assert again == m


def test_a_users_subclass_keeps_its_class_when_its_decay_is_delayed():
    class Own(Method):
        bias: float = 3.0

    own = Own.build_on(METHODS["a3po"], name="own", bias=4.0)
    m = Phases(name="x", phases=(Phase(method=METHODS["nsr"], steps=5), Phase(method=own)))
    late = m.at(7)
    assert (type(late), late.bias) == (Own, 4.0)
    assert weights(late, 7) == pytest.approx(weights(own, 2))


# table


def test_a_sequence_is_adaptive_and_has_the_most_of_its_phases():
    row = table_row(build_method("nsr_50_then_grpo"))
    assert (row["name"], row["adaptive"], row["asymmetric"], row["shaping"]) == (
        "nsr_50_then_grpo", True, True, "polarity",
    )  # fmt: skip
    assert row["advantage"] == "+1 / -1 > group"
    assert row["filter"] == "negative > none"
    assert row["aggregation"] == "token_mean > seq_mean_token_mean"
    assert table_row(build_method("grpo_5_then_dr_grpo"))["shaping"] == "none"
    assert not table_row(build_method("grpo_5_then_dr_grpo"))["asymmetric"]
    assert table_row(build_method("psr_5_then_a3po"))["shaping"] == "token"
