"""What the commands share: one-line complaints, configuration keys as options, tables."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from polarity.errors import UserError, nearest

MAIN_KEYS = (
    "world", "base", "model", "data.train", "data.verifier", "steps", "seed", "rollout.prompts", "rollout.group",
    "rollout.temperature", "rollout.max_new_tokens", "rollout.max_rounds", "update.mini_batch_prompts",
    "update.learning_rate", "decay_until", "evaluation.every", "evaluation.problems",
)  # fmt: skip
EVAL_KEYS = (
    "world", "data.verifier", "data.verifier_limit", "data.unsafe", "data.template", "data.stop", "data.columns",
    "data.max_bad", "evaluation.problems", "evaluation.temperature",
    "evaluation.top_p", "evaluation.max_new_tokens", "rollout.batch_rows", "seed", "dtype", "device", "threads",
)  # fmt: skip
METHOD_HELP = "catalog name (see `polarity methods`), or module:NAME of your own, for example my_file:my_method"


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are UserErrors: one line, with the nearest option where one is unknown."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        found, extra = self.parse_known_args(arguments)
        for text in extra:
            if text.startswith("--"):
                option = text.split("=")[0]
                known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
                raise UserError(f"unknown option {option}; {nearest(option, known)}")
            raise UserError(f"unexpected {text!r}; see `{self.prog} --help`")
        return found


def make_parser(name: str, usage: str, about: str, examples: str) -> Parser:
    return Parser(
        prog=f"polarity {name}", usage=f"polarity {name} {usage}", description=about,
        epilog=f"examples:\n  {examples}", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_resume(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")


def add_keys(parser: Parser, arguments: Sequence[str], only: Sequence[str] = ()) -> None:
    """Configuration keys as options: those of `only`, or all; --help shows the main ones, --help-all every one."""
    from polarity.config import RunConfig, options

    about_keys = (
        "dotted, as in CONFIG.yaml; values are YAML; [default], which a world may change: `polarity worlds show`"
    )
    keys = parser.add_argument_group("configuration keys", about_keys)
    every = bool(only) or "--help-all" in arguments
    if not only:
        parser.add_argument("--help-all", action="help", help="show every configuration key, not only the main ones")
        if "--methods" not in parser.format_usage():
            keys.add_argument("--method", metavar="NAME", help=METHOD_HELP)
        keys.description = (
            f"{about_keys}\n  parts of the method too: --method.shaping.positive.ratio 0.1 (`polarity methods NAME`)"
        )
        for part in dict.fromkeys(word.split("=")[0] for word in arguments if word.startswith("--method.")):
            keys.add_argument(part, metavar="VALUE", help=argparse.SUPPRESS)
    for key, about in options().items():
        if not only or key in only:
            text = f"{about} [{_default(RunConfig, key)}]".replace("%", "%%")
            keys.add_argument(
                f"--{key}", metavar="VALUE", help=text if every or key in MAIN_KEYS else argparse.SUPPRESS
            )


def _default(model: Any, dotted: str) -> Any:
    for part in dotted.split(".")[:-1]:
        model = model.model_fields[part].annotation
    default = model.model_fields[dotted.split(".")[-1]].default
    return "null" if default is None else default


def overrides(given: argparse.Namespace) -> dict[str, str]:
    """The configuration keys among the parsed options. `method` first: its parts are laid over it."""
    from polarity.config import options

    keys = {"method", *options()}
    found = {k: v for k, v in vars(given).items() if v is not None and (k in keys or k.startswith("method."))}
    return dict(sorted(found.items(), key=lambda item: item[0] != "method"))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--seeds {text!r} is not a list of whole numbers; write for example --seeds 0,1,2") from None


def word(value: str | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else value


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as padded columns; the last column is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(t.ljust(w) for t, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
