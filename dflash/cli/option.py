"""Options of a command as its user writes them, and those that were given but would be ignored."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from dflash.config import ConfigError


class Option(NamedTuple):
    """The option of one field: how it is written, and whether its value is another than its default."""

    written: str
    given: bool


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def options(arguments: Any, defaults: Any = None) -> Iterator[tuple[str, Option]]:
    """Field and option of a command's arguments, a dataclass, and of those nested in it, whose options have no prefix.

    A nested one's `defaults` are those that the command names for it, else its own.
    """
    hints = typing.get_type_hints(type(arguments), include_extras=True)
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            yield from options(value, None if default is dataclasses.MISSING else default)
            continue
        # What tyro calls it, where that is another name.
        parts = typing.get_args(hints[field.name])[1:]
        name = next((part.name for part in parts if isinstance(getattr(part, "name", None), str)), field.name)
        written = f"--{name.replace('_', '-')}"
        yield field.name, Option(written, value != default)


def refuse_unused(arguments: Any, fields: typing.Iterable[str], reason: str) -> None:
    """Raises ConfigError where one of these fields was given, which would be ignored. The reason says what it is for.

    It follows "is" or "are": "for new drafts, and D is one already".
    """
    every = dict(options(arguments))
    if given := [every[name].written for name in fields if every[name].given]:
        verb, them = ("is", "it") if len(given) == 1 else ("are", "them")
        raise ConfigError(f"{', '.join(given)} {verb} {reason}: leave {them} out")
