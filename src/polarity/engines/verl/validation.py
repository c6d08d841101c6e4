"""An evaluation that verl made, as the run directory has evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

from polarity.evaluation.evaluate import of_split
from polarity.evaluation.metrics import Generation, Graded
from polarity.rewards import Outcome


def evaluation(
    splits: Sequence[Any],
    uids: Sequence[str],
    verdicts: Mapping[str, Sequence[Any]],
    lengths: Sequence[int],
    limit: int,
) -> dict[str, Any]:
    """{"results", "samples"} by split, from one entry a response: its split, its prompt's uid, what reward.py said.

    Not known to verl at this place, and so left out: entropies and texts. A response is truncated where it has as many
    tokens as the limit allows.
    """
    problems: dict[str, dict[str, list[int]]] = {}
    for i, (split, uid) in enumerate(zip(splits, uids, strict=True)):
        problems.setdefault(str(split), {}).setdefault(str(uid), []).append(i)
    results, records = {}, {}
    for split, groups in problems.items():
        graded = []
        for rows in groups.values():
            made = [Generation("", float(lengths[i]), None, lengths[i] >= limit) for i in rows]
            outcomes = [
                Outcome(
                    bool(verdicts["correct"][i]),
                    verdicts["status"][i],
                    float(verdicts["score"][i]),
                    strategy=verdicts["strategy"][i] or None,
                )
                for i in rows
            ]
            level = verdicts["level"][rows[0]] or None
            graded.append(Graded(verdicts["problem_id"][rows[0]], level, made, outcomes))
        results[split], records[split] = of_split(graded)
    return {"results": results, "samples": records}
