"""A table as text: a flat word stream for the operator's `table` argument (C++ reads the same), and JSON for files.

The word stream is the dataclass fields in order, depth first: a tuple is its length and its items, an optional value is 0 or
1 and the value, booleans are 0 or 1, floats are written so that they come back exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing

from fusedmoe.table import Table


def encode(table: Table) -> str:
    """Return the word stream of a table. Raises: TypeError for anything else."""
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a fusedmoe.Table, got {type(table).__name__}")
    return table.text


def write(table: Table) -> str:
    """Return the word stream of a table that was checked; `Table` keeps it as `text`."""
    words: list[str] = []
    _write(table, Table, words)
    return " ".join(words)


@functools.lru_cache(maxsize=4096)
def decode(text: str) -> Table:
    """Return the table that `encode` wrote. Raises: ValueError for text that is no table."""
    words = iter(text.split())
    try:
        table = _read(Table, words)
    except (StopIteration, ValueError, TypeError) as error:
        raise ValueError(f"table: expected the words of an encoded table, got {text[:60]!r} ({error})") from None
    if next(words, None) is not None:
        raise ValueError(f"table: expected the words of an encoded table, got extra words after it in {text[:60]!r}")
    return table


def to_json(table: Table) -> str:
    """Return the table as JSON: the fields of the dataclasses by name."""
    return json.dumps(dataclasses.asdict(table), indent=1)


def from_json(text: str) -> Table:
    """Return the table that `to_json` wrote.

    Raises: TypeError for what is no text; ValueError for text that is no JSON, misses a field, has an unknown one or one of another
        type, or contradicts itself.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected the JSON of a table, got {type(text).__name__}")
    try:
        value = json.loads(text)
    # Not JSONDecodeError alone: an integer of more than 4300 digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"table: expected JSON, got {text[:60]!r} ({error})") from None
    return _build(Table, value, "table")


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, object, bool], ...]:
    """(name, type, has a default) of each field."""
    hints = typing.get_type_hints(cls)
    return tuple((f.name, hints[f.name], f.default is not dataclasses.MISSING) for f in dataclasses.fields(cls))


def _optional(kind) -> object | None:
    """The type inside `kind | None`, or None if `kind` is not optional."""
    if isinstance(kind, types.UnionType):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return None


def _item(kind) -> object | None:
    """The item type of a tuple type, or None if `kind` is no tuple type."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _write(value, kind, words: list[str]) -> None:
    if _optional(kind) is not None:
        words.append("0" if value is None else "1")
        if value is not None:
            _write(value, _optional(kind), words)
    elif _item(kind) is not None:
        words.append(str(len(value)))
        for item in value:
            _write(item, _item(kind), words)
    elif dataclasses.is_dataclass(kind):
        for name, field, _ in _fields(kind):
            _write(getattr(value, name), field, words)
    elif kind is bool:
        words.append(str(int(value)))
    else:
        words.append(repr(value) if kind is float else str(value))


def _read(kind, words):
    if _optional(kind) is not None:
        return _read(_optional(kind), words) if _flag(words) else None
    if _item(kind) is not None:
        return tuple(_read(_item(kind), words) for _ in range(_count(words)))
    if dataclasses.is_dataclass(kind):
        return kind(*(_read(field, words) for _, field, _ in _fields(kind)))
    if kind is bool:
        return _flag(words)
    return kind(_word(words))


def _word(words) -> str:
    # A StopIteration inside the generator of `_read` would end the tuple early.
    word = next(words, None)
    if word is None:
        raise ValueError("it ends too early")
    return word


def _flag(words) -> bool:
    word = _word(words)
    if word not in ("0", "1"):
        raise ValueError(f"expected 0 or 1, got {word!r}")
    return word == "1"


def _count(words) -> int:
    count = int(_word(words))
    if count < 0:
        raise ValueError(f"expected a length, got {count}")
    return count


def _build(kind, value, where: str):
    """Turn parsed JSON into `kind`, checking every type on the way."""
    if _optional(kind) is not None:
        return None if value is None else _build(_optional(kind), value, where)
    if _item(kind) is not None:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_build(_item(kind), item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        known = [name for name, _, _ in _fields(kind)]
        for name in value:
            if name not in known:
                raise ValueError(f"{where}: expected the fields {', '.join(known)}, got {name!r}")
        for name, _, default in _fields(kind):
            if name not in value and not default:
                raise ValueError(f"{where}: expected a field {name!r}, got none")
        return kind(**{name: _build(field, value[name], f"{where}.{name}") for name, field, _ in _fields(kind) if name in value})
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError(f"{where}: expected a float, got an integer beyond its range") from None


__all__ = ["decode", "encode", "from_json", "to_json"]
