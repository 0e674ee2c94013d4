"""A table as text: the tokens that the operator takes (`encoding.py`). C++ reads the same text."""

from __future__ import annotations

import functools

from fusedmoe.encoding import read
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


__all__ = ["decode", "encode"]
