"""The run directory of a verl run, written by the driver: metrics.jsonl, rollouts/, n-gram history, the method's state.

verl's own loggers and dumps go on beside it. Without `polarity.out` nothing is written, and metrics still are computed.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from polarity.analysis import NGramMetrics
from polarity.engines.verl.rows import Credit, Rows
from polarity.engines.verl.settings import VerlSettings
from polarity.rollout_log import logged_rows, token_fields
from polarity.rundir import RunWriter
from polarity.seeds import seed_for

Metrics = dict[str, float]
STATE = "polarity.json"
NGRAMS = "polarity_ngrams"


class Recorder:
    """One run's files. folder: verl's checkpoint of a step, which also holds the n-gram history and method state."""

    def __init__(self, settings: VerlSettings, tokenizer: Any):
        self.settings, self.tokenizer = settings, tokenizer
        self.out = Path(settings.out) if settings.out else None
        self.writer = RunWriter(self.out) if self.out else None
        self.ngrams: NGramMetrics | None = None

    def resume(self, step: int, folder: Path) -> Any:
        """Start at `step` completed steps (0: a new run), forgetting what was written after it; the method's state."""
        if self.out is not None and not (self.out / "config.yaml").exists():  # verl was started without polarity's CLI
            settings = yaml.safe_dump(self.settings.model_dump(mode="json"), sort_keys=False)
            self.writer = RunWriter.create(self.out, settings, seed=0)
        if self.writer is not None:
            self.writer.rewind(step or -1)
        if self.settings.ngrams is not None:
            spill = self.out / "ngrams" if self.out else None
            self.ngrams = NGramMetrics(self.settings.ngrams, self.settings.ngram_history, spill)
            if step:
                self.ngrams.load(folder / NGRAMS)
        return json.loads((folder / STATE).read_text()) if step else None

    def save(self, folder: Path, state: Any) -> None:
        """Into verl's checkpoint folder, before verl marks it as the latest."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE).write_text(json.dumps(state))
        if self.ngrams is not None:
            self.ngrams.save(folder / NGRAMS)

    def rollouts(self, step: int, rows: Rows, credit: Credit, last: int) -> Metrics:
        """Log the step's rollouts where they are due; sharpening and discovery."""
        every = self.settings.rollouts_every
        texts = self._texts(rows.responses)
        if self.writer is not None and every and (step in (1, last) or step % every == 0):
            self.writer.rollouts(step, self._records(step, rows, texts, credit))
        if self.ngrams is None:
            return {}
        problems = [_name(problem, prompt) for problem, prompt in zip(rows.problems, rows.prompts, strict=True)]
        return self.ngrams.step(rows.responses, texts, rows.correct.numpy(), problems)

    def row(self, step: int, metrics: Metrics) -> None:
        if self.writer is not None:
            self.writer.metrics({"step": step} | {name: float(value) for name, value in metrics.items()})

    def evaluation(self, step: int, results: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.evaluation(step, results)

    def close(self) -> None:
        if self.out is not None:
            shutil.rmtree(self.out / "ngrams", ignore_errors=True)

    def _texts(self, responses: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(
            responses, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    def _records(self, step: int, rows: Rows, texts: list[str], credit: Credit) -> list[dict[str, Any]]:
        assert rows.logp_old is not None
        assert rows.entropy_old is not None
        records = []
        for i in logged_rows(rows.groups, rows.correct, self.settings.rollout_groups):
            response, verdict, problem = rows.responses[i], rows.verdicts[i], rows.problems[i]
            numbers = token_fields(
                i, len(response), logp_old=rows.logp_old, logp_rollout=rows.logp_rollout, entropy=rows.entropy_old,
                advantages=credit.advantages, shaped=credit.shaped, mask=credit.mask,
            )  # fmt: skip
            records.append(
                {
                    "step": step,
                    "problem_id": _name(problem, rows.prompts[i]),
                    "group": int(rows.groups[i]),
                    "prompt": self.tokenizer.decode(rows.prompts[i]),
                    "response": texts[i],
                    "gold": str(problem.get("answer", "")),
                    "correct": bool(rows.correct[i]),
                    "status": verdict["status"],
                    "strategy": verdict.get("strategy"),
                    "reward": float(credit.rewards[i]),
                    "truncated": bool(rows.truncated[i]),
                    "kept": bool(credit.keep[i]),
                    "token_ids": response,
                    "tokens": [self.tokenizer.decode([t]) for t in response],
                    **numbers,
                }
            )
        return records


def _name(problem: dict[str, Any], prompt: Sequence[int]) -> str:
    """The problem's id; its prompt's fingerprint in files that have none."""
    return str(problem["id"]) if "id" in problem else f"prompt-{seed_for(*prompt):016x}"
