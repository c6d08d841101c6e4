"""`polarity data check`: what counts as the same problem, as a conflict, as contamination; and the real figures."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from polarity.data import read_problems
from polarity.errors import UserError
from polarity.studies.data_check import Grams, check_data, text_key

DATA = os.environ.get("POLARITY_TEST_DATA")
EVALUATION = ("aime24", "aime25", "amc23", "math500", "math", "gsm8k", "olympiadbench")


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count))


def write(path: Path, *rows: Any) -> Path:
    """Rows as (problem, answer), numbered, or as text."""
    lines = [
        r if isinstance(r, str) else json.dumps({"id": f"{i}", "problem": r[0], "answer": r[1]})
        for i, r in enumerate(rows)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $x$ in \\(x + 1 = 2\\), please, my dear friend.", "find x  in $x+1=2$ please my dear friend", True),
        ("3 + 4 = ?", "3+4=", True),
        ("3 + 4 = ?", "3 - 4 = ?", False),
        ("A7*6 B5-2 ?", "A7-6 B5*2 ?", False),
        ("求 $x$ 的值", "求$x$的值。", True),
        (
            "Write «résumé» about integers and primes and numbers",
            "write resume about integers and primes and numbers",
            False,
        ),
        ("?!", "...", False),
    ],
)
def test_text_key(one: str, other: str, same: bool):
    assert (text_key(one) == text_key(other)) is same


def test_duplicates_conflicts_and_variants(tmp_path: Path):
    long, sign = words(1, 15), "x " * 50 + "+ 1"
    train = write(
        tmp_path / "t.jsonl",
        (long, "1"), (long + ".", "1"), (long.upper(), " 1 "),  # the same three times
        (words(2, 15), "1"), (words(2, 15) + "!", "2"), (words(2, 15), "1"),  # one text, two answers
        (sign, "3"), (sign.replace("+", "-"), "4"), (sign.replace("+", "- "), "4"),  # two problems, one of them twice
        (words(3, 15), "1"),
    )  # fmt: skip
    found = check_data(train, out=tmp_path / "new" / "clean.jsonl", findings=tmp_path / "f.json")
    assert found.rows == 10
    assert found.distinct == 4
    assert found.duplicates == [["0", "1", "2"], ["7", "8"]]
    assert found.conflicts == [["3", "4", "5"]]
    assert found.variants == [["6", "7"]]
    assert found.kept == ["0", "6", "7", "9"]
    assert [row["id"] for row in read_problems(tmp_path / "new" / "clean.jsonl")] == found.kept
    assert json.loads((tmp_path / "f.json").read_text())["conflicts"] == [["3", "4", "5"]]
    table = found.table()
    assert all(line in table for line in ("10  4 distinct texts", "3  repeat", "3  1 texts with several answers"))


def test_contamination_by_text_and_by_13_grams_in_both_directions(tmp_path: Path):
    problem, other = words(1, 40), words(2, 13)
    bench = write(tmp_path / "b.jsonl", (problem, "1"), (other, "2"), ("2 + 2 = ?", "4"), (words(3, 30), "5"))
    half = " ".join(problem.split()[:26])  # 14 of its 28 13-grams, and no word more
    train = write(
        tmp_path / "t.jsonl",
        (problem.replace(" ", ", ").upper(), "1"),  # the text itself, spaced otherwise
        (half, "1"),  # every 13-gram of the row is in the problem
        (words(4, 30) + " " + half + " " + words(5, 30), "1"),  # 14 of 74, and exactly half of the problem
        (words(6, 300) + " " + other, "1"),  # all of a short problem in a long row
        ("2+2=", "4"),  # short texts only as a whole
        ("2-2=", "0"),
        (" ".join(problem.split()[:12]) + " " + words(7, 30), "1"),  # 12 words are no 13-gram
        (words(8, 30), "1"),
    )  # fmt: skip
    found = check_data(train, [bench])
    assert found.kept == ["2", "5", "6", "7"]
    by_id = {o.id: o for o in found.overlaps}
    assert (by_id["0"].exact, by_id["0"].problem_share, by_id["0"].row_share) == (True, 1.0, 1.0)
    assert (by_id["1"].exact, by_id["1"].problem_share, by_id["1"].row_share) == (False, 0.5, 1.0)
    assert by_id["3"].problem_id == "1"
    assert by_id["3"].problem_share == 1.0
    assert by_id["3"].row_share == round(1 / 301, 4)
    assert (by_id["4"].exact, by_id["4"].row_share) == (True, 0.0)
    (exposure,) = found.exposures
    assert (exposure.problems, exposure.exact, exposure.shared, exposure.rows) == (4, 2, 2, 4)
    assert check_data(train, [bench], threshold=0.4).kept == ["5", "6", "7"]
    assert check_data(train, [bench], threshold=1).kept == ["1", "2", "3", "5", "6", "7"]


def test_13_grams_agree_with_counting_them(tmp_path: Path):
    rng = random.Random(0)
    texts = [" ".join(rng.choice("ab") for _ in range(rng.randrange(40))) for _ in range(60)]
    grams = Grams(texts)
    for i, text in enumerate(texts):
        split = text.split()
        assert grams.sizes[i] == len({tuple(split[j : j + 13]) for j in range(len(split) - 12)})
    assert len(Grams([]).hash) == len(Grams(["a b", "", "c"]).hash) == 0


def test_chinese_is_compared_by_characters(tmp_path: Path):
    problem = "已知三角形的三条边长分别为三四五求这个三角形的面积是多少"
    bench = write(tmp_path / "b.jsonl", (problem, "6"))
    train = write(
        tmp_path / "t.jsonl",
        ("题目 " + problem + "请给出最终的答案", "6"),
        ("另一道完全不同的题目它也足够长可以比较", "1"),
    )
    assert check_data(train, [bench]).kept == ["1"]


def test_bad_rows_are_set_aside_next_to_the_output(tmp_path: Path):
    train = write(tmp_path / "t.jsonl", ("p", "1"), "{broken", '{"problem": "q", "answer": 3}')
    found = check_data(train, out=tmp_path / "clean.jsonl")
    assert found.set_aside == {"not JSON": 1, "answer not a string": 1}
    aside = (tmp_path / "clean.quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in aside] == [2, 3]
    assert "2  1 not JSON, 1 answer not a string" in found.table()


def test_refused(tmp_path: Path):
    train = write(tmp_path / "t.jsonl", ("p", "1"))
    with pytest.raises(UserError, match=r"threshold 50 is not a share"):
        check_data(train, threshold=50)
    with pytest.raises(UserError, match="nothing is left"):
        check_data(train, [train], out=tmp_path / "clean.jsonl")
    assert not (tmp_path / "clean.jsonl").exists()
    with pytest.raises(UserError, match="did you mean 'aime24'"):
        check_data(train, ["aime_24"])


@pytest.mark.skipif(not DATA, reason="POLARITY_TEST_DATA names no folder of benchmark files")
def test_dapo_math_17k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The known figures; ours leave out 147 rows more, which hold over half of a problem, and keep 6 variants."""
    monkeypatch.setenv("POLARITY_DATA", str(DATA))
    train = Path(str(DATA)) / "dapo_math_17k.jsonl"
    found = check_data(train, EVALUATION, out=tmp_path / "clean.jsonl")
    assert (found.rows, found.distinct, len(found.conflicts) + len(found.variants)) == (17917, 16323, 30)
    exact = {e.benchmark: e.exact for e in found.exposures}
    assert exact == {"aime24": 0, "aime25": 0, "amc23": 8, "math500": 7, "math": 976, "gsm8k": 0, "olympiadbench": 10}
    known = set((Path(str(DATA)) / "dapo_math_17k.clean_ids.txt").read_text().split())
    of_row = {o.id for o in found.overlaps if o.exact or o.row_share > 0.5}
    of_problem = {o.id for o in found.overlaps} - of_row
    variants = {name for group in found.variants for name in group}
    assert len(known) == 14967
    assert known - set(found.kept) == known & of_problem
    assert len(known & of_problem) == 147
    assert set(found.kept) - known <= variants
    assert len(read_problems(tmp_path / "clean.jsonl")) == len(found.kept) == 14826
    shared = {e.benchmark: e.shared for e in check_data(train, ["amc23", "math500"], threshold=0.3).exposures}
    assert shared == {"amc23": 26, "math500": 24}
