"""Random tables for hypothesis, and random numbers for a table."""

from dataclasses import replace

import hypothesis.strategies as st
import torch

from fusedmoe.activation import DEFAULT_PARAMETER, activation
from fusedmoe.table import Expert, Gate, Layer, Level, Selector, Static, Table, Task, Unit
from fusedmoe.testing import KINKED, Problem, randomise

NARROW = st.integers(1, 9)
SMOOTH = sorted(set(DEFAULT_PARAMETER) - set(KINKED))
LEARNED = (3, 4)


@st.composite
def layers(draw, widths, width=None, most: int = 3):
    """1 to `most` layers, the last of a given width."""
    result = draw(
        st.lists(
            st.builds(Layer, widths, st.sampled_from(SMOOTH).map(activation), st.booleans()), min_size=1, max_size=most
        )
    )
    return (*result[:-1], replace(result[-1], width=width)) if width else tuple(result)


def subset(count: int, least: int = 0):
    return st.lists(st.integers(0, count - 1), unique=True, min_size=least, max_size=count).map(tuple)


@st.composite
def gates(draw, widths, slots: int, experts: int):
    kind = draw(st.sampled_from(["slot", "root", "expert"]))
    index = draw(st.integers(0, {"slot": slots, "root": 1, "expert": experts}[kind] - 1))
    return Gate(
        Selector(kind, index), draw(subset(experts)), draw(st.just(()) | layers(widths, most=2)), draw(st.booleans())
    )


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
            Expert(slot, draw(layers(widths, width)))
            for slot in draw(st.lists(st.integers(0, slots - 1), min_size=1, max_size=4))
        )
        unit = st.builds(Unit, st.none() | gates(widths, slots, len(experts)), st.none() | statics(len(experts)))
        built.append(Level(experts, tuple(draw(st.lists(unit, min_size=1, max_size=3)))))
        slots = len(built[-1].units)
    width = draw(widths)
    tasks = draw(
        st.just(())
        | st.lists(st.builds(Task, subset(slots, 1), layers(widths, width, 2)), min_size=1, max_size=2).map(tuple)
    )
    return Table(inputs, draw(widths), tuple(built), tasks, (LEARNED,), draw(st.integers(0, inputs - 1)))


def start(table: Table, rows: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Random numbers for a table, four seeds of them from 4 x `seed` on."""
    x, d_out = torch.empty(rows, table.slots, table.width, dtype=dtype), torch.empty(rows, *table.output, dtype=dtype)
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
