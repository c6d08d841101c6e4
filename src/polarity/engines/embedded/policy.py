"""The policy: a Hugging Face causal LM, its tokenizer, and the log-probs of responses under it.

n rows (responses) of a micro-batch, L tokens of prompt and response, T response length, D hidden width, V vocabulary,
M = response tokens of the micro-batch (no padding).
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from polarity.engines.embedded.cpu import keep_freed_memory, use_onednn
from polarity.errors import UserError

# Logits of one chunk: 2^26 elements are 256 MB in float32, whatever the vocabulary.
LOGITS_IN_A_CHUNK = 2**26


@dataclass(frozen=True)
class Policy:
    model: Any
    tokenizer: Any
    eos: tuple[int, ...]
    bfloat16: bool = False
    gradient_checkpointing: bool = False

    def set_mode(self) -> None:
        """Gradient checkpointing needs train mode, and a cache needs eval mode: the library drops it otherwise."""
        if self.gradient_checkpointing:
            self.model.train(torch.is_grad_enabled())

    @property
    def device(self) -> torch.device:
        return self.model.device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def load_policy(
    path: Path, *, device: str = "auto", bfloat16: bool = False, gradient_checkpointing: bool = False
) -> Policy:
    """Load a model directory off-line, weights in float32. Raises UserError with the fix for what cannot be trained."""
    if not path.is_dir():
        raise UserError(f"no model directory {path}; give a local directory with config.json and safetensors")
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"{path} is a LoRA adapter; the embedded engine trains whole models, use the TRL or verl engine"
        )
    disable_progress_bar()  # one bar at a time: the run's own
    try:
        # Absolute: with peft installed a relative path is looked up on the hub first, and stalls off-line.
        where = str(path.resolve())
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded as a causal LM with a tokenizer: {_first_line(error)}") from error
    model, loading = loaded
    if loading["missing_keys"]:  # the library would fill them with random numbers
        raise UserError(f"{path} lacks weights of its own architecture, among them {min(loading['missing_keys'])}")
    if not tokenizer("1 + 1", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{path} has no tokenizer; put its tokenizer.json there")
    stops = getattr(model.generation_config, "eos_token_id", None)
    stops = stops if isinstance(stops, list) else [stops]
    eos = tuple(sorted({int(e) for e in [*stops, tokenizer.eos_token_id] if e is not None}))
    if not eos:
        raise UserError(f"{path} has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    model.to(_device(device))
    if model.device.type == "cpu":
        keep_freed_memory()
        if not bfloat16:
            use_onednn(model)
    model.eval()  # also while training: dropout would break the importance ratio
    if gradient_checkpointing:
        _checkpoint_layers(model)
    policy = Policy(model, tokenizer, eos, bfloat16, gradient_checkpointing)
    _require_plain_head(policy, path)
    return policy


def token_logp(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    entropy: bool = False,
    proxy: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-prob of each response token, (n,T) float32, zero past the end of a row; with gradient where grad is enabled.

    The same for the entropy in nats of the distribution that produced it, and for `proxy(logits, tokens)` (Lp-Reg),
    called on chunks of logits at `temperature`; None where not asked for. T is the longest response here.
    """
    hidden, targets = states_before(policy, prompts, responses)

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        with policy.autocast():
            logits = policy.model.get_output_embeddings()(hidden)
        logits = logits.float() / temperature
        parts = [-F.cross_entropy(logits, targets, reduction="none")]
        if entropy:
            logp = logits.log_softmax(-1)
            parts.append(-(logp.exp() * logp).sum(-1))
        if proxy is not None:
            parts.append(proxy(logits, targets))
        return tuple(parts)

    size = max(1, LOGITS_IN_A_CHUNK // policy.model.config.get_text_config().vocab_size)
    if len(targets) <= size:
        flat = chunk(hidden, targets)
    else:  # logits are recomputed in the backward pass, so that no more than a chunk of them is ever held
        pieces = zip(hidden.split(size), targets.split(size), strict=True)
        done = [checkpoint(chunk, h, t, use_reentrant=False) for h, t in pieces]
        flat = tuple(torch.cat(part) for part in zip(*done, strict=True))

    padded = [pad_rows(part, responses) for part in flat]
    return padded[0], padded[1] if entropy else None, padded[-1] if proxy is not None else None


def states_before(
    policy: Policy, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The last hidden state (M,D) from which each response token is predicted, row after row, and the tokens (M,)."""
    tokens, predicts = _pad_right(prompts, responses, policy.device)
    policy.set_mode()
    with policy.autocast():
        hidden = policy.model.get_decoder()(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    return hidden[predicts], tokens[:, 1:][predicts]


def pad_rows(flat: Tensor, responses: Sequence[Sequence[int]]) -> Tensor:
    """One number for each response token (M,), row after row -> (n,T), zero past the end of a row."""
    lengths = torch.tensor([len(r) for r in responses], device=flat.device)
    mask = torch.arange(max(map(len, responses)), device=flat.device) < lengths[:, None]
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def _pad_right(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens (n,L), and (n,L-1) bool: the positions whose prediction is a response token.

    Padding stands on the right, where causal attention never looks, so no attention mask is needed.
    """
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    first = torch.tensor([len(p) - 1 for p in prompts])[:, None]
    last = torch.tensor([len(row) - 1 for row in rows])[:, None]
    position = torch.arange(longest - 1)
    return tokens.to(device), ((position >= first) & (position < last)).to(device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device is cuda but PyTorch sees no GPU; set device to cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu or cuda") from None


def _checkpoint_layers(model: Any) -> None:
    """Gradient checkpointing, refused where the train mode that it needs would switch dropout on."""
    dropouts = {k: v for k, v in model.config.to_dict().items() if k.endswith(("dropout", "_pdrop")) and v}
    if dropouts:
        raise UserError(f"update.gradient_checkpointing needs a model without dropout, this one has {dropouts}")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@torch.no_grad()
def _require_plain_head(policy: Policy, path: Path) -> None:
    """Logits are computed chunk by chunk from the last hidden state; a model that does more than that is refused."""
    tokens = torch.arange(4, device=policy.device)[None]
    whole = policy.model(input_ids=tokens, use_cache=False).logits
    if not whole.isfinite().all():
        raise UserError(f"{path}: the model's logits are not finite; its weights are broken or have diverged")
    hidden = policy.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    if not torch.allclose(whole, policy.model.get_output_embeddings()(hidden), atol=1e-4, rtol=1e-4):
        raise UserError(
            f"{path}: this architecture changes its logits after the output layer; use the TRL engine for it"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
