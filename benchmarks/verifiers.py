r"""What a check costs: the worker pool on a verifier that does nothing, MathVerifier, and math-verify beside it.

    python benchmarks/verifiers.py [--math500 FILE.jsonl]     # writes benchmarks/results/verifiers.json

Pool: seconds until the first worker is ready; milliseconds of one check after the other from one thread; checks a
second of one `check_many`, of short answers and of responses of 2,000 characters with their problem rows; and how long
100 single checks take in one thread while another thread's batch hangs in every worker (the limit is 1 s).

Integers: distinct pairs of a response that ends in \boxed{n} and an integer, half of them wrong, one `check_many`,
cache off, workers started. Bar: 20,000 a second.

MATH-500 (with --math500, rows of the benchmark with their `answer`): each answer against up to three correct but
differently written forms of it, made by the rules in `rewritten`. MathVerifier with the cache off and its workers
started, one `check_many`, against math-verify's own parse and verify in this process, as its README calls them. Bar: 5
times its rate. The shares of pairs that each accepts, of which all are correct, are in the result too.

Rounds take turns; the best of each counts. Exits with 1 where a bar is missed.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BARS = {"integers_per_s": 20_000, "math500_ratio": 5.0}
VERIFIER = """
def same(response, gold, row=None):
    return response == gold


def hang(response, gold, row=None):
    while response == "hang":
        pass
    return response == gold
"""


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def pool(rounds: int) -> dict[str, float]:
    """The pool's own cost, on a verifier that compares two strings."""
    from polarity.rewards import WorkerPool

    answers = [(str(i), str(i % 10)) for i in range(50_000)]
    rows = [{"id": str(i), "problem": "p" * 400, "answer": str(i)} for i in range(2_500)]
    responses = [("r" * 1_996 + f"{i:4}", "5", rows[i // 8]) for i in range(20_000)]
    best: dict[str, list[float]] = {"start_s": [], "single_ms": [], "short": [], "long": [], "beside_hanging_s": []}
    for _ in range(rounds):
        with WorkerPool("trivial_verifiers:same") as quick:
            best["start_s"].append(seconds(lambda: quick.start(1)))
            quick.start()
            best["single_ms"].append(seconds(lambda: [quick.check("4", "4") for _ in range(2_000)]) / 2)
            best["short"].append(seconds(lambda: quick.check_many(answers)))
            best["long"].append(seconds(lambda: quick.check_many(responses)))
        with WorkerPool("trivial_verifiers:hang", limit=1.0) as stuck:
            stuck.start()
            other = threading.Thread(target=lambda: stuck.check_many([("hang", "")] * 2 * stuck.workers))
            other.start()
            time.sleep(0.1)
            best["beside_hanging_s"].append(seconds(lambda: [stuck.check("4", "4") for _ in range(100)]))
            other.join()
    least = {name: min(times) for name, times in best.items()}
    return {
        "first_worker_ready_s": least["start_s"],
        "one_after_the_other_ms": least["single_ms"],
        "bulk_short_per_s": len(answers) / least["short"],
        "bulk_2000_characters_per_s": len(responses) / least["long"],
        "100_checks_beside_a_hanging_batch_s": max(best["beside_hanging_s"]),
    }


def integers(rounds: int) -> dict[str, float]:
    """Distinct integer answers in bulk."""
    from polarity.rewards import MathVerifier

    count = 40_000
    thought = "We add what is given and simplify, term by term. " * 8
    items = [(rf"{thought} So the answer is $\boxed{{{7 * i}}}$.", str(7 * i + i % 2)) for i in range(count)]
    verifier = MathVerifier(cache=False)
    verifier.start()
    times = []
    for _ in range(rounds):
        found: list[Any] = []
        times.append(seconds(lambda: found.extend(verifier.check_many(items))))  # noqa: B023
        assert [o.correct for o in found] == [i % 2 == 0 for i in range(count)]
    verifier.close()
    return {"pairs": count, "per_s": count / min(times)}


def rewritten(answer: str) -> Iterator[str]:
    """Other ways to write `answer` that mean the same."""
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer)
    if re.fullmatch(r"-?\d+", answer):
        yield from (rf"\frac{{{2 * int(answer)}}}{{2}}", f"{answer}.0", rf"{int(answer) - 7} + 7")
    elif fraction:
        sign, over, under = fraction[1], int(fraction[2]), int(fraction[3])
        yield from (rf"{sign}\dfrac{{{3 * over}}}{{{3 * under}}}", f"{sign}{over}/{under}")
        yield rf"{sign}{over}\cdot\frac1{{{under}}}"
    elif re.fullmatch(r"\\text\{[^{}]*\}", answer):
        yield from (answer[6:-1], rf"\mathrm{{{answer[6:-1]}}}", rf"\textbf{{{answer[6:-1]}}}")
    elif re.search(r"[,=:<>%_]|\\(text|cup|in|le|ge|infty|begin|\$|mbox|%|circ)|\\[,!]", answer):  # not one formula
        yield from (rf"\displaystyle {answer}", answer.replace(r"\frac", r"\dfrac") + r"\,")
        yield re.sub(r",(?!\\|\s*\d{3})", r",\,", answer)
    else:
        yield from (
            rf"\frac{{2\left({answer}\right)}}{{2}}",
            rf"\left({answer}\right)+0",
            rf"\left[{answer}\right] \cdot 1",
        )


def math500(path: Path, rounds: int) -> dict[str, Any]:
    """MathVerifier's rate against math-verify's."""
    from math_verify import parse, verify

    from polarity.rewards import MathVerifier

    answers = dict.fromkeys(json.loads(line)["answer"] for line in path.read_text().splitlines())
    pairs = [(f, a) for a in answers for f in dict.fromkeys(rewritten(a)) if f != a]
    items = [(rf"The answer is $\boxed{{{form}}}$.", answer) for form, answer in pairs]
    verifier = MathVerifier(cache=False)
    verifier.start()

    def ours() -> list[bool]:
        return [o.correct for o in verifier.check_many(items)]

    def theirs() -> list[bool]:
        return [bool(verify(parse(f"${gold}$"), parse(response))) for response, gold in items]

    verifier(r"\boxed{\sin^2 t}", r"1-\cos^2 t")
    verify(parse(r"$1-\cos^2 t$"), parse(r"\boxed{\sin^2 t}"))
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    accepted: dict[str, list[bool]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, work in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            accepted[name] = work()
            times[name].append(time.perf_counter() - started)
    verifier.close()
    rates = {name: len(items) / min(spent) for name, spent in times.items()}
    refused = [list(pair) for pair, good in zip(pairs, accepted["ours"], strict=True) if not good]
    return {
        "pairs": len(items),
        "polarity_per_s": rates["ours"],
        "math_verify_per_s": rates["theirs"],
        "ratio": rates["ours"] / rates["theirs"],
        "polarity_accepts": sum(accepted["ours"]) / len(items),
        "math_verify_accepts": sum(accepted["theirs"]) / len(items),
        "polarity_refuses": refused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--math500", type=Path, help="a JSONL file with the benchmark's rows")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "trivial_verifiers.py").write_text(VERIFIER)
        sys.path.append(folder)  # the workers get this process's path
        found: dict[str, Any] = {
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "math-verify": version("math-verify"),
                "load_average_at_start": os.getloadavg(),
            },
            "pool": pool(given.rounds),
            "integers": integers(given.rounds),
        }
    if given.math500 is not None:
        found["math500"] = math500(given.math500, given.rounds)
    text = json.dumps(found, indent=1)
    (RESULTS / "verifiers.json").write_text(text + "\n")
    print(text)
    checked = {"integers_per_s": found["integers"]["per_s"]}
    if "math500" in found:
        checked["math500_ratio"] = found["math500"]["ratio"]
    sys.exit(int(any(checked[name] < BARS[name] for name in checked)))


if __name__ == "__main__":
    main()
