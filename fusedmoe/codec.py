"""A table as text: the words that the operator takes (`words.py`). C++ reads the same text."""

from __future__ import annotations

import functools

from fusedmoe.table import Table
from fusedmoe.words import read


def encode(table: Table) -> str:
    """Return the word stream of a table. Raises: TypeError for anything else."""
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a fusedmoe.Table, got {type(table).__name__}")
    return table.text  # type: ignore[attr-defined]  # no field: it would be a word of itself


@functools.lru_cache(maxsize=4096)
def decode(text: str) -> Table:
    """Return the table that `encode` wrote. Raises: ValueError for text that is no table."""
    words = iter(text.split())
    try:
        table = read(Table, words)
    except (StopIteration, ValueError, TypeError) as error:
        raise ValueError(f"table: expected the words of an encoded table, got {text[:60]!r} ({error})") from None
    if next(words, None) is not None:
        raise ValueError(f"table: expected the words of an encoded table, got extra words after it in {text[:60]!r}")
    return table


__all__ = ["decode", "encode"]
