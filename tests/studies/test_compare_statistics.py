"""Intervals and tests against SciPy and against numbers worked out by hand, with the unit named."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from polarity.analysis import pass_at_k
from polarity.report.runs import load_runs
from polarity.report.summary import END_STEPS, estimate, markdown, summarise


def test_interval_by_hand():
    # mean 2, standard deviation 1, n 3: half width t(0.975, 2) / sqrt(3) = 4.302653 / 1.732051
    got = estimate([1.0, 2.0, 3.0], "seeds")
    assert (got.mean, got.n, got.p) == (2.0, 3, None)
    assert got.high - got.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert got.mean - got.low == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_test_on_differences_is_the_paired_t_test():
    a, b = np.array([0.3, 0.5, 0.9, 0.7]), np.array([0.2, 0.1, 0.8, 0.75])
    got = estimate(list(a - b), "seeds", test=True)
    assert got.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(("values", "p"), [([0.0, 0.0, 0.0], 1.0), ([0.1, 0.1, 0.1], None)])
def test_equal_differences_have_no_t_test(values, p):
    assert estimate(values, "seeds", test=True).p == p


def test_one_value_has_no_interval():
    got = estimate([0.4], "seeds", test=True)
    assert (got.mean, got.low, got.high, got.p) == (0.4, None, None, None)


@pytest.fixture
def three_seeds(tmp_path, make_run):
    rates = {"dapo": (0.8, 0.9, 0.7), "psr": (0.6, 0.8, 0.6)}
    for method, by_seed in rates.items():
        for seed, rate in enumerate(by_seed):
            make_run(tmp_path / method / f"seed_{seed}", method, seed, pass1={"id": rate, "long": 0.5})
    return tmp_path


def test_with_seeds_the_unit_is_the_seed(three_seeds):
    summary = summarise(load_runs([three_seeds]))
    assert summary["reference"] == "dapo"
    cell = summary["results"]["psr"]["eval/id/pass@1"]
    assert (cell["unit"], cell["n"], cell["values"]) == ("seeds", 3, {"0": 0.6, "1": 0.8, "2": 0.6})
    difference = cell["difference"]
    assert difference["mean"] == pytest.approx(-0.4 / 3)
    assert difference["p"] == pytest.approx(stats.ttest_rel([0.6, 0.8, 0.6], [0.8, 0.9, 0.7]).pvalue)
    assert summary["results"]["dapo"]["eval/id/pass@1"]["difference"] is None
    assert summary["base"]["eval/id/pass@1"] == pytest.approx(0.3)
    assert "over seeds" in markdown(summary)


def test_end_of_training_is_the_mean_of_the_last_steps(three_seeds):
    run = load_runs([three_seeds]).of("dapo")[0]
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    expected = np.mean([row["entropy/mean"] for row in rows[-END_STEPS:]])
    cell = summarise(load_runs([three_seeds]))["results"]["dapo"]["end/entropy/mean"]
    assert cell["values"]["0"] == pytest.approx(expected)


def test_with_one_seed_the_unit_is_the_problem(tmp_path, make_run):
    for method in ("dapo", "nsr"):
        make_run(tmp_path / method / "seed_0", method, 0)
    right = {"dapo": [9, 5, 7, 1], "nsr": [6, 5, 2, 1]}  # correct of 10 for each problem
    for method, counts in right.items():
        file = tmp_path / method / "seed_0" / "evaluations" / "step_000020.json"
        content = json.loads(file.read_text())
        rows = [{"problem_id": f"id-{i}", "correct": [j < c for j in range(10)]} for i, c in enumerate(counts)]
        content["samples"]["id"] = rows[::-1] if method == "nsr" else rows  # pairs are made by id, not by place
        file.write_text(json.dumps(content))
    summary = summarise(load_runs([tmp_path]))
    cell = summary["results"]["nsr"]["eval/id/pass@1"]
    assert (cell["unit"], cell["n"]) == ("problems", 4)
    a, b = np.array(right["nsr"]) / 10, np.array(right["dapo"]) / 10
    assert cell["difference"]["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    at8 = [pass_at_k(10, c, 8) for c in right["nsr"]]
    assert summary["results"]["nsr"]["eval/id/pass@8"]["mean"] == pytest.approx(np.mean(at8))
    assert summary["results"]["nsr"]["end/entropy/mean"]["low"] is None  # steps of one run are no sample
    assert "over evaluation problems" in markdown(summary)


def test_methods_are_paired_by_the_seeds_they_share(tmp_path, make_run):
    for seed, rate in enumerate((0.5, 0.7, 0.9)):
        make_run(tmp_path / "dapo" / f"seed_{seed}", "dapo", seed, pass1={"id": rate, "long": 0.5})
    for seed, rate in ((1, 0.8), (2, 0.9)):
        make_run(tmp_path / "nsr" / f"seed_{seed}", "nsr", seed, pass1={"id": rate, "long": 0.5})
    difference = summarise(load_runs([tmp_path]))["results"]["nsr"]["eval/id/pass@1"]["difference"]
    assert (difference["n"], difference["mean"]) == (2, pytest.approx(0.05))


def test_a_run_that_stopped_early_is_left_out_and_named(three_seeds, make_run):
    make_run(three_seeds / "psr" / "seed_3", "psr", 3, steps=20, done=7)
    summary = summarise(load_runs([three_seeds]))
    assert summary["seeds"]["psr"] == [0, 1, 2]
    assert any("psr seed 3 is at step 7 of 20" in note for note in summary["notes"])
