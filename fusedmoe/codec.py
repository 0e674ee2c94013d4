"""A table as text: the token stream that the operator takes (`encoding.py`; C++ reads the same), and JSON for files."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from fusedmoe.encoding import fields, inside_optional, is_record, item_of, read
from fusedmoe.table import Table


def encode(table: Table) -> str:
    """Return the token stream of a table. Raises: TypeError for anything else."""
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a fusedmoe.Table, got {type(table).__name__}")
    return table.text  # type: ignore[attr-defined]  # no field: it would be a token of itself


@functools.lru_cache(maxsize=4096)
def decode(text: str) -> Table:
    """Return the table that `encode` wrote. Raises: ValueError for text that is no table."""
    tokens = iter(text.split())
    try:
        table = read(Table, tokens)
    except (StopIteration, ValueError, TypeError) as error:
        raise ValueError(f"table: expected the words of an encoded table, got {text[:60]!r} ({error})") from None
    if next(tokens, None) is not None:
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


def _build(kind: Any, value: Any, where: str) -> Any:
    """Turn parsed JSON into `kind`, checking every type on the way."""
    if inside_optional(kind) is not None:
        return None if value is None else _build(inside_optional(kind), value, where)
    if item_of(kind) is not None:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_build(item_of(kind), item, f"{where}[{i}]") for i, item in enumerate(value))
    if is_record(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {value!r}")
        known = [name for name, _, _ in fields(kind)]
        for name in value:
            if name not in known:
                raise ValueError(f"{where}: expected the fields {', '.join(known)}, got {name!r}")
        for name, _, default in fields(kind):
            if name not in value and not default:
                raise ValueError(f"{where}: expected a field {name!r}, got none")
        return kind(**{name: _build(field, value[name], f"{where}.{name}") for name, field, _ in fields(kind) if name in value})
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError(f"{where}: expected a float, got an integer beyond its range") from None


__all__ = ["decode", "encode", "from_json", "to_json"]
