"""Tables and generated parts of Markdown pages. It imports nothing but Python, for machines with a
device that have little more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def rows_of(cells: Iterable[Sequence[str]]) -> list[str]:
    """Return rows of a Markdown table; the first is its head, whose first column is aligned left."""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|---|{'---:|' * (lines[0].count('|') - 2)}", *lines[1:]]


def replace_between(text: str, content: str, begin: str, end: str, name: str) -> str:
    """Return the text of the file `name` with `content` between two markers.

    Raises: ValueError if one of them is missing.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(
            f"{name}: expected the lines {begin!r} and {end!r} once each, got {text.count(begin)} and {text.count(end)}"
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
