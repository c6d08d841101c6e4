"""The sampler against plain forward passes of the same model, row by row and without padding."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from polarity.engines.embedded.policy import Policy, load_policy, token_logp
from polarity.engines.embedded.sampler import Samples, Sampling, sample
from polarity.errors import UserError

PROMPTS = [[5, 6, 7], [9], list(range(60, 80)), [5, 6, 7], [33, 34]]  # unequal, and one of them twice


def ask(policy: Policy, prompts: Sequence[Sequence[int]], group: int, seed: int = 0, **sampling: object) -> Samples:
    return sample(policy, prompts, group, Sampling(**{"max_new_tokens": 20, **sampling}), seed)  # type: ignore[arg-type]


@torch.no_grad()
def forced(policy: Policy, prompt: Sequence[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log-probs (t,V) of the distributions that each response token was drawn from."""
    logits = policy.model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def assert_as_forced(policy: Policy, prompts: Sequence[Sequence[int]], group: int, made: Samples, temperature: float):
    for i, response in enumerate(made.responses()):
        logp = forced(policy, prompts[i // group], response, temperature)
        n = len(response)
        assert n >= 1
        assert made.mask[i].tolist() == [True] * n + [False] * (made.mask.shape[1] - n)
        torch.testing.assert_close(made.logp[i, :n], logp[torch.arange(n), response], atol=1e-5, rtol=0)
        torch.testing.assert_close(made.entropy[i, :n], -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_captured_numbers_are_those_of_a_forward_pass(
    make_model: Callable[..., Path], architecture: str, temperature: float
):
    policy = load_policy(make_model(architecture, ends=40), device="cpu")
    made = ask(policy, PROMPTS, 6, temperature=temperature, batch_rows=12)
    lengths = made.mask.sum(1)
    assert int(lengths.min()) < 4  # rows left the batch early,
    assert int(lengths.max()) == 20  # and others went on to the limit
    assert_as_forced(policy, PROMPTS, 6, made, temperature)


def test_prompts_of_equal_length_and_one_prompt_for_all_rows(policy: Policy):
    for prompts, group in ([[1, 2, 3], [4, 5, 6]], 3), ([[7, 8]], 16), ([[7, 8]], 1):
        assert_as_forced(policy, prompts, group, ask(policy, prompts, group), 1.0)


def test_old_log_probs_are_exact(policy: Policy):
    """`logp_old: sampled` says that sampler and learner agree: so the importance ratio of the first update is 1."""
    made = ask(policy, PROMPTS, 4)
    prompts = [p for p in PROMPTS for _ in range(4)]
    logp, entropy, _ = token_logp(policy, prompts, made.responses(), temperature=1.0, entropy=True)
    torch.testing.assert_close(logp.detach(), made.logp * made.mask, atol=1e-5, rtol=0)
    assert entropy is not None
    torch.testing.assert_close(entropy.detach(), made.entropy * made.mask, atol=1e-5, rtol=0)


def test_tokens_have_the_frequencies_of_the_softmax(make_model: Callable[..., Path]):
    policy = load_policy(make_model("qwen2", vocab_size=12, initializer_range=0.5), device="cpu")
    rows = 4000
    made = ask(policy, [[3, 7]], rows, batch_rows=rows, max_new_tokens=2, temperature=1.3)
    first = forced(policy, [3, 7], [0], 1.3)[0].exp()
    seen = torch.bincount(made.tokens[:, 0], minlength=12)
    assert chisquare(seen, first.double() / first.double().sum() * rows).pvalue > 1e-3
    chosen = Counter(made.tokens[:, 0].tolist()).most_common(1)[0][0]  # and so for the second token, given the first
    second = forced(policy, [3, 7], [chosen, 0], 1.3)[1].exp()
    after = made.tokens[(made.tokens[:, 0] == chosen) & (made.mask.sum(1) == 2), 1]
    expected = second.double() / second.double().sum() * len(after)
    assert chisquare(torch.bincount(after, minlength=12), expected).pvalue > 1e-3


def test_seeds(policy: Policy):
    """Same seed, same tokens. Each batch of prompts has a seed of its own, so batch_rows is part of what is drawn."""
    made = ask(policy, PROMPTS, 4, seed=3)
    assert made.responses() == ask(policy, PROMPTS, 4, seed=3).responses()
    assert made.responses() != ask(policy, PROMPTS, 4, seed=4).responses()
    torch.manual_seed(123)  # global random state is neither read nor moved
    state = torch.random.get_rng_state()
    assert made.responses() == ask(policy, PROMPTS, 4, seed=3).responses()
    assert torch.equal(state, torch.random.get_rng_state())
    # what a row gets does not depend on the rows of later batches
    alone = ask(policy, PROMPTS[:2], 4, seed=3, batch_rows=8)
    assert alone.responses() == ask(policy, PROMPTS, 4, seed=3, batch_rows=8).responses()[:8]
    # rows of the same prompt differ, also across batches
    assert len({tuple(r) for r in ask(policy, [[5, 6]] * 4, 4, batch_rows=4).responses()}) > 12


def test_batch_rows_that_group_does_not_divide(policy: Policy):
    for batch_rows in (1, 3, 7, 1000):
        made = ask(policy, PROMPTS, 4, batch_rows=batch_rows)
        assert made.tokens.shape[0] == 20
        assert_as_forced(policy, PROMPTS, 4, made, 1.0)


def test_greedy_takes_the_most_probable_token(policy: Policy):
    made = ask(policy, PROMPTS, 2, temperature=0.0)
    for i, response in enumerate(made.responses()):
        assert forced(policy, PROMPTS[i // 2], response).argmax(-1).tolist() == response
    assert_as_forced(policy, PROMPTS, 2, made, 1.0)  # reported at temperature 1


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p_keeps_the_nucleus_and_reports_the_whole_distribution(policy: Policy, top_p: float):
    made = ask(policy, PROMPTS, 20, top_p=top_p)
    assert_as_forced(policy, PROMPTS, 20, made, 1.0)
    for i, response in enumerate(made.responses()):
        p = forced(policy, PROMPTS[i // 20], response).exp().double()
        for t, token in enumerate(response):  # the more probable tokens together have not reached top_p yet
            assert float(p[t][p[t] > p[t, token]].sum()) < top_p + 1e-6
    small = ask(policy, [[3]], 300, top_p=1e-6, max_new_tokens=1)
    assert len(set(small.tokens[:, 0].tolist())) == 1


@pytest.mark.parametrize("top_k", [1, 5])
def test_top_k_keeps_the_most_probable_and_reports_the_whole_distribution(policy: Policy, top_k: int):
    made = ask(policy, PROMPTS, 20, top_k=top_k)
    assert_as_forced(policy, PROMPTS, 20, made, 1.0)
    for i, response in enumerate(made.responses()):
        p = forced(policy, PROMPTS[i // 20], response).exp()
        for t, token in enumerate(response):
            assert int((p[t] > p[t, token] + 1e-6).sum()) < top_k
    if top_k == 1:
        greedy = ask(policy, PROMPTS, 20, temperature=0)
        assert torch.equal(made.tokens, greedy.tokens)


def test_top_p_is_a_share_of_what_top_k_leaves(make_model: Callable[..., Path]):
    policy = load_policy(make_model("qwen2", vocab_size=12, initializer_range=0.5), device="cpu")
    first = forced(policy, [3, 7], [0])[0].exp().sort(descending=True)
    share = (first.values[:4] / first.values[:4].sum()).cumsum(-1)
    top_p = float(share[1] + share[2]) / 2  # so 3 of the 4 are needed to reach it
    rows = 2000
    made = ask(policy, [[3, 7]], rows, batch_rows=rows, max_new_tokens=1, top_k=4, top_p=top_p)
    seen = torch.bincount(made.tokens[:, 0], minlength=12)[first.indices[:3]]
    assert int(seen.sum()) == rows
    expected = first.values[:3].double() / first.values[:3].double().sum() * rows
    assert chisquare(seen, expected).pvalue > 1e-3
    assert len(ask(policy, [[3, 7]], 40, max_new_tokens=1, top_k=99).tokens) == 40  # more than there are


def test_a_response_ends_with_its_end_token_which_counts(policy: Policy):
    made = ask(policy, PROMPTS, 20)
    ended = 0
    for i, response in enumerate(made.responses()):
        assert not any(token < 40 for token in response[:-1])
        assert bool(made.truncated[i]) == (response[-1] >= 40)
        assert bool(made.truncated[i]) <= (len(response) == 20)
        ended += response[-1] < 40
    assert 50 < ended < 100
    assert len({r[-1] for r in made.responses()}) > 10  # any of generation_config's list ends a response
    assert policy.eos == tuple(range(40))


def test_an_end_at_the_limit_is_no_truncation(policy: Policy):
    made = ask(policy, [[5]], 200, max_new_tokens=1)
    assert made.tokens.shape == (200, 1)
    assert made.mask.all()
    assert made.truncated.tolist() == [token >= 40 for token in made.tokens[:, 0].tolist()]
    assert 0 < int(made.truncated.sum()) < 200


def test_one_token_for_end_and_padding(make_model: Callable[..., Path]):
    """The tokenizer's <|end|> is both; the mask comes from lengths, so the end token is not lost as padding."""
    policy = load_policy(make_model("llama", vocab_size=12, initializer_range=0.02), device="cpu")
    assert policy.eos == (0,)
    assert policy.tokenizer.pad_token_id == 0
    made = ask(policy, [[1, 2], [3]], 30)
    assert any(response[-1] == 0 for response in made.responses())
    assert_as_forced(policy, [[1, 2], [3]], 30, made, 1.0)


def test_a_tokenizer_without_padding_token(make_model: Callable[..., Path]):
    path = make_model("llama")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists():
            found = json.loads((path / name).read_text())
            found.pop("pad_token", None)
            (path / name).write_text(json.dumps(found))
    policy = load_policy(path, device="cpu")
    assert policy.tokenizer.pad_token is None
    assert_as_forced(policy, PROMPTS, 2, ask(policy, PROMPTS, 2), 1.0)


@pytest.mark.parametrize("stop", ["\n\nQ:", "終わり。終わり", "###", "é"])
def test_stop_strings_over_several_tokens(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stop: str):
    """A stop string ends a response at the token that completes it, however many bytes and tokens it has."""
    policy = load_policy(make_model("qwen2"), device="cpu")  # one end token alone: no part of a stop string is one
    encode = lambda text: policy.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    said = [*encode("so 終 it is"), *encode(stop), *encode(" and on")]
    forward = policy.model.forward
    length = [0]

    def speak(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits[:] = -50.0
        out.logits[:, -1, said[min(length[0], len(said) - 1)]] = 50.0
        length[0] += 1
        return out

    monkeypatch.setattr(policy.model, "forward", speak)
    made = ask(policy, [[50, 51]], 3, max_new_tokens=len(said), stop=("never", stop))
    end = len(said) - len(encode(" and on"))
    assert made.responses() == [said[:end]] * 3
    assert policy.tokenizer.decode(made.responses()[0]).endswith(stop)
    assert not made.truncated.any()


def test_logits_that_are_not_finite(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    forward = policy.model.forward

    def broken(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits[0] = float("nan")
        return out

    monkeypatch.setattr(policy.model, "forward", broken)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match=r"logits are not finite any more; lower update.learning_rate"):
            ask(policy, PROMPTS, 2, temperature=temperature)


def test_stop_strings_of_sampled_text(policy: Policy):
    stop = ("e", "1", " ", "\n")
    made = ask(policy, PROMPTS, 12, stop=stop)
    for i, response in enumerate(made.responses()):
        said = [policy.tokenizer.decode(response[:n]) for n in range(1, len(response) + 1)]
        assert not any(s in text for text in said[:-1] for s in stop)
        ends = any(s in said[-1] for s in stop) or response[-1] < 40
        assert bool(made.truncated[i]) == (not ends)


def test_a_window_shorter_than_the_text(make_model: Callable[..., Path]):
    """Sliding-window layers forget; left padding, sharing and compaction must not shift what they see."""
    path = make_model("mistral", ends=12)
    policy = load_policy(path, device="cpu")
    assert policy.model.config.sliding_window == 7
    made = ask(policy, PROMPTS, 8, max_new_tokens=40)
    assert int(made.mask.sum(1).max()) > 20
    assert_as_forced(policy, PROMPTS, 8, made, 1.0)
    full = AutoModelForCausalLM.from_pretrained(path, sliding_window=None)
    row = max(range(40), key=lambda i: len(made.responses()[i]))
    wide = Policy(full, policy.tokenizer, policy.eos)
    response = made.responses()[row]
    apart = forced(wide, PROMPTS[row // 8], response) - forced(policy, PROMPTS[row // 8], response)
    assert float(apart.abs().max()) > 1e-2  # the window matters here


def test_gradient_checkpointing_does_not_disturb_sampling(qwen2: Path):
    """It wants train mode, in which the library switches caches off."""
    plain = load_policy(qwen2, device="cpu")
    checkpointed = load_policy(qwen2, device="cpu", gradient_checkpointing=True)
    made, again = ask(plain, PROMPTS, 4), ask(checkpointed, PROMPTS, 4)
    assert made.responses() == again.responses()
    assert_as_forced(plain, PROMPTS, 4, again, 1.0)


def test_bfloat16_sampling_is_near_and_its_numbers_are_float32(qwen2: Path):
    policy = load_policy(qwen2, device="cpu", bfloat16=True)
    made = ask(policy, PROMPTS, 4)
    assert made.logp.dtype == made.entropy.dtype == torch.float32
    exact = load_policy(qwen2, device="cpu")
    for i, response in enumerate(made.responses()):
        logp = forced(exact, PROMPTS[i // 4], response)
        difference = made.logp[i, : len(response)] - logp[torch.arange(len(response)), response]
        assert 0 < float(difference.abs().max()) < 0.3
