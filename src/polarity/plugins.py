"""`module:NAME`: how a user's own method, verifier or world is named wherever polarity takes a name."""

import importlib
import os
import sys
from typing import Any

from polarity.errors import UserError, nearest


def is_plugin(name: str) -> bool:
    """True for `module:NAME` (a Windows drive letter is no module)."""
    module, _, attribute = name.partition(":")
    return bool(attribute) and attribute.isidentifier() and all(p.isidentifier() for p in module.split("."))


def load_plugin(name: str, kind: str) -> Any:
    """The object that `module:NAME` names. The working directory is searched first, as `python -m` would.

    Raises UserError when the module cannot be imported or lacks the name; an error inside the user's module is
    reported with its own message.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise UserError(f"{kind} {name!r}: importing {module_name} failed: {error}") from error
        raise UserError(
            f"{kind} {name!r}: no module {module_name!r} in {here} or on the Python path; "
            f"write it as my_file:my_name, with my_file.py in the working directory"
        ) from error
    except Exception as error:
        raise UserError(f"{kind} {name!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{kind} {name!r}: {module_name} has no {attribute!r}; {nearest(attribute, names)}")
    return getattr(module, attribute)
