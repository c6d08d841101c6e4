"""A step's rollouts in rounds: P prompts, and P more while the method wants more groups than were kept, with a cap.

verl 0.9.1 has no cap of its own: on a task that is almost solved its dynamic sampling generates without end.
"""

from collections.abc import Callable
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class Rounds(ReplayBuffer):
    """verl's synchronous buffer, without its own filter.

    kept_groups: rows generated so far -> how many of their groups the method keeps; None: one round is enough.
    """

    def __init__(self, max_rounds: int, kept_groups: Callable[[KVBatchMeta], int] | None, **settings: Any):
        super().__init__(**settings)
        self.max_rounds, self.kept_groups = max_rounds, kept_groups
        self.rounds = 0
        self.validation_lengths: list[int] = []  # tokens of the responses of the validation batches sampled so far

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, float]]:
        """All rows of all rounds, those of dropped groups too: metrics are over everything that was generated."""
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "val":
            self.validation_lengths += [tag["response_len"] for tag in batch.tags]
            return batch, metrics
        self.rounds = 1
        while self.kept_groups is not None and self.rounds < self.max_rounds and self.kept_groups(batch) < batch_size:
            self.refill_fn(batch_size)
            more, found = super().sample(global_steps, partition_id, batch_size)
            batch = KVBatchMeta(partition_id=partition_id, keys=batch.keys + more.keys, tags=batch.tags + more.tags)
            metrics |= found
            self.rounds += 1
        return batch, metrics
