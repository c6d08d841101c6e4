"""docs/methods/ and docs/methods.md against the definitions, the metrics' list, and the command line."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from polarity.config import load_config
from polarity.errors import UserError
from polarity.methods import METHODS, Method, build_method
from polarity.methods.schedules import ClosedLoop
from polarity.studies import method_pages

DOCS = Path(__file__).parents[2] / "docs"
FOLDER, OVERVIEW = DOCS / "methods", DOCS / "methods.md"
TOPICS = {"closed_loop", "continuous_rewards", "composition"}  # written throughout
# page -> the method that it is about, or shows
METHOD_PAGES = {name: name for name in METHODS} | {stem: name for stem, (_, name) in method_pages.FAMILY_PAGES.items()}
EVERY_PAGE = sorted([*FOLDER.glob("*.md"), OVERVIEW])


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a page, as rows of cells, without its rule."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in t.splitlines()] for t in found]


def table(name: str, *header: str) -> Iterator[list[str]]:
    """The rows of the page's one table with this header."""
    (found,) = (t for t in tables(text_of(FOLDER / f"{name}.md")) if t[0] == list(header))
    yield from found[2:]


# generated


def test_a_page_for_each_method_and_no_other():
    assert {path.stem for path in FOLDER.iterdir()} == set(METHOD_PAGES) | TOPICS


def test_generated_parts_are_up_to_date():
    stale = [path.name for path, text in method_pages.documents(FOLDER).items() if text != text_of(path)]
    assert not stale, "run python -m polarity.studies.method_pages, then write the sources marked TODO"


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_what_vary_takes_and_define_the_method(name: str):
    method = METHODS[name]
    found = method_pages.settings(method)
    for setting in found:
        assert method.vary({setting.key: setting.value}) == method
        assert setting.meaning
    bare = Method(name=name, source=method.source)
    assert bare.vary({setting.key: setting.value for setting in found}) == method


@pytest.mark.parametrize("page", METHOD_PAGES)
def test_the_command_on_the_page_is_a_valid_run(page: str):
    (line,) = re.findall(r"^polarity train (.*)$", text_of(FOLDER / f"{page}.md"), re.MULTILINE)
    assert load_config(None, options(line)).steps == 60


def test_every_need_has_a_text():
    assert {need for name in METHODS for need in METHODS[name].needs} <= set(method_pages.NEEDS)


def test_written_text_is_kept_and_a_changed_value_asks_for_its_source(tmp_path: Path):
    folder = tmp_path / "methods"
    method_pages.main([str(folder)])
    assert {path.stem for path in folder.iterdir()} == set(METHOD_PAGES)
    page = folder / "dapo.md"
    made = text_of(page)
    assert made.count("TODO") > len(method_pages.SECTIONS)
    written = re.sub(r"(?<=In symbols\n\n)TODO", "Written by hand, with $1 and \\\\1.", made)
    written = re.sub(r"(`surrogate.(?:low|high)` .*) TODO \|", r"\1 the paper \\| the code |", written)
    page.write_text(written, encoding="utf-8")
    method_pages.main([str(folder)])
    assert text_of(page) == written
    page.write_text(written.replace("| `0.28` |", "| `0.3` |"), encoding="utf-8")
    method_pages.main([str(folder)])
    low, high = re.findall(r"^\| `surrogate.(?:low|high)` .*$", text_of(page), re.MULTILINE)
    assert low.endswith(r"| the paper \| the code |")
    assert "`0.28`" in high
    assert high.endswith("| TODO |")


# written


@pytest.mark.parametrize("page", METHOD_PAGES)
def test_every_section_is_written(page: str):
    text = text_of(FOLDER / f"{page}.md")
    sections = dict(re.findall(r"^## (.*)\n+((?:(?!^## ).*\n?)*)", text, re.MULTILINE))
    assert list(sections) == ["In symbols", "Settings", *method_pages.SECTIONS[1:]]
    assert all(body.strip() for body in sections.values())
    assert "TODO" not in text
    if page in METHODS:
        rows = list(table(page, "setting", "value", "meaning", "source"))
        assert rows
        assert all(len(row) == 4 and row[3] for row in rows)


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: path.stem)
def test_metrics_exist(path: Path):
    listed = re.findall(r"^\| `([^`]+)` \|", text_of(DOCS / "metrics.md"), re.MULTILINE)
    known = {name.replace("POLARITY", polarity) for name in listed for polarity in ("positive", "negative")}
    named = set(re.findall(r"`([a-z]+/[\w@/]*\w)`", text_of(path)))
    assert named <= known


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: path.stem)
def test_links_resolve(path: Path):
    links = re.findall(r"\]\(([^)]+)\)", text_of(path))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_overview_leads_to_every_page():
    linked = set(re.findall(r"\]\(methods/(\w+)\.md\)", text_of(OVERVIEW)))
    assert linked == set(METHOD_PAGES) | TOPICS


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: path.stem)
def test_options_that_pages_name_are_options(path: Path):
    """Every `--method.part value` in the text, laid over the page's method."""
    for line in re.findall(r"`(--[^`]+)`", text_of(path)):
        load_config(None, {"method": METHOD_PAGES.get(path.stem, "reinforce"), **options(line)})


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: path.stem)
def test_yaml_that_pages_show_is_a_method(path: Path):
    for block in re.findall(r"^```yaml\n(.*?)^```", text_of(path), re.MULTILINE | re.DOTALL):
        build_method(yaml.safe_load(block)["method"], steps=100, decay_until=0.667)


def test_what_composes_and_what_is_refused():
    accepted = list(table("composition", "method", "change", ""))
    refused = list(table("composition", "method", "change", "reason"))
    assert min(len(accepted), len(refused)) > 10
    for name, change, _ in accepted:
        build_method({"base": name.strip("`"), **yaml.safe_load(change.strip("`"))})
    for name, change, reason in refused:
        assert reason
        with pytest.raises(UserError):
            build_method({"base": name.strip("`"), **yaml.safe_load(change.strip("`"))})


def test_defaults_of_the_closed_loop():
    rows = list(table("closed_loop", "setting", "default", "meaning"))
    documented = {key: row[1].strip("`") for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    fields = {key: field for key, field in ClosedLoop.model_fields.items() if key != "kind"}
    assert set(documented) == set(fields)
    for key, field in fields.items():
        wanted = "none, both required" if field.is_required() else field.default
        assert documented[key] == (f"{wanted:g}" if isinstance(wanted, float) else wanted)


def options(line: str) -> dict[str, str]:
    """The options of a command line as overrides; `--out` is not a configuration key."""
    found = dict(re.findall(r"--([\w.]+) (\S+)", line))
    found.pop("out", None)
    return found
