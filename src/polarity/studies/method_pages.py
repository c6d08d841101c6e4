"""docs/methods/: one page a method. What the definitions say is generated; what people say about it is written.

    python -m polarity.studies.method_pages [docs/methods]

rewrites the parts between the markers `<!-- generated: NAME -->` and `<!-- end of generated part -->`, in every page
and in the overview beside the folder (docs/methods.md), leaves all other text as it is, and makes missing pages with
headings to fill. In the table of settings the last column, the source of a value, is written, and kept for as long as
the value is the same.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polarity.methods import FAMILIES, METHODS, SEQUENCE, Method, Phases, build_method, method_table
from polarity.methods.part import Part
from polarity.methods.samples import Filter
from polarity.methods.shaping import Shaping
from polarity.methods.table import table_row

FOLDER = Path("docs/methods")
# Pages about a family of names: title, and the member that is shown.
FAMILY_PAGES = {
    "polarity_weights": (FAMILIES[0], "polarity_p0.5n1"),
    "token_weights": (FAMILIES[1], "token_positive_low_prob"),
    "phases": (SEQUENCE, "nsr_20_then_dapo"),
}
SECTIONS = ("In symbols", "Papers and codes", "What to watch", "What it costs")
UNWRITTEN = "TODO"

# What each name in `Method.needs` asks of an engine.
NEEDS = {
    "entropy_old": "the old policy's entropy at each token; known from sampling, or from recomputing `logp_old`",
    "entropy": "the current policy's entropy at each token, in the update's own forward pass",
    "logp_ref": "log-probabilities under the starting model: a frozen copy in memory, one more forward pass a step",
    "logp_rollout": "the sampler's own log-probabilities",
    "logp_proxy": "log-probabilities under a proxy made from old logits: one more forward pass a step",
    "values": "a critic: a second model with an optimiser of its own",
    "select": "a look at each whole mini-batch: one more forward pass without gradient for each update",
    "resample": "more rollouts in a step, until enough groups are kept",
}
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end of generated part -->)", re.DOTALL)
_EMPTY = "<!-- generated: {} -->\n<!-- end of generated part -->"


class Setting(NamedTuple):
    """One line of a page's table: dotted key as a user writes it, value, and what the field means."""

    key: str
    value: Any
    meaning: str


def documents(folder: Path = FOLDER) -> dict[Path, str]:
    """Every page, and the overview beside `folder`, as they should be: written text as it is, the rest up to date."""
    pages: dict[Path, str] = {}
    for stem, (title, name) in {**{name: (name, name) for name in METHODS}, **FAMILY_PAGES}.items():
        path = folder / f"{stem}.md"
        text = path.read_text(encoding="utf-8") if path.exists() else _skeleton()
        pages[path] = _filled(text, title, build_method(name))
    overview = folder.with_suffix(".md")
    text = overview.read_text(encoding="utf-8") if overview.exists() else f"# The methods\n\n{_EMPTY.format('table')}\n"
    pages[overview] = _BLOCK.sub(lambda found: found[1] + _overview_table(folder.name) + found[4], text)
    return pages


def settings(method: Method) -> list[Setting]:
    """What makes the method: all of its advantage and surrogate, and of the rest what is not Method's default."""
    return list(_walk(method, Method(name=method.name), ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring the pages up to date; prints the files that changed."""
    parser = argparse.ArgumentParser(description="Bring the generated parts of the methods' pages up to date.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=FOLDER, help="folder of the pages (default: %(default)s)"
    )
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in documents(folder).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path)
    return 0


def _skeleton() -> str:
    first, *others = (f"## {section}\n\n{UNWRITTEN}" for section in SECTIONS)
    return "\n\n".join([_EMPTY.format("head"), first, "## Settings", _EMPTY.format("settings"), *others]) + "\n"


def _filled(text: str, title: str, method: Method | Phases) -> str:
    def block(found: re.Match[str]) -> str:
        if found[2] == "head":
            return found[1] + _head(title, method) + found[4]
        return found[1] + _settings_table(method, _sources(found[3])) + found[4]

    return _BLOCK.sub(block, text)


def _head(title: str, method: Method | Phases) -> str:
    """Title, source, the method's row of the A3PO paper's Table 4, the command, and what the engine computes."""
    row, columns = table_row(method), ["adaptive", "asymmetric", "shaping"]
    shown = "" if title == method.name else f"Shown here: `{method.name}`. "
    needs = [f"- `{name}`: {text}" for name, text in NEEDS.items() if name in method.needs]
    computes = "Beyond the log-probabilities that every method needs, the engine provides"
    lines = [
        f"# `{title}`\n",
        f"{shown}{method.source}.\n",
        _table([columns, [_word(row[column]) for column in columns]]),
        f"\n```\npolarity train --method {method.name} --steps 60 --out runs/{method.name}\n```\n",
        f"{computes}:\n" if needs else f"{computes} nothing.",
        *needs,
    ]
    return "\n".join(lines) + "\n"


def _settings_table(method: Method | Phases, sources: Mapping[tuple[str, str], str]) -> str:
    if isinstance(method, Phases):
        return "Those of its methods: " + ", ".join(f"[`{m.name}`]({m.name}.md)" for m in method.methods) + ".\n"
    rows = [["setting", "value", "meaning", "source"]]
    for setting in settings(method):
        key, value = f"`{setting.key}`", f"`{_text(setting.value)}`"
        rows.append([key, value, setting.meaning, sources.get((key, value), UNWRITTEN)])
    return _table(rows) + "\n"


def _sources(block: str) -> dict[tuple[str, str], str]:
    """(setting, value) -> the written last cell of that line of an earlier table of settings."""
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
    return {(cells[0], cells[1]): cells[3] for cells in lines[2:] if len(cells) == 4}


def _overview_table(folder: str) -> str:
    """The table of `polarity methods`, each name a link to its page."""
    rows = method_table()
    body = [[f"[`{row['name']}`]({folder}/{row['name']}.md)", *map(_word, list(row.values())[1:])] for row in rows]
    return _table([list(rows[0]), *body]) + "\n"


def _walk(part: Part, usual: Any, prefix: str, whole: bool = False) -> Iterator[Setting]:
    """The fields of a part that are not as in `usual`; with `whole`, all of them."""
    for name, field in type(part).model_fields.items():
        value, default = getattr(part, name), getattr(usual, name, None)
        if not prefix and name in ("name", "source"):
            continue
        if isinstance(value, Part):
            essential = name in ("advantage", "surrogate") or value != default
            yield from _walk(value, default, f"{prefix}{name}.", essential and not isinstance(value, Shaping | Filter))
        elif whole or value != default or _worth_saying(part, name):
            yield Setting(prefix + name, value, " ".join((field.description or "").split()))


def _worth_saying(part: Part, name: str) -> bool:
    """Fields that decide something even at their default: the mean, and how the tokens of a weight are ranked."""
    if isinstance(part, Shaping):
        return bool(part.parts) and name in ("polarity_by", "scope", "ties")
    return isinstance(part, Method) and name == "aggregation"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _word(value: str | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else value


def _text(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"e-0", "e-", f"{value:g}") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
