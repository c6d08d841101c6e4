"""Which rollouts a page shows, and what of them: every number of what is shown, and a word on what is not."""

import json

import numpy as np
import pytest
from test_report_page import hostile_rows

from polarity.errors import UserError
from polarity.report.runs import load_runs
from polarity.report.samples import CHARACTERS, LEAST_TOKENS, MOST_ROWS, MOST_TOKENS, pack_samples


def packed(*paths):
    return pack_samples(load_runs(list(paths)).runs)


def only_row(sample):
    return sample["steps"][0]["groups"][0]["rows"][0]


def row(group=0, correct=True, n=10, **more):
    tokens = [f"w{i} " for i in range(n)]
    return {
        "problem_id": f"p{group}", "group": group, "prompt": "?", "response": "".join(tokens), "tokens": tokens,
        "gold": "1", "correct": correct, "status": "correct" if correct else "wrong", "reward": float(correct),
        "truncated": False, "advantage": 0.5, "logp_old": [-0.1 * (i % 9) for i in range(n)], "entropy": [0.1] * n,
        "weight": [1.0] * n, "kept": True, **more,
    }  # fmt: skip


def test_samples_keep_every_number(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    sample = packed(run)[0]
    logged = [json.loads(line) for line in (run / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    group = sample["steps"][0]["groups"][0]
    assert sum(row["correct"] for row in group["rows"]) == 2
    first, shown = logged[0], group["rows"][0]
    assert [sample["vocabulary"][t] for t in shown["t"]] == first["tokens"]
    np.testing.assert_allclose(-np.array(shown["p"]) / 100, first["logp_old"], atol=0.006)
    np.testing.assert_allclose(np.array(shown["e"]) / 1000, first["entropy"], atol=0.0006)
    np.testing.assert_allclose(np.array(shown["w"]) / 1000, first["weight"])
    assert shown["length"] == len(first["tokens"])
    assert "gap" not in shown


def test_the_samplers_probabilities_are_kept_where_they_differ(tmp_path, make_run):
    same, other = row(n=3, logp_rollout=[0.0, -0.1, -0.2]), row(n=3, logp_rollout=[-0.5, -0.1, None])
    sample = packed(make_run(tmp_path / "run", rows=[same, other]))[0]
    shown = sample["steps"][0]["groups"][0]["rows"]
    assert "d" not in shown[0]
    assert shown[1]["d"] == [50, 0, None]


def test_rows_that_are_not_trained_on_have_no_shaped_tokens(tmp_path, make_run):
    rows = [row(weight=[0.0] * 10, kept=False), row(correct=False, weight=[2.0] + [1.0] * 9)]
    shown = packed(make_run(tmp_path / "run", rows=rows))[0]["steps"][0]["groups"][0]["rows"]
    assert "w" not in shown[0]
    assert shown[0]["kept"] is False
    assert shown[1]["w"] == [2000] + [1000] * 9


def test_advantages_of_single_tokens_are_kept(tmp_path, make_run):
    shown = only_row(packed(make_run(tmp_path / "run", rows=[row(n=3, advantage=[0.5, -0.25, float("nan")])]))[0])
    assert shown["a"] == [500, -250, None]
    assert shown["advantage"] is None


def test_long_responses_keep_their_beginning_and_their_end(tmp_path, make_run):
    n = 2 * MOST_TOKENS
    rows = [row(n=n, logp_old=[float("-inf"), *(-0.001 * i for i in range(1, n))])]
    sample = packed(make_run(tmp_path / "run", rows=rows))[0]
    shown = only_row(sample)
    head = 2 * MOST_TOKENS // 3
    assert (len(shown["t"]), shown["length"], shown["gap"]) == (MOST_TOKENS, n, [head, n - MOST_TOKENS])
    words = [sample["vocabulary"][t] for t in shown["t"]]
    assert words[head - 1] == f"w{head - 1} "
    assert words[head] == f"w{n - (MOST_TOKENS - head)} "
    assert words[-1] == f"w{n - 1} "
    assert shown["p"][0] is None
    assert shown["p"][-1] == round(0.1 * (n - 1))
    assert "w" not in shown


def test_a_response_without_tokens_is_its_text_in_pieces(tmp_path, make_run):
    text = "".join(chr(97 + i % 26) for i in range(5000))
    bare = {"problem_id": "p", "group": 0, "prompt": "?", "response": text, "correct": True}
    sample = packed(make_run(tmp_path / "run", rows=[bare]))[0]
    shown = only_row(sample)
    assert "".join(sample["vocabulary"][t] for t in shown["t"]) == text
    assert (shown["characters"], shown["status"], shown["strategy"], shown["kept"]) == (5000, "correct", None, None)
    assert not shown.keys() & {"p", "e", "w", "length", "gap"}
    assert "gold" not in sample["steps"][0]["groups"][0]


def test_a_very_long_text_is_cut_with_a_word(tmp_path, make_run):
    most = MOST_TOKENS * CHARACTERS
    bare = {"problem_id": "p", "group": 0, "response": "a" * most + "b" * most, "correct": False}
    sample = packed(make_run(tmp_path / "run", rows=[bare]))[0]
    shown = only_row(sample)
    at, left_out = shown["gap"]
    before, after = ("".join(sample["vocabulary"][t] for t in part) for part in (shown["t"][:at], shown["t"][at:]))
    assert set(before) == {"a"}
    assert set(after) == {"b"}
    assert len(before) + len(after) + left_out == 2 * most
    assert len(before) + len(after) == most


def test_a_megabyte_in_one_token_stays_small(tmp_path, make_run):
    sample = packed(make_run(tmp_path / "run", rows=hostile_rows()))[0]
    assert max(map(len, sample["vocabulary"])) < 1000
    assert any("999,600 characters left out" in word for word in sample["vocabulary"])


def test_empty_responses_are_shown(tmp_path, make_run):
    shown = only_row(packed(make_run(tmp_path / "run", rows=[row(n=0)]))[0])
    assert shown["t"] == []


def test_both_polarities_are_there_however_many_of_one(tmp_path, make_run):
    rows = [row(correct=False, n=4) for _ in range(60)] + [row(n=4)]
    group = packed(make_run(tmp_path / "run", rows=rows))[0]["steps"][0]["groups"][0]
    assert len(group["rows"]) == MOST_ROWS
    assert sum(shown["correct"] for shown in group["rows"]) == 1
    assert group["of"] == 61


def test_many_runs_share_the_page_and_each_shows_every_step(tmp_path, make_run):
    rows = [row(group=g, correct=i % 2 == 0, n=2500) for g in range(4) for i in range(8)]
    for seed in range(12):
        run = make_run(tmp_path / f"dapo/seed_{seed}", seed=seed, steps=3, rows=rows)
        for step in (2, 3):
            (run / "rollouts" / f"step_{step:06d}.jsonl").write_text(
                (run / "rollouts" / "step_000001.jsonl").read_text()
            )
    samples = packed(tmp_path)
    shown = [r for s in samples for step in s["steps"] for g in step["groups"] for r in g["rows"]]
    assert [[step["step"] for step in sample["steps"]] for sample in samples] == [[1, 2, 3]] * 12
    assert sum(len(r["t"]) for r in shown) < 500_000
    assert min(len(r["t"]) for r in shown) >= LEAST_TOKENS
    assert all(
        len({r["correct"] for r in g["rows"]}) == 2 for s in samples for step in s["steps"] for g in step["groups"]
    )
    assert "the run directory has more" in samples[0]["note"]


def test_rollouts_are_read_only_as_far_as_they_are_shown(tmp_path, make_run):
    rows = [row(group=g, correct=i % 2 == 0, n=3000) for g in range(40) for i in range(4)]
    run = make_run(tmp_path / "run", steps=1, rows=rows)
    file = run / "rollouts" / "step_000001.jsonl"
    file.write_text(file.read_text()[:-100])  # the last row cannot be read, and is not needed
    assert packed(run)[0]["steps"][0]["groups"][0]["of"] == 4


def test_a_line_that_is_no_json_is_named(tmp_path, make_run):
    run = make_run(tmp_path / "run", rows=[row()])
    file = run / "rollouts" / "step_000001.jsonl"
    file.write_text(file.read_text() + '{"group": 1, "resp\n')
    with pytest.raises(UserError, match=r"step_000001\.jsonl line 2 is no JSON"):
        packed(run)
