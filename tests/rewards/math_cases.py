"""Cases of our own: category -> [(reference, answer, whether the answer states the same as the reference)].

Lines of math_cases.tsv: a category after `# `; or, tab-separated, a reference, `+` or `-`, and answers that do or do
not state the same.
"""

from pathlib import Path


def _read() -> dict[str, list[tuple[str, str, bool]]]:
    found: dict[str, list[tuple[str, str, bool]]] = {}
    for line in Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").split("\n")[1:]:
        if line.startswith("# "):
            category = found.setdefault(line[2:], [])
        elif line:
            gold, sign, *answers = line.split("\t")
            category.extend((gold, answer, sign == "+") for answer in answers)
    return found


CASES = _read()
