"""Prompt templates: text files in which `{problem}` stands for the problem, replaced literally.

A file's last line end belongs to the file, as editors write it, and not to the prompt: a prompt that ends with a line
end has an empty last line in its file. Sources of the files here, and their departures: docs/data.md.
"""

from pathlib import Path

from polarity.errors import UserError, nearest

SLOT = "{problem}"
FOLDER = Path(__file__).parent / "templates"
TEMPLATES: tuple[str, ...] = tuple(sorted(file.stem for file in FOLDER.glob("*.txt")))


def load_template(spec: str) -> str:
    """The template text of a name of TEMPLATES, of a file, or `spec` itself where it holds `{problem}`.

    Raises UserError where it is none of these, or the file does not hold `{problem}`.
    """
    if SLOT in spec:
        return spec
    path = FOLDER / f"{spec}.txt" if spec in TEMPLATES else Path(spec)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        known = nearest(spec, TEMPLATES)
        raise UserError(f"template {spec!r} is no file, no template ({known}) and no text with {SLOT}") from error
    if SLOT not in text:
        raise UserError(f"template {path} does not hold {SLOT}; write it where the problem belongs")
    return text.removesuffix("\n")


def apply_template(template: str, problem: str) -> str:
    """The prompt text. Literal replacement, since problem texts hold braces."""
    return template.replace(SLOT, problem)
