"""The embedded default: small procedural reasoning worlds, their verifiers, and tiny pretrained base models."""

from polarity.errors import UserError, nearest
from polarity.plugins import is_plugin, load_plugin
from polarity.worlds.countdown import Countdown
from polarity.worlds.ledger import Ledger
from polarity.worlds.world import Base, Document, World, symbol_tokenizer

__all__ = ["WORLDS", "Base", "Document", "World", "resolve_world", "symbol_tokenizer"]

WORLDS: dict[str, World] = {"ledger": Ledger(), "countdown": Countdown()}


def resolve_world(name: str) -> World:
    """The world called `name`, or a user's own as `module:NAME` (an instance or a subclass of World).

    Raises UserError on an unknown name, and on an object that is no complete World.
    """
    if name in WORLDS:
        return WORLDS[name]
    if not is_plugin(name):
        raise UserError(f"unknown world {name!r}; {nearest(name, WORLDS)}, or write your own as module:NAME")
    found = load_plugin(name, "world")
    try:
        world = found() if isinstance(found, type) and issubclass(found, World) else found
    except TypeError as error:  # a method is missing
        raise UserError(f"world {name!r}: {error}") from error
    if not isinstance(world, World):
        raise UserError(f"world {name!r} is of type {type(found).__name__}; it must be a World of polarity.worlds")
    return world
