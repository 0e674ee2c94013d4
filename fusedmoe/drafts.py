"""What the families put their drafts together from, and what makes a table of a draft.

A family in `families.py` is a function that returns a `Draft`, under the decorator `family`, which
has it checked once, when it is complete. own[i] are the experts of owner i, a task or what the
tasks share.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ParamSpec, TypeVar

from fusedmoe.activation import Activation
from fusedmoe.activation import activation as activation_of
from fusedmoe.parts import Draft, Expert, Gate, Input, Level, Linear, Op, Source, Static, Task, Unit, from_slots, mlp
from fusedmoe.table import Table
from fusedmoe.validation import MOST_SLOTS, require_count_per_task, require_integer, require_sequence

Arguments = ParamSpec("Arguments")
# A draft, or a table, which is checked.
Network = TypeVar("Network", bound=Draft)


def table_of(draft: Draft) -> Table:
    """Return the table that a draft has become. Raises: as `Table`."""
    return Table(draft.inputs, draft.levels, draft.tasks, draft.shared)


def family(draft: Callable[Arguments, Draft]) -> Callable[Arguments, Table]:
    """Wrap a function that returns a Draft so that it returns a checked Table."""

    @functools.wraps(draft)
    def build(*arguments: Arguments.args, **named: Arguments.kwargs) -> Table:
        return table_of(draft(*arguments, **named))

    build.__signature__ = inspect.signature(draft).replace(return_annotation="Table")  # type: ignore[attr-defined]
    return build


def draft_of(family: Callable[..., Table]) -> Callable[..., Draft]:
    """Return the function that a family was made of: a caller that edits the draft validates it
    once, at the end."""
    return inspect.unwrap(family)


def with_towers(table: Network, ops: tuple[Op, ...], tasks: tuple[Task, ...] = ()) -> Network:
    """Put one tower of these ops on each of `tasks`, the table's tasks, or one task per unit.

    Returns: a table with output [B, T, width of the last op].
    Raises: ValueError for no ops.
    """
    if not ops:
        raise ValueError("ops: expected at least one op, got none")
    tasks = tasks or table.tasks or unit_tasks(table.levels[-1])
    return replace(table, tasks=tuple(replace(task, tower=tuple(ops)) for task in tasks))


def unit_tasks(level: Level) -> tuple[Task, ...]:
    """One task for each unit of the last level."""
    return tuple(Task(from_slots(u)) for u in range(len(level.units)))


def share_input(table: Network) -> Network:
    """Return a table over x [B, 1, D] that computes what this one does when every slot holds the
    same x."""

    def on_slot_0(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(replace(source, index=0) if source.kind == "slot" else source for source in sources)

    def unit_on_slot_0(unit: Unit) -> Unit:
        if not isinstance(unit.gate, Gate):
            return unit
        return replace(unit, gate=replace(unit.gate, selectors=tuple(map(on_slot_0, unit.gate.selectors))))

    first = table.levels[0]
    experts = tuple(replace(expert, sources=on_slot_0(expert.sources)) for expert in first.experts)
    level = Level(experts, tuple(map(unit_on_slot_0, first.units)))
    inputs = (Input(1, table.inputs[0].width), *table.inputs[1:])
    return replace(table, inputs=inputs, levels=(level, *table.levels[1:]))


def finish(draft: Draft, kind: str | Activation, towers: Sequence[int], tasks: tuple[Task, ...] = ()) -> Draft:
    """Hand the units to these tasks or the draft's, under towers whose last layer is linear."""
    widths = require_sequence(towers, "towers")
    if not widths:
        return replace(draft, tasks=tasks or draft.tasks)
    return with_towers(draft, (*mlp(widths[:-1], activation_of(kind)), Linear(widths[-1])), tasks)


def experts_on(slots: Sequence[int], widths: Sequence[int], kind: str | Activation) -> tuple[Expert, ...]:
    """One expert per entry of `slots`, all with layers of these widths."""
    ops = mlp(tuple(widths), activation_of(kind))
    return tuple(Expert(from_slots(index), ops) for index in slots)


def see_all(
    own: Sequence[tuple[int, ...]],
    level: int,
    widths: Sequence[int],
    static: Callable[[int, int], Static | None],
    kind: str | Activation,
) -> Level:
    """One unit per owner of experts, gated on its own slot over all experts."""
    every = tuple(range(sum(map(len, own))))
    units = tuple(Unit(Gate((from_slots(u),), every), static(level, u)) for u in range(len(own)))
    return Level(experts_on(owners(own), widths, kind), units)


def without_shared_unit(levels: tuple[Level, ...], num_tasks: int) -> tuple[Level, ...]:
    """Drop the shared unit of the last level, which no task reads."""
    return (*levels[:-1], replace(levels[-1], units=levels[-1].units[:num_tasks]))


def ones(experts: tuple[int, ...]) -> Static:
    """Static weights of 1."""
    return Static(experts, values=(1.0,) * len(experts))


def same_unit(num_tasks: int) -> tuple[Task, ...]:
    """Tasks that all read unit 0."""
    return (Task(from_slots(0)),) * require_integer(num_tasks, "num_tasks", 1, MOST_SLOTS)


def counts_of(num_tasks: int, num_task_experts: int | Sequence[int], num_shared_experts: int) -> list[int]:
    """The number of experts of each owner: of every task, and last the shared ones."""
    return [
        *require_count_per_task(num_tasks, num_task_experts),
        require_integer(num_shared_experts, "num_shared_experts", 0, MOST_SLOTS),
    ]


def owned(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """The expert indices of each owner, owners in order: [2, 1] gives [(0, 1), (2,)]."""
    indices = iter(range(require_integer(sum(counts), "num_task_experts and num_shared_experts, all", 0, MOST_SLOTS)))
    return [tuple(next(indices) for _ in range(count)) for count in counts]


def owners(own: Sequence[tuple[int, ...]]) -> list[int]:
    """The owner of each expert, which is the slot it reads: [(0, 1), (2,)] gives [0, 0, 1]."""
    return [owner for owner, mine in enumerate(own) for _ in mine]
