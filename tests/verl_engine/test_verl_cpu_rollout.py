"""The CPU rollout without Ray: what it draws, its log-probs, how responses end, what it does when it fails."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polarity.engines.verl.cpu.rollout import Response, Sampling, Server, generate
from polarity.seeds import seed_for

PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=-1)


@pytest.fixture(scope="module")
def server(verl_model: Callable[..., Path]) -> Callable[..., Server]:
    """`server(ends=1, weights=1.0, **rollout)`: a server at step 0, in this process; `weights` scales the model's."""
    from verl.workers.config import RolloutConfig

    def make(ends: int = 1, weights: float = 1.0, **rollout: Any) -> Server:
        path = str(verl_model(ends=ends))
        settings = {"name": "hf_cpu", "dtype": "float32", "prompt_length": 32, "response_length": 12, **rollout}
        made = Server(path, path, RolloutConfig(**settings))
        asyncio.run(made.load_weights({k: weights * v for k, v in made.model.state_dict().items()}, 0))
        return made

    return make


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 257) for _ in range(rng.randint(1, 20))] for _ in range(8)]


def draw(server: Server, prompts: list[list[int]], sampling: Sampling = PLAIN, limit: int = 12) -> list[Response]:
    seeds = [seed_for(i, *prompt) for i, prompt in enumerate(prompts)]
    return generate(server.model, server.tokenizer, server.eos, sampling, prompts, [limit] * len(prompts), seeds)


def ask(server: Server, prompts: list[list[int]], **sampling: Any) -> list[Any]:
    """What verl gets for one request a prompt, all sent at once; an exception in place of an answer."""

    async def requests() -> list[Any]:
        sent = [server.generate(str(i), p, {"logprobs": True, **sampling}) for i, p in enumerate(prompts)]
        return await asyncio.gather(*sent, return_exceptions=True)

    return asyncio.run(requests())


def cut(logits: Tensor, sampling: Sampling) -> Tensor:
    """(V,) logits -> (V,) probabilities that tokens are drawn with: a plain reference, token by token."""
    p = (logits / sampling.temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    kept, mass, whole = [], 0.0, float(p[order].sum())
    for token in order:
        if mass / whole >= sampling.top_p:
            break
        kept.append(token)
        mass += float(p[token])
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    "sampling", [PLAIN, Sampling(0.7, 1.0, -1), Sampling(1.3, 0.8, -1), Sampling(1.0, 1.0, 5), Sampling(0.9, 0.7, 20)]
)
def test_log_probs_are_those_of_the_distribution_that_is_drawn_from(
    server: Callable[..., Server], prompts: list[list[int]], sampling: Sampling
):
    made = server(ends=10)
    for prompt, response in zip(prompts, draw(made, prompts, sampling), strict=True):
        with torch.inference_mode():
            logits = made.model(torch.tensor([prompt + response.tokens])).logits[0].double()
        for t, (token, logp) in enumerate(zip(response.tokens, response.logp, strict=True)):
            p = cut(logits[len(prompt) + t - 1], sampling)
            assert logp == pytest.approx(float(p[token].log()), abs=1e-4)


def test_tokens_are_drawn_with_their_probabilities(server: Callable[..., Server]):
    made, prompt, count = server(), [5, 6, 7], 4000
    drawn = generate(made.model, made.tokenizer, made.eos, PLAIN, [prompt] * count, [1] * count, list(range(count)))
    with torch.inference_mode():
        p = made.model(torch.tensor([prompt])).logits[0, -1].softmax(0)
    counts = torch.bincount(torch.tensor([r.tokens[0] for r in drawn]), minlength=len(p))
    likely = p * count >= 5
    chi_square = float((((counts - p * count) ** 2) / (p * count))[likely].sum())
    freedom = int(likely.sum()) - 1
    assert likely.sum() > 50
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_temperature_zero_takes_the_best_token(server: Callable[..., Server], prompts: list[list[int]]):
    made = server()
    for prompt, response in zip(prompts, draw(made, prompts, Sampling(0.0, 1.0, -1), limit=4), strict=True):
        for t, token in enumerate(response.tokens):
            with torch.inference_mode():
                logp = made.model(torch.tensor([prompt + response.tokens[:t]])).logits[0, -1].log_softmax(0)
            assert token == int(logp.argmax())
            assert response.logp[t] == pytest.approx(float(logp[token]), abs=1e-4)


def test_a_row_does_not_depend_on_the_others(server: Callable[..., Server], prompts: list[list[int]]):
    made = server(ends=10)
    together = draw(made, prompts)
    for i, prompt in enumerate(prompts):
        seed = seed_for(i, *prompt)
        (alone,) = generate(made.model, made.tokenizer, made.eos, PLAIN, [prompt], [12], [seed])
        assert alone.tokens == together[i].tokens
        assert alone.logp == pytest.approx(together[i].logp, abs=1e-5)


def test_responses_end_at_any_end_token_or_at_the_limit(server: Callable[..., Server], prompts: list[list[int]]):
    answers = ask(server(ends=40), prompts * 4)
    reasons = {answer.extra_fields["finish_reason"] for answer in answers}
    assert reasons == {"stop", "length"}
    lasts = set()
    for answer in answers:
        *body, last = answer.token_ids
        assert all(token >= 40 for token in body)
        assert (last < 40) == (answer.extra_fields["finish_reason"] == "stop")
        assert len(answer.token_ids) == len(answer.log_probs) == 12 or last < 40
        lasts.add(last)
    assert len([token for token in lasts if token < 40]) > 5
    ignoring = ask(server(ends=40), prompts, ignore_eos=True)
    assert {len(answer.token_ids) for answer in ignoring} == {12}


def test_stop_strings_and_stop_tokens(server: Callable[..., Server], prompts: list[list[int]]):
    made = server()
    digits = [str(i) for i in range(10)]
    answers = ask(made, prompts * 8, stop=digits)
    ended = [a for a in answers if a.extra_fields["finish_reason"] == "stop"]
    assert ended
    for answer in answers:
        text = made.tokenizer.decode(answer.token_ids)
        assert not any(d in text[:-1] for d in digits)
        if answer in ended:
            assert text[-1] in digits or answer.token_ids[-1] == 0
    for answer in ask(made, prompts * 8, stop_token_ids=list(range(100, 140))):
        assert not any(100 <= token < 140 for token in answer.token_ids[:-1])


def test_limits_as_in_verls_own_rollout(server: Callable[..., Server]):
    made = server(response_length=12, prompt_length=32, max_model_len=50)
    lengths = [len(a.token_ids) for a in ask(made, [[5] * 4, [5] * 40, [5] * 47], ignore_eos=True)]
    assert lengths == [12, 4, 1]  # response length; what prompt + response leave; at least one
    asked = [len(a.token_ids) for a in ask(made, [[5] * 4, [5] * 47], ignore_eos=True, max_tokens=7)]
    assert asked == [7, 3]  # within the context
    (error,) = ask(made, [[5] * 50])
    assert "leaves no room" in str(error)


def test_a_run_repeats_and_requests_for_one_prompt_differ(server: Callable[..., Server], prompts: list[list[int]]):
    def responses(made: Server, order: list[int]) -> list[list[list[int]]]:
        answers = ask(made, [prompts[i] for i in order])
        return [sorted(a.token_ids for a, o in zip(answers, order, strict=True) if o == i) for i in range(8)]

    order = [*range(8)] * 4
    shuffled = random.Random(1).sample(order, len(order))
    made = server(ends=10)
    first = responses(made, order)
    assert all(len({tuple(r) for r in rows}) == 4 for rows in first)
    assert responses(server(ends=10, max_num_seqs=5), shuffled) == first  # in another order, in other batches
    assert responses(server(ends=10, seed=43), order) != first
    assert responses(made, order) != first  # more requests at the same step
    asyncio.run(made.load_weights(made.model.state_dict(), 0))
    assert responses(made, order) == first
    asyncio.run(made.load_weights(made.model.state_dict(), 1))
    assert responses(made, order) != first


def test_samplings_are_not_mixed(server: Callable[..., Server], prompts: list[list[int]]):
    made = server()

    async def requests() -> list[Any]:
        greedy = [made.generate("", p, {"temperature": 0, "logprobs": False}) for p in prompts]
        drawn = [made.generate("", p, {"temperature": 1.0, "logprobs": True}) for p in prompts]
        return await asyncio.gather(*greedy, *drawn)

    answers = asyncio.run(requests())
    best = draw(made, prompts, Sampling(0.0, 1.0, -1))
    assert [a.token_ids for a in answers[:8]] == [r.tokens for r in best]
    assert [a.token_ids for a in answers[8:]] != [r.tokens for r in best]
    assert {a.log_probs is None for a in answers[:8]} == {True}
    assert {a.log_probs is None for a in answers[8:]} == {False}


def test_new_weights_are_used(server: Callable[..., Server], prompts: list[list[int]]):
    made, other = server(), server(weights=0.5)
    asyncio.run(made.load_weights(other.model.state_dict(), 0))
    assert [a.token_ids for a in ask(made, prompts)] == [a.token_ids for a in ask(other, prompts)]
    with pytest.raises(RuntimeError, match="Missing key"):
        asyncio.run(made.load_weights({}, 1))


def test_a_failure_reaches_every_request_and_stays(server: Callable[..., Server], prompts: list[list[int]]):
    broken = server(weights=float("nan"))
    for _ in range(2):
        answers = ask(broken, prompts)
        assert {str(a) for a in answers} == {"the model's logits are not finite any more; lower the learning rate"}
    with pytest.raises(FloatingPointError, match="not finite"):
        asyncio.run(broken.raise_failure())


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.1}, {"min_p": 0.1}, {"n": 2}, {"presence_penalty": 0.5}])
def test_settings_without_a_meaning_are_refused(server: Callable[..., Server], setting: dict[str, Any]):
    (error,) = ask(server(), [[5, 6]], **setting)
    assert next(iter(setting)) in str(error)


def test_pictures_are_refused(server: Callable[..., Server]):
    with pytest.raises(ValueError, match="image_data"):
        asyncio.run(server().generate("", [5, 6], {}, image_data=["picture"], video_data=None))
