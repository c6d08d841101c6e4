"""The sections of a page against their definitions, on runs with every metric, and on runs that lack some."""

import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from polarity.analysis.attribution import CELLS
from polarity.analysis.patterns import PATTERNS, accuracy_pattern
from polarity.report.attribution import LINES, PARTS, attribution_section, contributions, totals
from polarity.report.flow import LOOKS, flow_section
from polarity.report.overview import glance, notes
from polarity.report.page import _sections, render
from polarity.report.panels import sections
from polarity.report.runs import load_runs
from polarity.report.text import visible

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("report_benchmark", ROOT / "benchmarks" / "report.py")
report_benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report_benchmark)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two methods x two seeds x 20 steps, every metric."""
    folder = tmp_path_factory.mktemp("grid")
    for method in ("dapo", "psr"):
        for seed in (0, 1):
            report_benchmark.make_run(folder / method / f"seed_{seed}", method, seed, 20)
    return folder


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without(run, *parts):
    """Take the metrics away whose names hold one of `parts`."""
    kept = [{k: v for k, v in row.items() if not any(part in k for part in parts)} for row in rows_of(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_a_run_with_every_metric_has_every_section_and_none_of_it_twice(grid):
    runs = load_runs([grid])
    anchors = [section.anchor for section in _sections(runs)]
    middle = ["patterns", "polarity", "sharpening", "difficulty", "attribution", "mismatch"]
    assert anchors == ["learning", "evaluation", *middle, "update"]
    blocks = [block for section in sections(runs) for block in section.blocks]
    drawn = [figure for block in blocks for figure in block.figures if figure.data]
    by_name = {name for run in runs.runs for name in run.columns if name != "step" and not name.startswith("eval/")}
    training = [name for name in by_name if not name.startswith("attribution/")]
    evaluated = {name for run in runs.runs for e in run.evaluations.values() for s in e.values() for name in s}
    splits, pass_at_k, same_as_accuracy = 5, 5, 1
    assert len(drawn) == len(training) - same_as_accuracy + splits * len(evaluated) + pass_at_k


def test_every_documented_metric_has_a_panel(grid):
    """The made-up runs have all names of docs/metrics.md, and none of them is left to "Other metrics"."""
    documented = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    have = {name for row in rows_of(grid / "dapo" / "seed_0") for name in row}
    stands_for = {
        "POLARITY": "(positive|negative)",
        "BAND": "(unsolved|hard|easy|solved)",
        "SPLIT": r"\w+",
        "@K": r"@\d+",
    }
    for name in documented:
        pattern = re.escape(name)
        for word, values in stands_for.items():
            pattern = pattern.replace(word, values)
        assert any(re.fullmatch(pattern, own) for own in have), name
    assert "other" not in {section.anchor for section in sections(load_runs([grid]))}


def test_a_metric_that_no_panel_names_is_shown_under_its_own(grid, tmp_path, make_run):
    run = make_run(tmp_path / "run")
    rows = [row | {"mine/number": 3.5} for row in rows_of(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = next(section for section in sections(load_runs([run])) if section.anchor == "other")
    assert [figure.title for figure in other.blocks[0].figures] == ["mine/number"]


def test_sections_say_which_methods_and_runs_lack_their_numbers(tmp_path):
    for method in ("dapo", "psr", "nsr"):
        for seed in (0, 1):
            report_benchmark.make_run(tmp_path / method / f"seed_{seed}", method, seed, 10)
    for seed in (0, 1):
        without(tmp_path / f"psr/seed_{seed}", "mismatch", "attribution", "sharpening")
    without(tmp_path / "nsr/seed_1", "mismatch", "attribution")
    parts = {section.anchor: section for section in _sections(load_runs([tmp_path]))}
    assert parts["mismatch"].lacks == ("nsr seed 1", "psr")
    assert parts["attribution"].lacks == ("psr",)
    assert parts["learning"].lacks == ()
    page = render(load_runs([tmp_path]))
    assert page.count("no values: nsr seed 1, psr") == 1  # once, not under each of the section's figures
    for seed in (0, 1):
        without(tmp_path / f"nsr/seed_{seed}", "positive/", "attribution/positive")
    assert attribution_section(load_runs([tmp_path])).lacks == ("psr",)  # nsr has a prediction, of fewer parts
    figures = {figure.title: figure.lacks for figure in parts["sharpening"].blocks[0].figures}
    assert figures["Sharpening, 3-grams"] == ("psr",)
    assert figures["Discovery, 3-grams"] == ()


def test_sections_without_any_number_are_left_out(tmp_path, make_run):
    page = render(load_runs([make_run(tmp_path / "run")]))
    ids = re.findall(r'<section id="(\w+)">', page)
    assert ids == ["overview", "results", "learning", "evaluation", "patterns", "polarity", "update", "rollouts"]


def test_the_flow_counts_the_problems_of_the_records(grid):
    runs = load_runs([grid])
    section = flow_section(runs)
    assert section.extra["splits"] == ["all splits", *report_benchmark.SPLITS]
    flow = section.blocks[0].figures[0].data["splits"]["long"]
    own = runs.of("dapo")
    steps = sorted(own[0].records)
    paths = []
    for run in own:
        for i in range(32):
            rates = [np.mean(run.records[step]["samples"]["long"][i]["correct"]) for step in steps]
            paths.append([accuracy_pattern(rates[: e + 1]) for e in range(len(steps))])
    names = list(LOOKS)
    assert (flow["steps"], flow["problems"], flow["seeds"], flow["left_out"]) == (steps, 64, 2, 0)
    for column in range(len(steps)):
        counts = {pattern: sum(path[column] == pattern for path in paths) for pattern in PATTERNS}
        assert {names[p]: count for c, p, _, _, count in flow["nodes"] if c == column} == {
            pattern: count for pattern, count in counts.items() if count
        }
    moves = {(c, names[a], names[b]): count for c, a, b, *_, count in flow["ribbons"]}
    for column in range(len(steps) - 1):
        for a in PATTERNS:
            for b in PATTERNS:
                want = sum(path[column] == a and path[column + 1] == b for path in paths)
                assert moves.get((column, a, b), 0) == want


def test_ribbons_fill_the_columns_they_join(grid):
    for figure in flow_section(load_runs([grid])).blocks[0].figures:
        for flow in figure.data["splits"].values():
            for column, pattern, bottom, top, count in flow["nodes"]:
                assert top - bottom == count
                leaving = sorted(r[3:5] for r in flow["ribbons"] if r[:2] == [column, pattern])
                coming = sorted(r[5:7] for r in flow["ribbons"] if [r[0] + 1, r[2]] == [column, pattern])
                for part in (leaving, coming):
                    if part:  # not at the first or the last column
                        assert [part[0][0], part[-1][1]] == [bottom, top]
                        assert all(low[1] == high[0] for low, high in pairwise(part))


def test_every_pattern_and_every_cell_has_its_look():
    assert set(LOOKS) == set(PATTERNS)
    assert {f"attribution/{name}" for name in PARTS} - set(CELLS) == {
        f"attribution/{name}" for name in ("regularizer", "momentum", "rest")
    }
    assert set(CELLS) <= {f"attribution/{name}" for name in PARTS}


def test_problems_that_are_not_in_every_evaluation_are_left_out_and_counted(grid, tmp_path):
    run = report_benchmark.make_run(tmp_path / "run", "dapo", 0, 20)
    file = run / "evaluations" / "step_000010.json"
    record = json.loads(file.read_text())
    del record["samples"]["id"][:5]
    file.write_text(json.dumps(record))
    flow = flow_section(load_runs([run])).blocks[0].figures[0].data["splits"]["id"]
    assert (flow["problems"], flow["left_out"]) == (27, 5)


def test_attribution_is_stacked_from_zero_and_sums_to_the_prediction(grid):
    runs = load_runs([grid])
    section = attribution_section(runs)
    data = section.blocks[0].figures[1].data
    table = contributions(runs.of("psr"))
    up = sum(np.maximum(table[name], 0) for name in PARTS)
    down = sum(np.minimum(table[name], 0) for name in PARTS)
    tops = np.max([[max(pair) for pair in zip(*data["parts"][name], strict=True)] for name in PARTS], axis=0)
    bottoms = np.min([[min(pair) for pair in zip(*data["parts"][name], strict=True)] for name in PARTS], axis=0)
    np.testing.assert_allclose(tops, up, rtol=2e-3)
    np.testing.assert_allclose(bottoms, down, rtol=2e-3)
    np.testing.assert_allclose(up + down, table["predicted"], atol=1e-12)
    sums = section.extra["totals"]["psr"]
    own = [[row[f"attribution/{name}"] for name in LINES] for run in runs.of("psr") for row in run.metrics]
    np.testing.assert_allclose([sums[name] for name in LINES], np.sum(own, axis=0) / 2)
    low, high = data["scale"]
    assert low < down.min()
    assert high > up.max()


def test_attribution_without_measured_changes_still_has_its_bars(tmp_path):
    run = report_benchmark.make_run(tmp_path / "run", "dapo", 0, 12)
    rows = rows_of(run)
    for row in rows[1:]:
        if row["step"] not in (1, 10, 12):
            for name in [name for name in row if name.startswith("attribution/")]:
                del row[name]
        row.pop("attribution/measured", None)
        row.pop("attribution/rest", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = load_runs([run])
    table = contributions(runs.runs)
    assert list(table["step"]) == [1, 10, 12]
    assert totals(table)["correlation"] is None
    data = attribution_section(runs).blocks[0].figures[0].data
    left, right = data["edges"]
    assert all(a < step < b for a, step, b in zip(left, (1, 10, 12), right, strict=True))
    assert all(a < b for a, b in zip(right, left[1:], strict=False))  # bars do not overlap
    assert data["bars"]["measured"] == [None] * 3
    assert len(render(runs)) > 0


def test_the_overview_has_a_verdict_for_each_method(grid):
    row = glance(load_runs([grid]).of("psr"))
    names = [verdict.name for verdict in row["verdicts"]]
    assert names[0] == "learning"
    assert "entropy collapsed" in names
    assert row["verdicts"][0].agreement == "both seeds"
    assert row["missing"] == []
    page = render(load_runs([grid]))
    assert "entropy collapsed" in page
    assert "both seeds" in page


def converted_run(path):
    """A run as report/foreign makes it of another trainer's rollouts: few metrics, no tokens."""
    path.mkdir()
    config = {
        "method": {"name": "their_run"},
        "length_unit": "words",
        "notes": ["no entropies in the source", "a \u202e note"],
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": s, "accuracy/mean": 0.2 + 0.05 * s, "reward/mean": 0.1, "length/mean": 40.0} for s in range(1, 12)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rollouts").mkdir()
    shared = {"step": 1, "problem_id": "p", "group": 0, "prompt": "1+1?"}
    bare = [shared | {"response": f"answer {i}", "correct": i == 0, "reward": 1.0 * (i == 0)} for i in range(3)]
    (path / "rollouts" / "step_000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    return path


def test_a_converted_run_shows_what_it_has_and_says_what_it_lacks(tmp_path):
    runs = load_runs([converted_run(tmp_path / "run")])
    assert notes(runs) == {"no entropies in the source": ["their_run seed 0"], "a \u202e note": ["their_run seed 0"]}
    page = render(runs)
    assert "no entropies in the source" in page
    assert "a ⟨202E⟩ note" in page
    assert "Not logged, so not judged: entropy, truncation, gradient norm, verifier, train-inference mismatch" in page
    assert "learning" in glance(runs.runs)["verdicts"][0].name
    assert "length (words)" in page
    lengths = [f.about for s in sections(runs) for b in s.blocks for f in b.figures if f.title == "Response length"]
    assert lengths == ["words"]


def test_unseen_characters_show_their_codes():
    assert visible("a\u202eb\u200bc\x00\ufeffd") == "a⟨202E⟩b⟨200B⟩c⟨0000⟩⟨FEFF⟩d"
    plain = "Ünïcode, 漢字, עברית\tand\nlines"
    assert visible(plain) == plain
