"""Compare the counts in a module's attributes with what the module has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from fusedmoe import families
from fusedmoe.table import Table

# So much may a count exceed what is there: small mistakes are told better by the table's own words.
MORE = 64
# Where one unit serves all tasks nothing in a module shows how many those are.
MOST_SHARING = 4096


class Unfusable(RuntimeError):
    """Says in one sentence why a module is not what its table could express."""


def require_counts(family: Callable[..., Table], tasks, arguments: Sequence, experts: int, gates: int) -> None:
    """Raise Unfusable for counts far beyond what a module has.

    Args:
        tasks, arguments: what `family` is to be called with; of other types than it takes, they are
            for it to refuse.
        experts, gates: how many of them there are on a level.
    """
    most = MOST_SHARING if families.one_unit_serves_all(family) else max(experts, gates) + MORE
    # Then the first count may be one number for every task.
    owning = "num_task_experts" in inspect.signature(family).parameters
    _require_at_most(most, tasks, "num_tasks")
    for place, argument in enumerate(arguments):
        count = argument
        if _is_list(argument):
            _require_at_most(most, len(argument), "a list of counts")
            for item in argument:
                _require_at_most(most, len(item) if _is_list(item) else 0, "a list of tasks")
            count = sum(item for item in argument if isinstance(item, int))
        elif place == 0 and owning and isinstance(argument, int) and isinstance(tasks, int):
            count = argument * tasks
        _require_at_most(experts + MORE, count, "experts of a level")


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _require_at_most(most: int, count, what: str) -> None:
    if isinstance(count, int) and count > most:
        raise Unfusable(f"{what}: expected a number that fits the experts and gates there, at most {most}, got {count}")
