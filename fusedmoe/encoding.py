"""Dataclasses as text, tokens between spaces: the fields in order, depth first, by their types.

The fields are those that the dataclass is made with. A tuple is its length and its items. What may
be of several types is the name of its type, and then the value. A boolean is 0 or 1. A
float is written so that it comes back exactly. `table.py` writes a table so; `codec.py` and
csrc/table.cpp read it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any


@functools.cache
def fields(cls: Any) -> tuple[tuple[str, Any], ...]:
    """(name, type) of each field that the dataclass is made with."""
    hints = typing.get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(cls) if field.init)


def is_record(kind: Any) -> bool:
    """Whether `kind` is a dataclass."""
    return dataclasses.is_dataclass(kind)


def members(kind: Any) -> dict[str, Any]:
    """The types of a union, by their names (`NoneType`, `tuple`); {} if `kind` is no union."""
    found = typing.get_args(kind) if isinstance(kind, types.UnionType) else ()
    return {(typing.get_origin(member) or member).__name__: member for member in found}


def item_of(kind: Any) -> Any:
    """The item type of a tuple type, or None if `kind` is no tuple type."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def write(value: Any, kind: Any, tokens: list[str]) -> None:
    """Append the tokens of `value`, which is of type `kind`."""
    if members(kind):
        tokens.append(type(value).__name__)
        write(value, members(kind)[type(value).__name__], tokens)
    elif kind is type(None):
        return
    elif item_of(kind) is not None:
        tokens.append(str(len(value)))
        for item in value:
            write(item, item_of(kind), tokens)
    elif is_record(kind):
        for name, field in fields(kind):
            write(getattr(value, name), field, tokens)
    elif kind is bool:
        tokens.append(str(int(value)))
    else:
        tokens.append(repr(float(value)) if kind is float else str(value))


def read(kind: Any, tokens: Iterator[str]) -> Any:
    """Return the value of type `kind` at the head of `tokens`. Raises: ValueError for others."""
    if members(kind):
        name = _token(tokens)
        if name not in members(kind):
            raise ValueError(f"expected one of {', '.join(members(kind))}, got {name!r}")
        return read(members(kind)[name], tokens)
    if kind is type(None):
        return None
    if item_of(kind) is not None:
        return tuple(read(item_of(kind), tokens) for _ in range(_count(tokens)))
    if is_record(kind):
        return kind(*(read(field, tokens) for _, field in fields(kind)))
    if kind is bool:
        return _flag(tokens)
    return kind(_token(tokens))


def _token(tokens: Iterator[str]) -> str:
    # A StopIteration inside the generator of `read` would end the tuple early.
    token = next(tokens, None)
    if token is None:
        raise ValueError("it ends too early")
    return token


def _flag(tokens: Iterator[str]) -> bool:
    token = _token(tokens)
    if token not in ("0", "1"):
        raise ValueError(f"expected 0 or 1, got {token!r}")
    return token == "1"


def _count(tokens: Iterator[str]) -> int:
    count = int(_token(tokens))
    if count < 0:
        raise ValueError(f"expected a length, got {count}")
    return count
