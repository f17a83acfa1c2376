"""Options of a command that were given but would be ignored: they are refused."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from dflash.config import ConfigError, option_name


def given_options(arguments: Any, defaults: Any = None) -> dict[str, str]:
    """Fields of a command's arguments, a dataclass, that differ from their defaults, each with its option as written.

    Those of nested dataclasses too, whose options have no prefix. A nested one's `defaults` are those that the command
    names for it, else its own.
    """
    hints = typing.get_type_hints(type(arguments), include_extras=True)
    given: dict[str, str] = {}
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        default = _default(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            given |= given_options(value, None if default is dataclasses.MISSING else default)
        elif value != default:
            name = option_name(hints[field.name]) or field.name
            given[field.name] = f"--{name.replace('_', '-')}"
    return given


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def refuse_unused(arguments: Any, fields: Iterable[str], reason: str) -> None:
    """Raises ConfigError where one of these fields was given, which would be ignored. The reason says what it is for.

    It follows "is" or "are": "for new drafts, and D is one already".
    """
    every = given_options(arguments)
    if given := [every[name] for name in fields if name in every]:
        verb, them = ("is", "it") if len(given) == 1 else ("are", "them")
        raise ConfigError(f"{', '.join(given)} {verb} {reason}: leave {them} out")
