"""Compare the counts in a module's attributes with what the module has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fusedmoe import families
from fusedmoe.table import Table

# So much may a count exceed what is there: small mistakes are told better by the table's own words.
MORE = 64
# Families of one unit for all tasks: nothing in a module shows how many those are.
SHARING, MOST_SHARING = (families.shared_bottom, families.omoe), 4096
# Families whose first count may be one number for every task.
OWNING = (families.ple, families.cgc, families.adatt_sp)


class Unfusable(RuntimeError):
    """Says in one sentence why a module is not what its table could express."""


def require_counts(family: Callable[..., Table], tasks, arguments: Sequence, experts: int, gates: int) -> None:
    """Raise Unfusable for counts far beyond what a module has.

    Args:
        tasks, arguments: what `family` is to be called with; of other types than it takes, they are
            for it to refuse.
        experts, gates: how many of them there are on a level.
    """
    most = MOST_SHARING if family in SHARING else max(experts, gates) + MORE
    _require_at_most(most, tasks, "num_tasks")
    for place, argument in enumerate(arguments):
        count = argument
        if _is_list(argument):
            _require_at_most(most, len(argument), "a list of counts")
            for item in argument:
                _require_at_most(most, len(item) if _is_list(item) else 0, "a list of tasks")
            count = sum(item for item in argument if isinstance(item, int))
        elif place == 0 and family in OWNING and isinstance(argument, int) and isinstance(tasks, int):
            count = argument * tasks
        _require_at_most(experts + MORE, count, "experts of a level")


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _require_at_most(most: int, count, what: str) -> None:
    if isinstance(count, int) and count > most:
        raise Unfusable(f"{what}: expected a number that fits the experts and gates there, at most {most}, got {count}")
