"""Dataclasses as words: the fields in order, depth first, by their types.

A tuple is its length and its items. An optional value is 0, or 1 and the value. A boolean is 0 or
1. A float is written so that it comes back exactly. `table.py` writes a table so; `codec.py` and
`csrc/table.cpp` read it.
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
    """(name, type) of each field."""
    hints = typing.get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(cls))


def is_record(kind: Any) -> bool:
    """Whether `kind` is a dataclass."""
    return dataclasses.is_dataclass(kind)


def inside_optional(kind: Any) -> Any:
    """The type inside `kind | None`, or None if `kind` is not optional."""
    if isinstance(kind, types.UnionType):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return None


def item_of(kind: Any) -> Any:
    """The item type of a tuple type, or None if `kind` is no tuple type."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def write(value: Any, kind: Any, words: list[str]) -> None:
    """Append the words of `value`, which is of type `kind`."""
    if inside_optional(kind) is not None:
        words.append("0" if value is None else "1")
        if value is not None:
            write(value, inside_optional(kind), words)
    elif item_of(kind) is not None:
        words.append(str(len(value)))
        for item in value:
            write(item, item_of(kind), words)
    elif is_record(kind):
        for name, field in fields(kind):
            write(getattr(value, name), field, words)
    elif kind is bool:
        words.append(str(int(value)))
    else:
        words.append(repr(value) if kind is float else str(value))


def read(kind: Any, words: Iterator[str]) -> Any:
    """Return the value of type `kind` at the head of `words`. Raises: ValueError for others."""
    if inside_optional(kind) is not None:
        return read(inside_optional(kind), words) if _flag(words) else None
    if item_of(kind) is not None:
        return tuple(read(item_of(kind), words) for _ in range(_count(words)))
    if is_record(kind):
        return kind(*(read(field, words) for _, field in fields(kind)))
    if kind is bool:
        return _flag(words)
    return kind(_word(words))


def _word(words: Iterator[str]) -> str:
    # A StopIteration inside the generator of `read` would end the tuple early.
    word = next(words, None)
    if word is None:
        raise ValueError("it ends too early")
    return word


def _flag(words: Iterator[str]) -> bool:
    word = _word(words)
    if word not in ("0", "1"):
        raise ValueError(f"expected 0 or 1, got {word!r}")
    return word == "1"


def _count(words: Iterator[str]) -> int:
    count = int(_word(words))
    if count < 0:
        raise ValueError(f"expected a length, got {count}")
    return count
