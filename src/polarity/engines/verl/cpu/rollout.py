"""verl's rollout on a CPU: Hugging Face's `generate` in one Ray actor, fed by verl's agent loop a request at a time.

B rows (requests) that are decoded together, T tokens of the longest response, V vocabulary.

Requests that arrive together are decoded together. Each row's tokens are drawn by us, inside `generate`, from random
numbers of its own: they depend on the run's seed, the weights' step, the prompt and how many requests with that prompt
came before at that step, not on which other rows are decoded with it. So a run, and a resumed run, draws the same
responses again. Two things are left to chance: which of a prompt's n requests gets which of its n responses, and the
last bits of the logits, which depend on who shares a batch and can, once in many thousands of tokens, tip a draw.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from verl.workers.config import RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from polarity.engines.verl.cpu import ROLLOUT
from polarity.seeds import seed_for

# A batch starts when no request has come for this long, in seconds: verl's agent loop sends a step's one by one.
QUIET = 0.05
# verl asks for finished groups every two seconds, much longer than a step of a small model takes.
POLL = 0.1
# A traceback in another process's log is on the driver's screen after this long, in seconds.
LOG_DELAY = 3.0


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k -1 is all; `stop` strings and `stop_tokens` end a response beside eos tokens."""

    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False

    @staticmethod
    def read(parameters: dict[str, Any]) -> "Sampling":
        """From verl's sampling parameters; ValueError for one that has no meaning here and is set."""
        known = "temperature top_p top_k stop stop_token_ids ignore_eos max_tokens max_new_tokens logprobs".split()
        neutral = {"repetition_penalty": 1.0, "n": 1}
        for name, value in parameters.items():
            if name not in known and value is not None and value != neutral.get(name):
                raise ValueError(f"the CPU rollout knows no sampling parameter {name}={value!r}")
        stop = parameters.get("stop") or ()
        return Sampling(
            temperature=float(parameters.get("temperature", 1.0)),
            top_p=float(parameters.get("top_p", 1.0)),
            top_k=int(parameters.get("top_k", -1)),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_tokens=tuple(parameters.get("stop_token_ids") or ()),
            ignore_eos=bool(parameters.get("ignore_eos", False)),
        )


@dataclass(frozen=True)
class Response:
    """Tokens with the end-of-sequence token, the log-prob of each under the distribution it was drawn from (after
    temperature, top-k and top-p: vLLM's processed_logprobs), and whether it ended by itself (not by its limit)."""

    tokens: list[int]
    logp: list[float]
    ended: bool


class Draw(LogitsProcessor):
    """Draws a token for each row from its own random numbers `uniform` (B,T) in [0, 1), or the best one for None."""

    def __init__(self, uniform: Tensor | None) -> None:
        self.uniform = uniform
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B,V) -> scores (B,V) of which `generate` takes the largest: 1 for the drawn token, else 0."""
        logp = scores.float().log_softmax(-1)
        if not logp.max(-1).values.isfinite().all():
            raise FloatingPointError("the model's logits are not finite any more; lower the learning rate")
        if self.uniform is None:
            token = logp.argmax(-1, keepdim=True)
        else:
            cumulative = logp.exp().cumsum(-1)
            total = cumulative[:, -1:]
            # Strictly below the total, which the product can round up to: beyond it lie only impossible tokens.
            target = self.uniform[:, len(self.logp), None] * total
            target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
            token = torch.searchsorted(cumulative, target, right=True)
        self.logp.append(logp.gather(1, token)[:, 0])
        return torch.zeros_like(logp).scatter(1, token, 1.0)


class Ends(StoppingCriteria):
    """Says when each row ends: `length` (B,), tokens after the prompt, 0 while it runs; `ended` (B,), as Response."""

    def __init__(self, start: int, limits: Tensor, tokens: Tensor, strings: StopStringCriteria | None) -> None:
        self.start, self.limits, self.tokens, self.strings = start, limits, tokens, strings
        self.length = torch.zeros_like(limits)
        self.ended = torch.zeros_like(limits, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self.start
        ends = torch.isin(input_ids[:, -1], self.tokens)
        if self.strings is not None:
            ends |= self.strings(input_ids, scores)
        running = self.length == 0
        self.ended |= running & ends
        self.length[running & (ends | (self.limits <= length))] = length
        return self.length > 0


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    eos: Sequence[int],
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    seeds: Sequence[int],
) -> list[Response]:
    """One response to each of B tokenised prompts, of at most limits[i] tokens, drawn with seeds[i]."""
    start = max(map(len, prompts))
    tokens = torch.tensor([[0] * (start - len(p)) + list(p) for p in prompts])
    attend = torch.tensor([[0] * (start - len(p)) + [1] * len(p) for p in prompts])
    longest = max(limits)

    cut = LogitsProcessorList()
    uniform = None
    if sampling.temperature > 0:
        uniform = torch.stack([torch.rand(longest, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        cut.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            cut.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            cut.append(TopPLogitsWarper(sampling.top_p))
    draw = Draw(uniform)
    stop_tokens = (*sampling.stop_tokens, *(() if sampling.ignore_eos else eos))
    strings = StopStringCriteria(tokenizer, list(sampling.stop)) if sampling.stop else None
    ends = Ends(start, torch.tensor(limits), torch.tensor(stop_tokens, dtype=torch.long), strings)

    output = model.generate(
        input_ids=tokens,
        attention_mask=attend,
        generation_config=GenerationConfig(max_new_tokens=longest, do_sample=False),
        logits_processor=LogitsProcessorList([*cut, draw]),
        stopping_criteria=StoppingCriteriaList([ends]),
    )
    rows = zip(output[:, start:].tolist(), torch.stack(draw.logp, 1).tolist(), strict=True)
    shape = zip(ends.length.tolist(), ends.ended.tolist(), strict=True)
    return [Response(row[:n], logp[:n], ended) for (row, logp), (n, ended) in zip(rows, shape, strict=True)]


@dataclass(frozen=True)
class Request:
    sampling: Sampling
    prompt: tuple[int, ...]
    limit: int
    number: int  # among the requests with this prompt since the weights came
    response: asyncio.Future[Response]


class Server:
    """The Ray actor: model, weights of `step`, queue of requests. After a failure it answers with that failure only."""

    def __init__(self, model: str, tokenizer: str, config: RolloutConfig) -> None:
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, config.dtype), attn_implementation="sdpa"
        ).eval()
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        self.eos = tuple(sorted({e for e in (*stops, self.tokenizer.eos_token_id) if e is not None}))
        self.model.generation_config = GenerationConfig()  # the run says how to sample, not the model's directory
        self.room = config.max_model_len or self.model.config.max_position_embeddings
        self.step: int | None = None
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.waiting: list[Request] = []
        self.decoding: asyncio.Task[None] | None = None
        self.busy = asyncio.Lock()
        self.failure: Exception | None = None

    async def load_weights(self, weights: dict[str, Tensor], step: int | None) -> None:
        async with self.busy:
            self.model.load_state_dict(weights)
            self.step = step
            self.seen.clear()

    async def sleep(self) -> None:
        """verl frees a GPU's memory here; on a CPU there is nothing to free."""

    async def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], sampling_params: dict[str, Any], **extras: Any
    ) -> TokenOutput:
        await self.raise_failure()
        try:
            given = [name for name, value in extras.items() if value is not None]
            if given:
                raise ValueError(f"the CPU rollout takes text only, but verl passed {', '.join(given)}")
            response = await self._respond(tuple(map(int, prompt_ids)), sampling_params)
        except Exception as error:  # whatever it is, it ends the run
            self.failure = error
            raise
        return TokenOutput(
            token_ids=response.tokens,
            log_probs=response.logp if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.step, "finish_reason": "stop" if response.ended else "length"},
        )

    async def _respond(self, prompt: tuple[int, ...], parameters: dict[str, Any]) -> Response:
        request = Request(
            sampling=Sampling.read({"ignore_eos": self.config.ignore_eos, **parameters}),
            prompt=prompt,
            limit=self._limit(prompt, parameters),
            number=self.seen[prompt],
            response=asyncio.get_running_loop().create_future(),
        )
        self.seen[prompt] += 1
        self.waiting.append(request)
        if self.decoding is None or self.decoding.done():
            self.decoding = asyncio.create_task(self._decode())
        return await request.response

    def _limit(self, prompt: tuple[int, ...], parameters: dict[str, Any]) -> int:
        """As verl's vLLM rollout: what is asked for, else the response length, within prompt + response and context."""
        left = self.room - len(prompt)
        if left < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in a context of {self.room}")
        whole = self.config.prompt_length + self.config.response_length - len(prompt)
        limit = parameters.get("max_tokens", parameters.get("max_new_tokens", min(self.config.response_length, whole)))
        return max(1, min(limit, left))

    async def _decode(self) -> None:
        """Decode what waits, in batches of one sampling and at most max_num_seqs rows; a failure is everybody's."""
        batch: list[Request] = []
        try:
            while self.waiting:
                count = 0
                while len(self.waiting) > count:
                    count = len(self.waiting)
                    await asyncio.sleep(QUIET)
                # In an order that does not depend on arrival; similar lengths together.
                self.waiting.sort(key=lambda r: (repr(r.sampling), len(r.prompt), r.prompt, r.number))
                alike = sum(r.sampling == self.waiting[0].sampling for r in self.waiting)
                rows = min(alike, self.config.max_num_seqs)
                batch, self.waiting = self.waiting[:rows], self.waiting[rows:]
                async with self.busy:
                    responses = await asyncio.to_thread(self._generate, batch)
                for request, response in zip(batch, responses, strict=True):
                    request.response.set_result(response)
        except Exception as error:  # raised where the responses are waited for
            for request in (*batch, *self.waiting):
                if not request.response.done():
                    request.response.set_exception(error)

    def _generate(self, batch: list[Request]) -> list[Response]:
        return generate(
            self.model,
            self.tokenizer,
            self.eos,
            batch[0].sampling,
            [r.prompt for r in batch],
            [r.limit for r in batch],
            [seed_for(self.config.seed, self.step, r.prompt, r.number) for r in batch],
        )


class Replica(RolloutReplica):
    """Starts the server, in verl's trainer process, and sees to it that a failure of it ends the run."""

    async def launch_servers(self) -> None:
        if self.replica_rank > 0:  # each would count prompts for itself, and draw the same responses
            raise ValueError(
                "the CPU rollout is one for all ranks: set rollout.tensor_model_parallel_size to their number"
            )
        path = self.model_config.path
        server = (
            ray.remote(Server)
            .options(name=_name(self.replica_rank), num_cpus=0, max_concurrency=self.max_concurrency)
            .remote(path, self.model_config.get("tokenizer_path") or path, self.config)
        )
        self.servers = [server]
        self._server_handle = server
        self._server_address = _name(self.replica_rank)
        _end_run_on_failure(server)


class WeightSender(BaseRollout):
    """The trainer's end, in every rank: the first rank of a replica sends the weights that all of them gather."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        ranks = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // ranks if replica_rank == -1 else replica_rank
        self.sends = rank % ranks == 0

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self,
        weights: Iterator[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if wire_format != "named_tensors" or peft_config is not None:
            raise ValueError("the CPU rollout takes whole weights: set model.lora.merge=True, or train without LoRA")
        gathered = {name: tensor.detach() for name, tensor in weights}  # by all ranks: gathering is collective
        if self.sends:
            await ray.get_actor(_name(self.replica_rank)).load_weights.remote(gathered, global_steps)


def _name(replica_rank: int) -> str:
    return f"{ROLLOUT}_server_{replica_rank}"


def _end_run_on_failure(server: Any) -> None:
    """verl trains on without a group whose generation or reward failed (ReplayBuffer); here it ends the run.

    In the trainer's process, for the replay buffer that it has or will have.
    """
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    read = ReplayBuffer._sync_metadata_from_transfer_queue

    def read_and_raise(buffer: ReplayBuffer) -> None:
        buffer.poll_interval = POLL
        read(buffer)
        if any(buffer.failure_keys.values()):
            ray.get(server.raise_failure.remote())
            time.sleep(LOG_DELAY)
            raise RuntimeError("a response could not be made or judged; the agent loop's traceback above says why")

    ReplayBuffer._sync_metadata_from_transfer_queue = read_and_raise
