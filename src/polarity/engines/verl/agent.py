"""How verl asks for one response: the prompt's text as it stands, tokenised as in the embedded engine.

verl's own agent loop puts the model's chat template around a prompt, and asks of every Qwen tokenizer that it knows
ChatML's tokens, which not all do. This one also has what that lacks: a response limit for each row, and stop strings.
Registered as `polarity` where the module is imported; overrides.py names it as the model's external_lib, which verl
imports in the processes that sample.
"""

from time import perf_counter
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register

from polarity.engines.verl.settings import AGENT_LOOP, LIMIT, VerlSettings


@register(AGENT_LOOP)
class PolarityAgentLoop(AgentLoopBase):
    def __init__(self, trainer_config: Any, server_manager: Any, tokenizer: Any, **others: Any):
        # without super: it would make what puts the chat template around prompts
        self.server, self.tokenizer = server_manager, tokenizer
        self.limit = trainer_config.config.actor_rollout_ref.rollout.response_length
        self.stop = VerlSettings.of(trainer_config.config).stop

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **row: Any) -> AgentLoopOutput:
        """One response of at most extra_info[LIMIT] tokens, verl's response length where the row has no such key."""
        limit = int((row.get("extra_info") or {}).get(LIMIT) or self.limit)
        stop = {"stop": self.stop} if self.stop else {}
        (message,) = row["raw_prompt"]
        prompt = self.tokenizer(message["content"], add_special_tokens=False)["input_ids"]
        started = perf_counter()
        made = await self.server.generate(
            request_id=uuid4().hex,
            prompt_ids=prompt,
            sampling_params={**sampling_params, "max_tokens": limit, **stop},
            priority=int(priority),
        )
        tokens = made.token_ids[:limit]
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=tokens,
            response_mask=[1] * len(tokens),
            response_logprobs=made.log_probs[:limit] if made.log_probs else None,
            routed_experts=None,
            multi_modal_data={},
            mm_processor_kwargs={},
            num_turns=2,
            metrics={"generate_sequences": perf_counter() - started},
            extra_fields={**made.extra_fields, "turn_scores": [], "tool_rewards": []},
        )
