"""The tables that tests and benchmarks run on, and the cases made of them."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import cycle

from fusedmoe.activation import Activation, activation
from fusedmoe.families import FAMILIES
from fusedmoe.parts import Expert, Gate, Input, Level, Linear, Op, Source, Static, Task, Unit, from_slots, mlp
from fusedmoe.table import Table
from fusedmoe.testing.measure import KINKED, Case

# The cases of a family each of what gates can read, and of every feature: what runs where a case
# takes seconds.
QUICK = (
    "every_feature",
    "adatt_sp-odd",
    "adatt-empty_gate",
    "mmoe-odd",
    "ml_mmoe-one_row",
    "ple-ragged",
    "cross_stitch-tiny",
    "customized_sharing-odd",
)

# The activation of a family's tiny, ragged, one-expert and empty-gate cases; between them they
# cover all; the others use relu.
ACTIVATION = dict(
    zip(
        FAMILIES,
        cycle(
            (
                "silu",
                "gelu",
                "tanh",
                "gelu_tanh",
                "sigmoid",
                "leaky_relu",
                "elu",
                "softplus",
                "identity",
                "silu",
                "relu",
                "gelu",
            )
        ),
        strict=False,
    )
)


def build(family: str, width: int, widths: list[list[int]], tasks: int, experts: int | list[int], **more) -> Table:
    """Return a family's table with `experts` experts per task and as many shared ones.

    `experts` may be a list with a number for each task. If tasks own none, it is the total.

    Its signature says which of these it takes; a family of one level, which refuses several, gets
    the first of `widths`.
    """
    function = FAMILIES[family]
    count = experts if isinstance(experts, int) else max(experts)
    counts = {"num_experts": count, "num_task_experts": experts, "num_shared_experts": count}
    offered = {**counts, "borrows": [list(dict.fromkeys((t, (t + 1) % tasks))) for t in range(tasks)]}
    more |= {name: value for name, value in offered.items() if name in inspect.signature(function).parameters}
    try:
        return function(width, widths, tasks, **more)
    except ValueError:
        return function(width, widths[:1], tasks, **more)


def ragged(table: Table) -> Table:
    """Give the experts of each level different depths: expert e gets e % 3 more layers."""
    levels = []
    for level in table.levels:
        experts = []
        for e, expert in enumerate(level.experts):
            width, kind = expert.ops[-2:]
            assert isinstance(kind, Activation)
            experts.append(replace(expert, ops=(*mlp([3 + 2 * e + j for j in range(e % 3)], kind), width, kind)))
        levels.append(replace(level, experts=tuple(experts)))
    return replace(table, levels=tuple(levels))


def smoothed(value):
    """A table, or any part of one, with silu for every activation that has a kink."""
    if isinstance(value, Activation):
        return Activation("silu") if value.name in KINKED else value
    if isinstance(value, tuple):
        return tuple(map(smoothed, value))
    if not is_dataclass(value):
        return value
    return replace(value, **{field.name: smoothed(getattr(value, field.name)) for field in fields(value) if field.init})


def with_empty_gate(table: Table) -> Table:
    """Let unit 0 of every level see nothing: it is zero, a slot of zeros for the level above."""
    empty = Unit(Gate((from_slots(0),), ()))
    return replace(table, levels=tuple(replace(level, units=(empty, *level.units[1:])) for level in table.levels))


def every_feature() -> Table:
    """One table with every feature.

    It has two slots, selectors of all kinds, hidden layers in gates, gates and layers without bias,
    static weights fixed, learned and shared between levels, experts and units that no output needs,
    an empty gate, a unit without anything, and towers that share a unit.
    """

    def layers(*widths: int, name: str = "relu", bias: bool = True) -> tuple[Op, ...]:
        return mlp(widths, activation(name), bias)

    def expert(index: int, ops: tuple[Op, ...]) -> Expert:
        return Expert(from_slots(index), ops)

    root = ((Source("input", 1),),)
    lower = Level(
        (
            expert(0, layers(5, 4, name="tanh")),
            expert(1, layers(4, bias=False)),
            expert(0, layers(6, 3, 5, 4, name="elu")),
            expert(1, layers(4)),
            expert(0, layers(4)),
        ),
        (
            Unit(Gate((from_slots(1),), (2, 0), layers(3, name="gelu"))),
            Unit(Gate(((Source("expert", 3),),), (0, 1), bias=False), Static((1, 2), tensor=0, offset=1)),
            Unit(Gate(root, (1, 2)), Static((2,), (0.5,))),
            Unit(Gate((from_slots(0),), ())),
            Unit(),
            Unit(Gate((from_slots(0),), (4,))),
        ),
    )
    upper = Level(
        (
            expert(0, layers(3)),
            expert(1, layers(7, 3, name="silu")),
            expert(4, layers(3)),
            expert(3, layers(3)),
            expert(2, (Linear(3), Activation("leaky_relu", 0.2))),
        ),
        (
            Unit(Gate(root, (0, 1, 4)), Static((0,), tensor=0)),
            Unit(static=Static((1, 2, 3), tensor=1)),
            Unit(Gate(((Source("expert", 0),),), (3, 1))),
            Unit(static=Static((0,), tensor=2)),
        ),
    )
    towers = (
        Task(from_slots(0), layers(4, 2)),
        Task(from_slots(1, 0), layers(2, name="sigmoid")),
        Task(from_slots(2), layers(3, 2, bias=False)),
    )
    return Table((Input(2, 5),), (lower, upper), towers, ((2, 3), (3,), (1,)))


@cache
def cases() -> dict[str, Case]:
    """By name, `every_feature` and each family tiny, odd, ragged, of one row or expert ..."""
    result = {"every_feature": Case(every_feature(), 70)}
    for family, name in ACTIVATION.items():
        odd = build(family, 13, [[9, 11], [7]], 3, 2, towers=(5, 1))
        result |= {
            f"{family}-tiny": Case(build(family, 2, [[2], [2]], 2, 2, activation=name), 3),
            f"{family}-odd": Case(odd, 37),
            f"{family}-one_row": Case(odd, 1),
            f"{family}-one_expert": Case(build(family, 5, [[4], [3]], 2, 1, activation=name), 5),
            f"{family}-ragged": Case(ragged(build(family, 6, [[5], [7]], 3, [1, 3, 2], activation=name)), 19),
            f"{family}-empty_gate": Case(with_empty_gate(build(family, 6, [[5], [4]], 2, 2, activation=name)), 7),
        }
    return result
