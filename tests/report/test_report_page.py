"""The page: its numbers are the runs' numbers, it is one file, and text from a model stays text."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
from bokeh.resources import Resources

from polarity.errors import UserError
from polarity.report import write_report
from polarity.report.curves import Panel, aggregate, lines
from polarity.report.page import render
from polarity.report.runs import load_runs, values_of

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "\u202eevil",
    "\u2028",
    "\x00\u200b",
    "a" * 1_000_000,
]


def hostile_rows():
    common = {"group": 0, "problem_id": HOSTILE[0], "prompt": HOSTILE[1], "gold": HOSTILE[2], "strategy": HOSTILE[0]}
    common |= {"response": "".join(HOSTILE), "tokens": HOSTILE, "truncated": False, "reward": 0.0, "advantage": 0.9}
    common |= {"logp_old": [-0.1, -0.2, -3.0, -0.4, -0.5, -0.6], "entropy": [0.5] * 6}
    common |= {"weight": [1.0, 2.0, 1.0, 1.0, 0.5, 1.0]}
    return [common | {"correct": c, "status": "correct" if c else "wrong"} for c in (True, False)]


def inflate(page, name):
    block = re.search(rf'<script type="application/octet-stream" id="{name}">([^<]*)</script>', page)
    return gzip.decompress(base64.b64decode(block[1])).decode()


def unpack(page, name):
    return json.loads(inflate(page, name))


@pytest.fixture
def comparison(tmp_path, make_run):
    for i, method in enumerate(("dapo", "psr")):
        for seed in (0, 1, 2):
            rate = {"id": 0.9 - 0.2 * i + 0.1 * (seed == 2), "long": 0.5}
            make_run(tmp_path / method / f"seed_{seed}", method, seed, pass1=rate)
    return tmp_path


def test_a_page_is_one_small_file_that_loads_nothing(comparison):
    page = write_report([comparison], comparison / "report.html").read_text()
    assert len(page) < 2_000_000
    assert "default-src 'none'" in page
    assert inflate(page, "bokeh") == Resources(mode="inline", components=["bokeh"]).js_raw[0]
    for loads in (
        r"<[^>]+\s(src|href)\s*=\s*[\"'](?!#)",
        r"@import",
        r"url\(",
        r"\bfetch\(",
        r"XMLHttpRequest",
        r"https?:",
    ):
        assert not re.search(loads, page), loads
    assert "connect-src" not in page
    live = render(load_runs([comparison]), live=True, revision="7")
    assert "connect-src 'self'" in live
    assert 'data-revision="7"' in live


def test_the_table_shows_the_mean_over_seeds_and_the_difference(comparison):
    page = write_report([comparison], comparison / "report.html").read_text()
    results = page[page.index('<section id="results">') : page.index('id="learning"')]
    assert "0.933" in results  # dapo: mean of 0.9, 0.9, 1.0
    assert "0.733" in results
    assert "Δ -0.200" in results
    assert "paired over 3 seeds" in results


def test_curves_hold_the_mean_and_the_range_over_seeds(comparison):
    runs = load_runs([comparison])
    got = aggregate(values_of(run, "accuracy/mean") for run in runs.of("psr"))
    per_seed = np.array([values_of(run, "accuracy/mean")[1] for run in runs.of("psr")])
    np.testing.assert_allclose(got["mean"], per_seed.mean(0), rtol=1e-6)
    np.testing.assert_allclose(got["low"], per_seed.min(0), rtol=1e-6)
    np.testing.assert_allclose(got["high"], per_seed.max(0), rtol=1e-6)
    assert list(aggregate(values_of(run, "eval/id/pass@1") for run in runs.of("psr"))["step"]) == [0, 20]
    page = write_report([comparison], comparison / "report.html").read_text()
    figures = unpack(page, "figures")
    drawn = [int(number) for number in re.findall(r'data-figure="(\d+)"', page)]
    assert drawn == [i for i, data in enumerate(figures["figures"]) if data]
    assert len(figures["figures"]) == len(drawn) + page.count('class="none"')
    step, mean, low, high = next(data for data in figures["figures"] if data)["lines"]["psr"]  # train accuracy
    assert step == list(range(1, 21))
    for shown, want in ((mean, per_seed.mean(0)), (low, per_seed.min(0)), (high, per_seed.max(0))):
        np.testing.assert_allclose(shown, want, rtol=5e-4)


def test_small_changes_of_large_numbers_stay_visible(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ratios = [1 + 1e-5 * row["step"] ** 0.5 for row in rows[1:]]
    rows = [rows[0], *(row | {"update/ratio": ratio} for row, ratio in zip(rows[1:], ratios, strict=True))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = next(f for f in lines(load_runs([run]), [Panel("update/ratio", "", "")])).data["lines"]["dapo"][1]
    np.testing.assert_allclose(shown, ratios, rtol=0, atol=1e-8)


def test_long_runs_are_binned_and_keep_their_extremes(tmp_path, make_run):
    run = make_run(tmp_path / "long", steps=1000)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[500]["accuracy/mean"] = 7.0
    rows[501]["accuracy/mean"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = aggregate(values_of(run, "accuracy/mean") for run in load_runs([run]).runs)
    assert len(got["step"]) <= 400
    assert got["high"].max() == 7.0
    assert np.isfinite(got["mean"]).all()


def test_text_from_a_model_cannot_leave_its_place(tmp_path, make_run):
    run = make_run(tmp_path / "run", method="<b>dapo</b>", rows=hostile_rows())
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "hacked" not in page  # packed, so not even there as text
    assert "<b>dapo</b>" not in page
    assert "&lt;b&gt;dapo&lt;/b&gt;" in page
    samples = unpack(page, "samples-0")
    assert samples["vocabulary"][:5] == HOSTILE[:5]
    assert len(page) < 1_000_000


def test_runs_with_other_settings_get_their_own_name(tmp_path, make_run):
    make_run(tmp_path / "short", "a3po", 0, steps=10)
    make_run(tmp_path / "long", "a3po", 0, steps=20)
    assert load_runs([tmp_path]).labels == ["a3po (long)", "a3po (short)"]


def test_bad_paths_are_one_line_errors(tmp_path, make_run):
    with pytest.raises(UserError, match="does not exist"):
        write_report([tmp_path / "nowhere"], tmp_path / "r.html")
    with pytest.raises(UserError, match="no run at or below"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UserError, match="not among the methods: dapo"):
        write_report([make_run(tmp_path / "run")], tmp_path / "r.html", reference="grpo")
    assert not (tmp_path / "r.html").exists()


def test_a_run_without_rollouts_or_evaluations_still_has_a_page(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows[1:]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    for file in [*(run / "rollouts").iterdir(), *(run / "evaluations").iterdir()]:
        file.unlink()
    page = write_report([run], tmp_path / "report.html").read_text()
    assert 'id="evaluation"' not in page
    assert unpack(page, "samples-0")["steps"] == []
