"""polarity's verifiers as verl's reward function, in their killable pool.

verl calls `compute_score` in the threads of its reward workers, one response at a time:

    reward.custom_reward_function.path=pkg://polarity.engines.verl.reward
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.verifier=math
"""

from functools import cache
from typing import Any

from polarity.engines.verl.data import row_of
from polarity.errors import UserError
from polarity.evaluation.metrics import level_of
from polarity.rewards import Verifier, resolve_verifier, verify
from polarity.worlds import resolve_world


@cache
def _verifier(
    name: str | None, world: str | None, limit: float | None, rewards: tuple[tuple[str, float], ...], unsafe: bool
) -> Verifier:
    if world is not None:
        return resolve_world(world).verify
    if name is None:
        raise UserError("no verifier is set; give reward_kwargs.verifier (math, choice, code, module:NAME, ...)")
    return resolve_verifier(name, limit=limit, rewards=dict(rewards), unsafe=unsafe)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    *,
    verifier: str | None = None,
    world: str | None = None,
    verifier_limit: float | None = None,
    rewards: dict[str, float] | None = None,
    unsafe: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """score, acc (verl's name for correctness, 0 or 1), and what polarity's trainer reads: correct, status, strategy,
    problem_id, level; texts are "" where there is none, because verl averages what is not text.

    extra_info: the problem's row (data.py writes it); ground_truth is the answer. verifier and its settings are those
    of `data` in polarity's YAML; world: a world's verifier instead. A verifier that fails gives status `error`.
    """
    row = {"id": "", **row_of(extra_info), "answer": ground_truth}
    check = _verifier(verifier, world, verifier_limit, tuple(sorted((rewards or {}).items())), unsafe)
    outcome = verify(check, solution_str, row)
    return {
        "score": outcome.score,
        "acc": float(outcome.correct),
        "correct": bool(outcome.correct),
        "status": outcome.status,
        "strategy": outcome.strategy or "",
        "problem_id": str(row["id"]),
        "level": level_of(row) or "",
    }
