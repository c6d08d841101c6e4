"""What a world is: problems, an exact verifier, and documents to pretrain its tiny base models on."""

import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polarity.errors import UserError
from polarity.rewards import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """How one base model of a world is made: shape of the Qwen3 network and length of its pretraining."""

    summary: str
    mixture: str = ""  # the world's own name for what this base reads; bases of several sizes share one
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    mlp: int = 192
    steps: int = 4800
    tokens_per_batch: int = 2048
    longest: int = 240  # tokens; longer documents are left out
    learning_rate: float = 3e-3
    seed: int = 0
    #: run-configuration defaults for this base, over those of its world
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """One pretraining text. The loss is taken on `response` only, and on its end-of-sequence token."""

    prompt: str
    response: str


class World(ABC):
    """A family of procedural reasoning problems. A user's own world subclasses this and is named `module:NAME`."""

    name: str
    summary: str
    #: split name -> what it holds; the first is the training distribution
    splits: Mapping[str, str]
    #: base name -> how it is made; the first is the default
    bases: Mapping[str, Base]
    #: run-configuration defaults for this world, as dotted keys (for example {"rollout.max_new_tokens": 140})
    recipe: Mapping[str, Any]

    @abstractmethod
    def problem(self, split: str, rng: random.Random) -> Row:
        """One problem row: `problem` (the prompt text), `answer` (text), and whatever `verify` wants to find."""

    @abstractmethod
    def verify(self, response: str, gold: str, row: Mapping[str, Any] | None = None) -> Outcome:
        """Exact verdict on a response, with the reasoning strategy by name. Never raises on any text."""

    @abstractmethod
    def document(self, base: str, rng: random.Random, progress: float) -> Document:
        """One pretraining document for `base`; `progress` in [0, 1] is how far pretraining is (a curriculum)."""

    @abstractmethod
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer of all bases of this world; decoding is exact text, no spaces added or cleaned up."""

    def problems(self, split: str, n: int, seed: int = 0) -> list[Row]:
        """`n` distinct problems of a split; the same for the same arguments on every machine."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        rows: dict[str, Row] = {}
        for _ in range(100 * n):
            row = self.problem(split, rng)
            rows.setdefault(row["problem"], {"id": f"{split}-{seed}-{len(rows)}", "split": split, **row})
            if len(rows) == n:
                return list(rows.values())
        raise UserError(
            f"world {self.name!r}: split {split!r} has fewer than {n} distinct problems; lower evaluation.problems"
        )

    def base_path(self, base: str) -> Path:
        """Directory of a base model (config.json, model.safetensors, tokenizer): `bases` beside the world's module."""
        return Path(inspect.getfile(type(self))).parent / "bases" / f"{self.name}-{base}"


def symbol_tokenizer(symbols: list[str], pattern: str) -> "PreTrainedTokenizerFast":
    """A tokenizer with one token per symbol: ids 0 <pad>, 1 <eos>, 2 the unknown symbol, then `symbols` in order.

    pattern: regular expression whose matches are the symbols; what it does not match falls apart into characters.
    The unknown symbol is ordinary text, so that `decode(..., skip_special_tokens=True)` shows it to the verifier.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, eos, unknown = "<pad>", "<eos>", "\N{REPLACEMENT CHARACTER}"
    vocabulary = {symbol: i for i, symbol in enumerate([pad, eos, unknown, *symbols])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, clean_up_tokenization_spaces=False
    )
