"""Random tables for hypothesis, and random numbers for a table."""

import hypothesis.strategies as st
import torch

from fusedmoe.activation import DEFAULT_PARAMETER, activation
from fusedmoe.parts import Expert, Gate, Input, Level, Linear, Source, Static, Task, Unit
from fusedmoe.table import Table
from fusedmoe.testing import KINKED, Problem, randomise

NARROW = st.integers(1, 9)
SMOOTH = sorted(set(DEFAULT_PARAMETER) - set(KINKED))
LEARNED = (3, 4)


@st.composite
def layers(draw, widths, width=None, most: int = 3):
    """1 to `most` linear maps, each with an activation or none, the last of a given width."""
    count = draw(st.integers(1, most))
    ops = []
    for j in range(count):
        ops.append(Linear(width if width and j == count - 1 else draw(widths), draw(st.booleans())))
        ops.append(activation(draw(st.sampled_from(SMOOTH))))
    return tuple(ops)


def subset(count: int, least: int = 0):
    return st.lists(st.integers(0, count - 1), unique=True, min_size=least, max_size=count).map(tuple)


def whole_slots(count: int):
    return subset(count, 1).map(lambda indices: tuple(Source("slot", index) for index in indices))


@st.composite
def gates(draw, widths, inputs: int, slots: int, experts: int):
    kind = draw(st.sampled_from(["slot", "input", "expert"]))
    index = draw(st.integers(0, {"slot": slots, "input": inputs, "expert": experts}[kind] - 1))
    selectors = ((Source(kind, index),),)
    return Gate(selectors, draw(subset(experts)), draw(st.just(()) | layers(widths, most=2)), draw(st.booleans()))


@st.composite
def statics(draw, experts: int):
    chosen = draw(subset(experts, 1))
    if draw(st.booleans()):
        return Static(chosen, tuple(draw(st.lists(st.floats(-2, 2), min_size=len(chosen), max_size=len(chosen)))))
    return Static(chosen, tensor=0, offset=draw(st.integers(0, LEARNED[0] * LEARNED[1] - len(chosen))))


@st.composite
def tables(draw, widths=NARROW, levels: int = 3):
    """1 to `levels` levels of up to 4 experts and 3 units, any selector and static weights, towers
    or none."""
    slots = inputs = draw(st.integers(1, 3))
    built = []
    for _ in range(draw(st.integers(1, levels))):
        width = draw(widths)
        experts = tuple(
            Expert((Source("slot", index),), draw(layers(widths, width)))
            for index in draw(st.lists(st.integers(0, slots - 1), min_size=1, max_size=4))
        )
        unit = st.builds(
            Unit, st.none() | gates(widths, inputs, slots, len(experts)), st.none() | statics(len(experts))
        )
        built.append(Level(experts, tuple(draw(st.lists(unit, min_size=1, max_size=3)))))
        slots = len(built[-1].units)
    width = draw(widths)
    tasks = draw(
        st.just(())
        | st.lists(st.builds(Task, whole_slots(slots), layers(widths, width, 2)), min_size=1, max_size=2).map(tuple)
    )
    return Table((Input(inputs, draw(widths)),), tuple(built), tasks, (LEARNED,))


def start(table: Table, rows: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Random numbers for a table, four seeds of them from 4 x `seed` on."""
    (given,) = table.inputs
    x, d_out = torch.empty(rows, given.slots, given.width, dtype=dtype), torch.empty(rows, *table.output, dtype=dtype)
    params = tuple(torch.empty(p.shape, dtype=dtype) for p in table.parameters)
    d_weights = tuple(torch.empty(rows, len(level.units), len(level.experts), dtype=dtype) for level in table.levels)
    for offset, tensors in enumerate(([x], params, [d_out], d_weights)):
        randomise(tensors, 4 * seed + offset)
    return Problem(table, x, params, d_out, d_weights)


def decided(given: Problem, factor: float) -> Problem:
    """The problem with the logits of every gate multiplied by a factor: from 16 on most rows give
    one expert nearly all the weight."""
    logits = [".gates." in p.name and ".hidden." not in p.name for p in given.table.parameters]
    return given._replace(
        params=tuple(p * factor if of_logits else p for p, of_logits in zip(given.params, logits, strict=True))
    )


def leaning(given: Problem, lead: float) -> Problem:
    """The problem with `lead` added to the bias of one logit of every gate that has biases: that
    expert gets nearly all the weight.

    Unlike `decided`, which multiplies the rounding errors of logits too: tensor cores, which cut
    where others round, make larger ones.
    """

    def lead_one(bias):
        first = torch.zeros_like(bias)
        first[: min(1, len(bias))] = lead
        return bias + first

    biases = [
        ".gates." in p.name and ".hidden." not in p.name and p.name.endswith(".bias") for p in given.table.parameters
    ]
    return given._replace(
        params=tuple(lead_one(p) if is_bias else p for p, is_bias in zip(given.params, biases, strict=True))
    )
