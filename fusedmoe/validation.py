"""Checks of arguments that say in one sentence where, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Widths = Sequence[Sequence[int]]
# The largest numbers that the operator reads (csrc/table.cpp).
MOST_SLOTS, MOST_ELEMENTS = 1 << 20, 1 << 40


def require_integer(value: Any, where: str, least: int = 0, most: int = MOST_ELEMENTS) -> int:
    """Return `value`.

    Raises: ValueError, naming the place, unless it is an integer from `least` to `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}: expected an integer of at least {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{where}: expected at most {most}, got {value}")
    return value


def require_tuple(value: object, kind: type, where: str) -> None:
    """Raise ValueError, naming the place, unless `value` is a tuple of `kind`."""
    if not isinstance(value, tuple) or not all(isinstance(item, kind) for item in value):
        raise ValueError(f"{where}: expected a tuple of {kind.__name__}, got {value!r}")


def require_indices(value: object, count: int, where: str, what: str, least: int = 0) -> None:
    """Raise ValueError, naming the place, unless `value` is a tuple of at least `least` indices.

    An index is an integer from 0 to `count` - 1; none may come twice.
    """
    form = f"a tuple of {'at least one index' if least else 'indices'}, none twice"
    if not isinstance(value, tuple) or len(value) < least:
        raise ValueError(f"{where}: expected {form}, got {value!r}")
    for index in value:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            numbers = f" (0 to {count - 1})" if count else ""
            raise ValueError(f"{where}: expected one of {count} {what}{numbers}, got {index!r}")
    if len(set(value)) != len(value):
        raise ValueError(f"{where}: expected {form}, got {value!r}")


def require_instance(value: object, kind: type, where: str) -> None:
    """Raise ValueError, naming the place, unless `value` is one of `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected a {kind.__name__}, got {value!r}")


def require_flag(value: object, where: str) -> None:
    """Raise TypeError, naming the place, unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: expected True or False, got {value!r}")


def require_sequence(value: object, what: str, form: str = "a list of layer widths") -> tuple:
    """`value` as a tuple; text is no list."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{what}: expected {form}, got {value!r}")
    return tuple(value)


def require_level_widths(widths: Widths) -> list[tuple[int, ...]]:
    """`expert_widths` as tuples, one per level."""
    lists = isinstance(widths, Sequence) and not isinstance(widths, str)
    if not lists or not widths or not all(isinstance(level, Sequence) for level in widths):
        form = "one list of layer widths per level, as in [[256], [128]]"
        raise ValueError(f"expert_widths: expected {form}, got {widths!r}")
    for number, level in enumerate(widths):
        if not level:
            raise ValueError(f"expert_widths, level {number}: expected at least one layer width, got none")
    return [tuple(level) for level in widths]


def require_one_level(widths: Widths) -> tuple[int, ...]:
    """`expert_widths` of a family of one level."""
    levels = require_level_widths(widths)
    if len(levels) != 1:
        form = "the layer widths of one level, as in [[256, 128]]"
        raise ValueError(f"expert_widths: expected {form}, got {len(levels)} levels")
    return levels[0]


def require_count_per_task(num_tasks: int, counts: int | Sequence[int]) -> list[int]:
    """m_t for each task, from one number or a list of them."""
    require_integer(num_tasks, "num_tasks", 1, MOST_SLOTS)
    form = f"a number or a list of {num_tasks}"
    result = [counts] * num_tasks if isinstance(counts, int) else require_sequence(counts, "num_task_experts", form)
    if len(result) != num_tasks:
        raise ValueError(f"num_task_experts: expected {form}, got {counts!r}")
    return [require_integer(m, "num_task_experts", 0, MOST_SLOTS) for m in result]
