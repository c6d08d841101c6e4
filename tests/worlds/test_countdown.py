import hashlib
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polarity.worlds.countdown import (
    GUESSABLE,
    LARGE_TARGETS,
    LARGEST,
    TARGETS,
    Countdown,
    Trace,
    read_claim,
    read_trace,
    solves,
)
from polarity.worlds.countdown_search import Habits, Searcher, Step, held_out, play_out, reach, value

WORLD = Countdown()
GOLD = "24 from 3 7 8 2"


def given(row):
    target, numbers = row["answer"].split(" from ")
    return tuple(map(int, numbers.split())), int(target)


def solve(numbers, target, rng):
    while True:
        steps = play_out(numbers, rng)
        if solves(steps, numbers, target):
            return steps


def claim(steps):
    return "[" + ",".join(f" {s.a} {s.op} {s.b} = {s.c}" for s in steps) + "]"


# --- tokenizer


def test_every_document_survives_the_tokenizer():
    tokenizer, rng = WORLD.tokenizer(), random.Random(0)
    assert len(tokenizer) < 80
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for i in range(300):
        document = WORLD.document("search", rng, i / 300)
        text = document.prompt + document.response
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert len(ids) < WORLD.bases["search"].longest


def test_any_sequence_of_symbols_is_read_back_as_it_was_written():
    tokenizer, rng = WORLD.tokenizer(), random.Random(1)
    ordinary = sorted(set(range(len(tokenizer))) - {tokenizer.pad_token_id, tokenizer.eos_token_id, 2})
    for _ in range(200):
        ids = [rng.choice(ordinary) for _ in range(30)]
        assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids


def test_prompt_and_response_are_tokenized_apart_as_together():
    tokenizer, document = WORLD.tokenizer(), WORLD.document("search", random.Random(2), 1.0)
    together, prompt, response = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (document.prompt + document.response, document.prompt, document.response)
    )
    assert together == prompt + response


# --- problems


@pytest.mark.parametrize("split", WORLD.splits)
def test_problems_are_distinct_solvable_and_as_their_split_says(split):
    rows = WORLD.problems(split, 60)
    assert len({row["problem"] for row in rows}) == 60
    for row in rows:
        numbers, target = given(row)
        assert row["problem"] == "".join(f" {n}" for n in numbers) + f" > {target}:"
        assert all(1 <= n <= LARGEST for n in numbers)
        assert len(numbers) in ((5,) if split == "more" else (3, 4))
        assert target in (LARGE_TARGETS if split == "large" else TARGETS)
        assert held_out(numbers) == (split == "numbers")
        if split != "more":
            board = tuple(sorted(numbers))
            assert (target in reach(board, "+-*")) == (split != "divide")
            assert 0 < reach(board)[target] <= GUESSABLE


def test_problems_of_five_numbers_are_solvable():
    for row in WORLD.problems("more", 3):
        numbers, target = given(row)
        assert target in reach(tuple(sorted(numbers)))


def test_pretraining_never_shows_a_held_out_set_of_numbers():
    rng = random.Random(3)
    for _ in range(500):
        numbers = [int(n) for n in WORLD.document("search", rng, 1.0).prompt.split(">")[0].split()]
        assert len(numbers) == 2 or not held_out(numbers)


def test_reach_is_the_share_of_random_play_outs():
    rng, board = random.Random(4), (2, 3, 7)
    shares = reach(board)
    ends = [play_out(board, rng)[-1].c for _ in range(20_000)]
    assert sum(shares.values()) == pytest.approx(1)
    for target, share in shares.items():
        assert ends.count(target) / len(ends) == pytest.approx(share, abs=0.015)


def test_problems_and_documents_are_the_same_everywhere():
    rng = random.Random(5)
    documents = [WORLD.document("search", rng, i / 50) for i in range(50)]
    made = [[WORLD.problems(split, 20) for split in WORLD.splits], [(d.prompt, d.response) for d in documents]]
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16] == "f2c3b9c433bcb140"


def test_an_early_curriculum_is_short():
    def mean_numbers(progress):
        rng = random.Random(6)
        return sum(WORLD.document("search", rng, progress).prompt.count(" ") - 2 for _ in range(400)) / 400

    assert mean_numbers(0.0) + 0.5 < mean_numbers(1.0)


# --- verifier


def test_a_right_claim_is_correct_however_it_is_found():
    rng = random.Random(7)
    for split in ("id", "divide", "large", "numbers"):
        for row in WORLD.problems(split, 10):
            outcome = WORLD.verify(claim(solve(*given(row), rng)), row["answer"], row=row)
            assert (outcome.correct, outcome.status, outcome.score) == (True, "correct", 1.0)
            assert outcome.strategy == "guess"


def test_different_solutions_are_all_correct():
    for steps in ("[ 7 - 2 = 5, 8 - 5 = 3, 3 + 3 = 6]", "[ 8 - 7 = 1, 3 + 1 = 4, 4 + 2 = 6]"):
        outcome = WORLD.verify(steps, "6 from 3 7 8 2")
        assert outcome.correct
        assert outcome.extracted == steps[2:-1]


@pytest.mark.parametrize(
    ("response", "status"),
    [
        ("", "unparsed"),
        ("?", "unparsed"),
        ("24", "unparsed"),
        ("[]", "unparsed"),
        ("[ 24]", "unparsed"),
        ("]" * 100_000, "unparsed"),
        ("[" * 100_000 + "]", "unparsed"),
        (" 9" * 100_000, "unparsed"),
        (" 3 + 7 = 10," * 20_000, "unparsed"),
        ("[ 3 + 7 = " + "9" * 100_000 + "]", "unparsed"),
        ("[ 3 + 7 = \N{ARABIC-INDIC DIGIT ONE}0]", "unparsed"),
        ("\N{SNOWMAN}\x00\n\ud800[", "unparsed"),
        ("[ 3 * 8 = 24] 24", "unparsed"),
        ("[ 3 * 8 = 24]", "wrong"),  # not all numbers
        ("[ 3 * 8 = 24, 24 + 7 = 31, 31 - 7 = 24]", "wrong"),  # 7 twice, 2 not at all
        ("[ 7 / 0 = 7, 7 * 2 = 14, 14 + 3 = 17]", "wrong"),
        ("[ 7 / 2 = 3, 3 * 8 = 24, 24 - 3 = 21]", "wrong"),  # not an exact division
        ("[ 3 - 7 = 4, 4 + 8 = 12, 12 * 2 = 24]", "wrong"),  # the sign
        ("[ 3 + 7 = 10, 10 + 8 = 18, 18 + 2 = 24]", "wrong"),  # the last equation does not hold
        ("[ 3 + 7 = 10, 10 + 8 = 18, 18 - 2 = 16]", "wrong"),  # another number
        ("[ 8 + 7 = 15, 15 - 3 = 12, 12 * 2 = 24, 24 * 1 = 24]", "wrong"),  # a number from nowhere
        ("[ 8 + 7 = 15, 15 - 3 = 12, 12 * 2 = 24][ 3 * 8 = 24]", "wrong"),  # the last claim counts
        ("[ 3 * 8 = 24]< 3 7 8 2;[ 8 + 7 = 15, 15 - 3 = 12, 12 * 2 = 24]", "correct"),
        ("[8+7=15,15-3=12,12*2=24]", "correct"),
    ],
)
def test_verdicts(response, status):
    outcome = WORLD.verify(response, GOLD)
    assert outcome.status == status
    assert outcome.correct == (status == "correct")
    assert outcome.score == float(outcome.correct)
    assert (outcome.extracted is None) == (status == "unparsed")


def test_random_text_never_raises():
    rng = random.Random(8)
    symbols = [f" {n}" for n in (1, 2, 3, 7, 8, 24)] + [f" {s}" for s in "+-*/=>"] + list(":;,<[]?") + ["x", "\n"]
    for _ in range(2000):
        response = "".join(rng.choice(symbols) for _ in range(rng.randint(0, 40)))
        assert not WORLD.verify(response, GOLD).correct


def test_value_stays_exact_and_positive():
    assert [value(7, op, 7) for op in "+-*/"] == [14, None, 49, 1]
    assert [value(7, "/", 2), value(7, "/", 0), value(2, "-", 7)] == [None, None, None]


# --- searches


def search(strategy, rng, **habits):
    row = WORLD.problem("id", rng)
    numbers, target = given(row)
    settings = {"insight": 0.5, "lookahead": 0.5, "careful": True, "budget": 120, **habits}
    searcher = Searcher(numbers, target, solve(numbers, target, rng), Habits(strategy, **settings), rng)
    return row, searcher.response()


@pytest.mark.parametrize("strategy", ["depth", "breadth", "backward", "guess"])
def test_a_strategy_is_recognised_from_its_text(strategy):
    rng = random.Random(9)
    for _ in range(150):
        row, response = search(strategy, rng)
        found = WORLD.verify(response, row["answer"]).strategy
        assert found == strategy or (strategy == "depth" and found == "straight")


def test_a_cut_off_search_keeps_its_strategy():
    rng = random.Random(10)
    for _ in range(50):
        row, response = search("backward", rng)
        cut = response[: rng.randint(30, len(response))]
        assert WORLD.verify(cut, row["answer"]).strategy == "backward"


def test_straight_and_mixed_and_garbled():
    assert WORLD.verify(" 8 + 7 = 15 3 2; 15 - 3 = 12 2; * 24[ 8 + 7 = 15]", GOLD).strategy == "straight"
    assert WORLD.verify(" > 24 / 2 = 12 3 7 8; 8 + 7 = 15 3; - 12[ 8 + 7 = 15]", GOLD).strategy == "mixed"
    for text in ("hello", " 8 + + 7;", " 8 + 7 = 15 3 2; :", "[ 8 + 7 = 15]]", "?x"):
        assert WORLD.verify(text, GOLD).strategy == "garbled"


def test_a_trace_counts_its_pieces():
    text = (
        " 3 + 7 = 10, 8 - 2 = 6, 3 + 7 = 10 8 2; 10 + 8 = 18 2; + 20 - 16< 10 8 2; 10 - 8 = 2 2; / 1<; > 24 - 3 = 21 7"
    )
    assert read_trace(text) == Trace(enters=3, looks=2, misses=3, backs=2)
    assert read_trace(text + " 8 2;?") == Trace(enters=3, subgoals=1, looks=2, misses=3, backs=2)


@pytest.mark.parametrize("strategy", ["depth", "breadth", "backward"])
def test_a_faultless_search_claims_only_what_holds(strategy):
    rng, faultless = random.Random(11), {"slip": 0.0, "wishful": 0.0, "skip": 0.0, "dull": 0.0}
    claimed = 0
    for _ in range(60):
        row, response = search(strategy, rng, **faultless)
        if "?" not in response:
            claimed += 1
            assert WORLD.verify(response, row["answer"]).correct
    assert claimed > 10


def test_a_careful_writer_withdraws_a_claim_that_does_not_hold():
    rng, careless = random.Random(12), {"wishful": 1.0, "slip": 0.0, "lookahead": 0.0}
    row, response = search("depth", rng, careful=True, **careless)
    assert read_trace(response).claims > 1
    row, response = search("depth", rng, careful=False, **careless)
    assert read_trace(response).claims == 1
    assert WORLD.verify(response, row["answer"]).status in ("wrong", "correct")


def test_read_claim():
    assert read_claim("x[ 3 + 7 = 10, 10 * 2 = 20] ") == [Step(3, "+", 7, 10), Step(10, "*", 2, 20)]
    assert read_claim("[ 3 + 7 = 10") is None


# --- the shipped base


def test_the_shipped_base_reads_this_tokenizer_and_searches():
    directory = WORLD.base_path("search")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert tokenizer.get_vocab() == WORLD.tokenizer().get_vocab()
    torch.manual_seed(0)
    row = WORLD.problems("numbers", 1)[0]
    prompt = tokenizer(row["problem"], add_special_tokens=False, return_tensors="pt")["input_ids"].expand(32, -1)
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=180)
    responses = tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
    strategies = [WORLD.verify(response, row["answer"]).strategy for response in responses]
    assert strategies.count("garbled") <= 4
    assert {"depth", "backward"} <= set(strategies)
