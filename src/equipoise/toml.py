"""Frozen dataclasses to TOML and back; an unknown key names the near ones, a wrong value says what is expected."""

import difflib
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from equipoise.errors import UserError

Config = TypeVar("Config")


class Limit(NamedTuple):
    """Which values of a type are allowed, and the words that follow the type's name in an error."""

    allows: Callable[[Any], object]
    words: str


def load(cls: type[Config], path: str | Path) -> Config:
    """Read a configuration; what the file leaves out keeps its default.

    Fails: UserError, with the file's name, if it cannot be read, is not TOML, or for a key or value as in from_dict.
    """
    try:
        return from_dict(cls, tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def save(config: Any, path: str | Path) -> None:
    """Write a configuration as TOML."""
    Path(path).write_text(dump(config), encoding="utf-8")


def dump(config: Any) -> str:
    """A configuration as TOML."""
    return tomli_w.dumps(to_dict(config))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values; what is None is left out."""
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def from_dict(cls: type[Config], mapping: Mapping[str, Any]) -> Config:
    """The opposite of ``to_dict``.

    Fails: UserError for an unknown key, with those near it, and for a value of the wrong type or out of its range.
    """
    return _read(cls, mapping, ())


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _read(kind: Any, value: Any, key: tuple[str, ...]) -> Any:
    """The value as the type ``kind`` that the field ``key`` declares."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(args[0], value, key)
    if is_dataclass(kind) and isinstance(value, Mapping):
        read = {name: _read(_type_of(kind, (*key, name)), item, (*key, name)) for name, item in value.items()}
        return kind(**read)  # type: ignore
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        if len(kinds) == len(value):
            return tuple(_read(inner, item, key) for inner, item in zip(kinds, value))
    base = args[0] if origin is Annotated else kind
    value = float(value) if base is float and type(value) is int else value
    known = value in args if origin is Literal else type(value) is base
    if known and (origin is not Annotated or args[1].allows(value)):
        return value
    raise UserError(f"{'.'.join(key)} must be {_expected(kind)}, not {value!r}.")


def _type_of(cls: Any, key: tuple[str, ...]) -> Any:
    """The type of the field ``key``, whose last part is a field of ``cls``."""
    hints = get_type_hints(cls, include_extras=True)
    if key[-1] in hints:
        return hints[key[-1]]
    near = difflib.get_close_matches(key[-1], hints) or list(hints)
    names = [".".join((*key[:-1], name)) for name in near]
    raise UserError(f"unknown key {'.'.join(key)}; did you mean {' or '.join(names)}?")


def _expected(kind: Any) -> str:
    """The words for a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_expected(args[0])} {args[1].words}"
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is tuple:
        return "a list" if args[-1] is ... else f"a list of {len(args)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, "a table")
