"""The ledger world: its text is exact, its verifier reads what its writer wrote, its splits are what they say."""

import hashlib
import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polarity.errors import UserError
from polarity.worlds import WORLDS, resolve_world
from polarity.worlds.ledger import (
    FACTS,
    GENERAL,
    LABELS,
    MIXTURES,
    NUMERALS,
    Difficulty,
    read_terms,
    read_trace,
    strategy,
    totals,
    write_answer,
    write_prompt,
    write_trace,
)

LEDGER = WORLDS["ledger"]

# A writer that makes no mistakes; each test says how it orders its steps.
FAULTLESS = replace(
    GENERAL,
    facts=(Difficulty(1.0, 1.0, 0.0),),
    skip=0.0,
    terse_slip=0.0,
    total_slip=0.0,
    check_keeps=1.0,
    redo=0.0,
    terse=((0.0, 1.0),),
    checks=((0.0, 1.0),),
)


def test_tokenizer_inverts_itself_on_problems_and_documents():
    tokenizer, rng = LEDGER.tokenizer(), random.Random(0)
    texts = [LEDGER.problem(split, rng)["problem"] for split in LEDGER.splits for _ in range(20)]
    for base in LEDGER.bases:
        documents = [LEDGER.document(base, rng, progress) for progress in (0.0, 1.0) for _ in range(50)]
        texts += [d.prompt for d in documents] + [d.response for d in documents]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2
    assert tokenizer(" A7*6?", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(
        [" A", "7", "*", "6", "?"]
    )


def test_what_is_not_in_the_vocabulary_stays_visible_to_the_verifier():
    tokenizer = LEDGER.tokenizer()
    ids = tokenizer("[é]", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "[\N{REPLACEMENT CHARACTER}]"


def test_the_worked_example_of_the_docstring():
    # 7*6 = 42 = 9, 5-2 = 3, 0+10 = 10 (mod 11): T = 22 = 0, Q = 81 + 9 + 100 = 190 = 3
    row = {"problem": " A7*6 B5-2 C0+X?"}
    assert totals(read_terms(row["problem"])) == (0, 3)
    outcome = LEDGER.verify(" A7*6=994 B5-2=312 C=X03[03]", "[03]", row)
    assert (outcome.correct, outcome.status, outcome.score) == (True, "correct", 1.0)
    assert (outcome.extracted, outcome.strategy) == ("[03]", "forward")


@pytest.mark.parametrize(
    ("order", "changes", "name"),
    [
        ("forward", {}, "forward"),
        ("backward", {"checks": ((1.0, 1.0),)}, "backward+check"),
        ("forward", {"terse": ((1.0, 1.0),)}, "forward+terse"),
        ("backward", {"redo": 1.0}, "backward+redo"),
        ("random", {"terse": ((1.0, 1.0),), "checks": ((1.0, 1.0),), "redo": 1.0}, "other+terse+check+redo"),
        ("direct", {"direct_true": 1.0}, "direct"),
    ],
)
def test_a_faultless_trace_is_correct_and_its_strategy_is_read_as_it_was_written(order, changes, name):
    mixture, rng = replace(FAULTLESS, orders={order: 1.0}, **changes), random.Random(1)
    for split in LEDGER.splits:
        for _ in range(30):
            row = LEDGER.problem(split, rng)
            response = write_trace(read_terms(row["problem"]), mixture, rng)
            outcome = LEDGER.verify(response, row["answer"], row)
            assert outcome.correct, (row, response)
            if order != "random":
                assert outcome.strategy == name, (row, response)
            else:  # a random order is now and then forward or backward
                assert outcome.strategy.split("+", 1)[1] == name.split("+", 1)[1]


def test_strategies_on_hand_written_traces():
    terms = read_terms(" A1+1 B2+2 C3+3?")

    def name(response):
        return strategy(read_trace(response, terms), len(terms))

    assert name(" B2+2=444 A1+1=269 C3+3=611[11]") == "other"
    assert name(" A1+1=224 B=469[69]") == "skipped"
    assert name(" A=224 B=469 B=XX3 C=611[11]") == "skipped+terse"
    assert name(" A1+2=224 B=469 C=611[11]") == "garbled"  # copies another term
    assert name(" A=224 D=469 C=611[11]") == "garbled"  # there is no term D
    assert name(" A=224 the[11]") == "garbled"
    assert name("[11][11]") == "garbled"
    assert name(" C=634 B=4X9 A=203#1+1=203[03]") == "backward+terse+check"
    whole = " A1+1=224 B=469 C=611#3+3=611[11]"
    for end in range(len(" A1+1=224 B=469 C=611"), len(whole) + 1):  # cut off anywhere, what is there is read
        assert name(whole[:end]).startswith("forward+terse"), whole[:end]
    assert name(" A1+1=224 ") == "garbled"
    assert name(" A=224 B=") == "skipped+terse"


def test_every_pretraining_trace_is_inside_the_grammar():
    rng = random.Random(2)
    for name, mixture in MIXTURES.items():
        for _ in range(300):
            row = LEDGER.problem("long", rng)
            response = write_trace(read_terms(row["problem"]), mixture, rng)
            outcome = LEDGER.verify(response, row["answer"], row)
            assert outcome.status in ("correct", "wrong")
            assert outcome.strategy != "garbled", (name, response)


@pytest.mark.parametrize(
    "response",
    ["", " ", "[", "[]", "[1]", "[123]", "47", "[47", "[47] ", "[47]\n", "[4 7]", "[\u0664\u0667]", "[\uff14\uff17]",
     "[47]é", "\x00", "\ud800", "@" * 10_000, "[47]" * 5_000 + "?", " A7*6=" * 20_000, " A" * 50_000],
)  # fmt: skip
def test_hostile_text_is_unparsed_and_never_an_error(response):
    row = {"problem": " A7*6 B5-2?", "answer": "[47]"}
    for given in (row, None, {}, {"problem": None}):
        outcome = LEDGER.verify(response, "[47]", given)
        assert (outcome.correct, outcome.status, outcome.extracted) == (False, "unparsed", None)


def test_random_text_never_raises():
    rng, symbols = random.Random(3), NUMERALS + LABELS + "+-*~=?[]#@, éA\n"
    row = LEDGER.problem("id", rng)
    for _ in range(2000):
        LEDGER.verify("".join(rng.choices(symbols, k=rng.randrange(40))), row["answer"], row)


def test_only_the_last_answer_counts_and_without_a_row_correctness_is_still_exact():
    outcome = LEDGER.verify("[47][12]", "[47]")
    assert (outcome.correct, outcome.status, outcome.extracted, outcome.strategy) == (False, "wrong", "[12]", None)
    assert LEDGER.verify("anything[47]", "[47]", None).correct


def test_splits_are_what_they_say():
    expected = {
        "id": (3, 6, "+-*"),
        "long": (7, 8, "+-*"),
        "xlong": (9, 10, "+-*"),
        "ops": (3, 5, "*~"),
        "facts": (3, 6, "+-*"),
    }
    assert list(LEDGER.splits) == list(expected)
    for split, (fewest, most, operators) in expected.items():
        rows = LEDGER.problems(split, 200, seed=5)
        problems = [read_terms(row["problem"]) for row in rows]
        assert {len(terms) for terms in problems} == set(range(fewest, most + 1))
        assert {operator for terms in problems for _, operator, _ in terms} == set(operators)
        assert {FACTS[term].held_out for terms in problems for term in terms} == {split == "facts"}
        assert [row["answer"] for row in rows] == [write_answer(totals(terms)) for terms in problems]
        assert [row["problem"] for row in rows] == [write_prompt(terms) for terms in problems]


def test_a_fifth_of_the_facts_is_held_out_of_every_operator_at_equal_difficulty():
    for operator in "+-*~":
        facts = [fact for (_, o, _), fact in FACTS.items() if o == operator]
        held_out = [fact.rank for fact in facts if fact.held_out]
        assert 0.18 < len(held_out) / len(facts) < 0.22
        assert abs(sum(held_out) / len(held_out) - 0.5) < 0.03
        assert all(fact.value != fact.misconception for fact in facts)


def test_problems_are_the_same_everywhere_and_differ_by_seed():
    rows = [LEDGER.problems(split, 50, seed=0) for split in LEDGER.splits]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest[:16] == "f1ac51203ae4de92"
    assert LEDGER.problems("id", 50, seed=1) != rows[0]
    assert len({row["problem"] for row in rows[0]}) == 50


def test_the_shipped_bases_were_pretrained_on_the_documents_that_are_written_now():
    rng = random.Random(0)
    documents = [LEDGER.document(base, rng, i / 200) for base in LEDGER.bases for i in range(200)]
    digest = hashlib.sha256("".join(d.prompt + d.response for d in documents).encode()).hexdigest()
    assert digest[:16] == "9cc8f86cdb658e5d"  # another digest: build the bases again, and measure them


def test_resolve_world_names_the_nearest(tmp_path, monkeypatch):
    assert resolve_world("ledger") is LEDGER
    with pytest.raises(UserError, match="did you mean 'ledger'"):
        resolve_world("leger")
    (tmp_path / "not_a_world.py").write_text(
        "from polarity.worlds import World\nWORLD = 3\nclass Half(World):\n    name = 'half'\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="must be a World"):
        resolve_world("not_a_world:WORLD")
    with pytest.raises(UserError, match="abstract method"):
        resolve_world("not_a_world:Half")


@pytest.mark.parametrize("base", list(LEDGER.bases))
def test_a_shipped_base_is_what_its_table_says(base):
    path, spec = LEDGER.base_path(base), LEDGER.bases[base]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert tokenizer.get_vocab() == LEDGER.tokenizer().get_vocab()
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (spec.hidden, spec.layers)
    assert model.dtype == torch.float32
    made = json.loads((path / "pretraining.json").read_text())
    assert made["parameters"] == sum(p.numel() for p in model.parameters()) < 1_000_000
    assert made["steps"] == spec.steps


def test_the_default_base_solves_some_and_in_several_ways():
    path = LEDGER.base_path(next(iter(LEDGER.bases)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rows = [row for row in LEDGER.problems("id", 60) if len(read_terms(row["problem"])) == 3][:8]
    prompts = tokenizer([row["problem"] for row in rows], add_special_tokens=False, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    ids = model.generate(prompts, max_new_tokens=100, num_return_sequences=4, do_sample=True, top_k=0)
    responses = tokenizer.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
    outcomes = [LEDGER.verify(text, rows[i // 4]["answer"], rows[i // 4]) for i, text in enumerate(responses)]
    assert 3 <= sum(outcome.correct for outcome in outcomes) < len(outcomes)
    assert len({outcome.strategy for outcome in outcomes}) > 3
