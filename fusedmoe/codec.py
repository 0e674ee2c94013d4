"""A table as text: what the operator takes.

The text is VERSION, the number of the table's tokens, these tokens, and those of its graph
(`encoding.py`). Python reads the table, csrc/table.cpp the graph, which has every parameter's
number and all that some output depends on. The words of a call's route may follow (`route.py`).
"""

from __future__ import annotations

import functools
import threading

from fusedmoe.backends import EXTENSION
from fusedmoe.encoding import read
from fusedmoe.route import ROUTE, Routed, with_words
from fusedmoe.table import VERSION, Table


def encode(table: Table) -> str:
    """Return the text of a table. Raises: TypeError for anything else."""
    if not isinstance(table, Table):
        raise TypeError(f"table: expected a fusedmoe.Table, got {type(table).__name__}")
    return table.text


def handle(table: Table) -> str:
    """Return a short name of a table, which the `cpu` operators of this process take for its text.

    A call hands text over and compares it, and an encoded table has some kilobytes. Raises:
    TypeError for anything else.
    """
    found = getattr(table, "handle", None)
    if found is None and isinstance(table, Routed):
        found = f"{handle(table.base)} {table.route_text}"
        object.__setattr__(table, "handle", found)
        with _KEEPING:
            while len(_ROUTED) >= ROUTES_KEPT:
                _ROUTED.pop(next(iter(_ROUTED)))
            _ROUTED[found] = table
    elif found is None:
        found = encode(table) if EXTENSION is None else EXTENSION.bind(encode(table))
        _BOUND[found] = table
        object.__setattr__(table, "handle", found)
    return found


def decode(text: str) -> Table:
    """Return the table that `encode` wrote, or of which `handle` made a name.

    Raises: ValueError for text that is no table.
    """
    known = _BOUND.get(text) or _ROUTED.get(text)
    if known is not None:
        return known
    before, found, words = text.partition(f" {ROUTE} ")
    return _routed(before, words) if found else _decode(text)


# By their handles. A search draws a new one at every step, and few are still asked for.
_ROUTED: dict[str, Table] = {}
_KEEPING = threading.Lock()
ROUTES_KEPT = 64


@functools.lru_cache(maxsize=ROUTES_KEPT)
def _routed(text: str, words: str) -> Table:
    return with_words(decode(text), words)


# Never emptied: a graph of autograd may hold a name alone.
_BOUND: dict[str, Table] = {}


@functools.lru_cache(maxsize=4096)
def _decode(text: str) -> Table:
    words = text.split()
    if words[:2] != list(VERSION):
        raise ValueError(f"table: expected an encoding that begins with {' '.join(VERSION)!r}, {_version_of(text)}")
    tokens = iter(words[3:])
    try:
        table = read(Table, tokens)
    except (StopIteration, ValueError, TypeError) as error:
        raise ValueError(f"table: expected the words of an encoded table, got {text[:60]!r} ({error})") from None
    if table.text != text:
        raise ValueError(f"table: expected the words that encode this table, got others in {text[:60]!r}")
    return table


def _version_of(text: str) -> str:
    """What a text of another format is."""
    words = text.split()
    if words[:1] == list(VERSION[:1]):
        return f"got version {words[1] if len(words) > 1 else 'none'}"
    if text.lstrip()[:1] == "{" or (words and all(word.lstrip("-").isdigit() for word in words[:2])):
        return f"got a table of the first edition: {text[:60]!r}"
    return f"got {text[:60]!r}"


__all__ = ["decode", "encode", "handle"]
