"""Verdicts on synthetic series with noise: what is there is said, what is not there is not."""

import numpy as np
import pytest

from polarity.report.verdicts import MIN_STEPS, Finding, combine, judge, noise

N = 100


def series(rng, **metrics):
    """Metric -> steps and values; `accuracy` stands for accuracy/mean and so on, each a function of t in [0, 1]."""
    names = {"accuracy": "accuracy/mean", "entropy": "entropy/mean", "length": "length/mean"}
    names |= {"truncated": "length/truncated", "grad": "update/grad_norm", "error": "verifier/error"}
    names |= {"unparsed": "verifier/unparsed", "k3": "mismatch/k3", "rounds": "rollouts/rounds"}
    out = {}
    for name, (curve, spread) in metrics.items():
        t = np.linspace(0, 1, N)
        out[names[name]] = (list(range(1, N + 1)), (curve(t) + spread * rng.standard_normal(N)).tolist())
    return out


def found(findings):
    return {finding.topic: finding.name for finding in findings}


def text(findings, topic):
    (verdict,) = combine({0: [finding for finding in findings if finding.topic == topic]})
    return verdict.text


@pytest.fixture(params=range(8))
def rng(request):
    return np.random.default_rng(request.param)


@pytest.mark.parametrize(
    ("curve", "name", "words"),
    [
        (lambda t: 0.22 + 0.6 * t, "learning", "still rising"),
        (lambda t: 0.22 + 0.5 * np.minimum(1, 2.5 * t), "learning", "no clear change in the last quarter"),
        (lambda t: 0.22 + 0.76 * np.minimum(1, 2.5 * t), "learning", "near 1"),
        (lambda t: 0.3 + 0 * t, "stalled", "no clear change"),
        (lambda t: 0.6 - 0.4 * t, "getting worse", "train accuracy"),
        (lambda t: 0.2 + 0.6 * np.minimum(1, 4 * t) - 0.2 * np.maximum(0, t - 0.7), "learning", "falling"),
        (lambda t: 0.2 + 0.6 * np.minimum(1, 4 * t) - 1.5 * np.maximum(0, t - 0.7), "fell back", "at its best"),
        (lambda t: 0.99 + 0 * t, "solved from the start", "train accuracy"),
    ],
)
def test_progress(rng, curve, name, words):
    findings = judge(series(rng, accuracy=(curve, 0.01)))
    assert found(findings)["progress"] == name
    assert words in text(findings, "progress")


def test_a_change_inside_the_noise_is_not_called_learning(rng):
    assert found(judge(series(rng, accuracy=(lambda t: 0.3 + 0.03 * t, 0.08))))["progress"] == "stalled"


def test_the_sentence_states_the_numbers_and_the_steps(rng):
    findings = judge(series(rng, accuracy=(lambda t: np.where(t < 0.5, 0.2, 0.8), 0.0)))
    assert text(findings, "progress").startswith("train accuracy 0.20 → 0.80 (steps 1–10 to 91–100)")


def test_entropy_collapse_names_the_step(rng):
    findings = judge(series(rng, entropy=(lambda t: np.where(t < 0.395, 0.3, 0.03), 0.003)))
    assert found(findings)["entropy"] == "entropy collapsed"
    step = int(text(findings, "entropy").split("since step ")[1].split(":")[0])
    assert 35 <= step <= 42  # windows of ten steps
    assert "0.30 → 0.03 nats, 10 % of its start" in text(findings, "entropy")


@pytest.mark.parametrize(
    ("end", "name"), [(0.25, "entropy"), (0.1, "entropy"), (0.02, "entropy collapsed"), (0.6, "entropy rose")]
)
def test_entropy_by_its_end(rng, end, name):
    assert found(judge(series(rng, entropy=(lambda t: 0.3 + (end - 0.3) * t, 0.01))))["entropy"] == name


def test_length(rng):
    assert "length" not in found(
        judge(series(rng, length=(lambda t: 44 - 10 * t, 2), truncated=(lambda t: 0.01 + 0 * t, 0.01)))
    )
    assert found(judge(series(rng, length=(lambda t: 44 + 60 * t, 2))))["length"] == "much longer responses"
    assert found(judge(series(rng, length=(lambda t: 44 - 30 * t, 2))))["length"] == "much shorter responses"
    blown = {"length": (lambda t: 44 + 90 * t, 2), "truncated": (lambda t: 0.03 + 0.4 * t, 0.01)}
    findings = judge(series(rng, **blown))
    assert found(findings)["length"] == "length blow-up"
    assert "garbled" not in text(findings, "length")
    assert "garbled" in text(judge(series(rng, **blown, entropy=(lambda t: 0.3 + t, 0.01))), "length")


def test_gradient_spikes_are_found_at_their_steps(rng):
    data = series(rng, grad=(lambda t: 0.4 - 0.2 * t, 0.05))
    assert "gradient" not in found(judge(data))
    for step in (41, 77):
        data["update/grad_norm"][1][step - 1] = 9.0
    assert text(judge(data), "gradient").startswith("at step 41, 77: up to ")


def test_verifier_and_sampling(rng):
    assert found(judge(series(rng, error=(lambda t: 0 * t, 0.0), unparsed=(lambda t: 0.05 + 0 * t, 0.01)))) == {
        "progress": "progress unknown"
    }
    findings = judge(series(rng, error=(lambda t: 0.12 * (t > 0.5), 0.0), unparsed=(lambda t: 0.1 + 0.3 * t, 0.01)))
    assert found(findings)["verifier/error"] == "verifier failing"
    assert (
        text(findings, "verifier/error")
        == "the verifier itself failed on 12 % of responses (steps 91–100; 0 % at the start)"
    )
    assert found(findings)["verifier/unparsed"] == "no answer found"
    rounds = series(rng, rounds=(lambda t: np.where(t > 0.8, 10, 2), 0.0))
    assert "sampling" not in found(judge(rounds))  # no cap is known
    assert "sampling" not in found(judge(rounds, max_rounds=12))
    assert "all 10 rounds used in 100 % of steps 91–100" in text(judge(rounds, max_rounds=10), "sampling")
    assert found(judge(series(rng, k3=(lambda t: 0.03 * t, 0.001))))["mismatch"] == "train-inference mismatch"


def test_a_fall_on_held_out_problems_needs_the_paired_test(rng):
    before = rng.random(40)
    noisy = np.clip(before + 0.1 * rng.standard_normal(40), 0, 1)
    fell = np.clip(before - 0.2 + 0.1 * rng.standard_normal(40), 0, 1)
    data = series(rng, accuracy=(lambda t: 0.2 + 0.5 * t, 0.01))
    names = found(judge(data, problems={"long": (before, fell), "id": (before, before), "ops": (fell, before)}))
    assert names == {"progress": "learning", "worse long": "worse on long"}
    kept = [f for f in judge(data, problems={"long": (before, noisy)}) if f.topic == "worse long"]
    assert all(f.numbers["p"] < 0.01 for f in kept)  # by chance, one time in two hundred


def test_few_steps_and_lacking_metrics_are_said(rng):
    short = {"accuracy/mean": (list(range(MIN_STEPS - 1)), [0.1] * (MIN_STEPS - 1))}
    assert found(judge(short)) == {"progress": "too early"}
    assert found(judge({})) == {"progress": "too early"}
    assert found(judge(series(rng, length=(lambda t: 44 + 0 * t, 2)))) == {"progress": "progress unknown"}


def test_noise_is_that_of_single_steps_whatever_the_trend(rng):
    t = np.linspace(0, 1, 2000)
    values = 5 * t + 0.1 * rng.standard_normal(2000)
    values[::100] += 50  # a few spikes do not count
    assert noise(values) == pytest.approx(0.1, rel=0.1)


def test_flat_series_are_not_judged_rising_or_falling():
    flat = {
        m: (list(range(N)), [0.5] * N) for m in ("accuracy/mean", "entropy/mean", "length/mean", "update/grad_norm")
    }
    assert found(judge(flat)) == {"progress": "stalled", "entropy": "entropy"}


def test_seeds_that_agree_share_a_sentence_and_others_are_named():
    up = Finding(
        "progress",
        "learning",
        "good",
        "accuracy {start} → {end} ({over})",
        {"start": 0.2, "end": 0.8},
        "steps 1 to 9",
        tail="still rising",
    )
    high = Finding("progress", "learning", "good", up.text, {"start": 0.4, "end": 0.9}, "steps 1 to 9", tail="near 1")
    flat = Finding("progress", "stalled", "warn", "no clear change", {})
    (both,) = combine({0: [up], 1: [high]})
    assert both.text == "accuracy 0.30 → 0.85 (steps 1 to 9), still rising in 1 of 2, near 1 in 1 of 2"
    assert both.agreement == "both seeds"
    first, second = combine({0: [up], 1: [flat], 2: [up]})
    assert (first.name, first.agreement) == ("stalled", "1 of 3 seeds: 1")
    assert (second.name, second.agreement) == ("learning", "2 of 3 seeds: 0, 2")
    assert second.text == "accuracy 0.20 → 0.80 (steps 1 to 9), still rising"
    (alone,) = combine({7: [up]})
    assert alone.agreement == ""


def test_runs_of_different_lengths_do_not_claim_each_others_steps():
    a, b = (Finding("entropy", "entropy", "plain", "({over})", {}, over) for over in ("steps 1 to 9", "steps 1 to 5"))
    (verdict,) = combine({0: [a], 1: [b]})
    assert verdict.text == "(the first and last steps of each run)"
