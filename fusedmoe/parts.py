"""What a table is made of: sources, experts, gates, units, levels, tasks. `table.py` puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fusedmoe.activation import Activation

SOURCES = ("slot", "input", "unit", "expert")


@dataclass(frozen=True)
class Source:
    """Columns of a vector of a row, as an expert, a gate or a tower reads them.

    Args:
        kind: "slot" (at level 0 a slot of input 0, at a higher level a unit of the level below it),
            "input", "unit" (of any level below) or "expert" (of the level that reads).
        index: of the slot, the unit or the expert.
        place: number of the input, for "input"; of the level, for "unit".
        first: the first column that is read.
        width: how many columns; None: all from `first` on.
        detached: the value is read, and no gradient goes back through this read.
    """

    kind: str
    index: int = 0
    place: int = 0
    first: int = 0
    width: int | None = None
    detached: bool = False


@dataclass(frozen=True)
class Linear:
    """W h + b, W [width, K].

    Args:
        width: outputs.
        bias: whether there is b.
        shared: number of the table's shared tensor that is W; None: a parameter of its own.
        shared_bias: the same of b.
    """

    width: int
    bias: bool = True
    shared: int | None = None
    shared_bias: int | None = None


@dataclass(frozen=True)
class PReLU:
    """z where z > 0, else a z with a learned slope a: one, or one for each column (`channels`)."""

    channels: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """(h - mean) / sqrt(variance + eps) over the columns of a row, times gamma [K] plus beta [K].

    Args:
        eps: added to the variance (which divides by K).
        affine: whether there is gamma.
        bias: whether there is beta; only beside gamma.
    """

    eps: float = 1e-5
    affine: bool = True
    bias: bool = True


@dataclass(frozen=True)
class Dropout:
    """h / (1 - p) with probability 1 - p, else 0; in a call that trains. Otherwise h."""

    p: float = 0.5


@dataclass(frozen=True)
class Bias:
    """h + b, b [K] learned: a task's embedding.

    Args:
        shared: number of the table's shared tensor that is b; None: a parameter of its own.
    """

    shared: int | None = None


Op = Linear | Activation | PReLU | LayerNorm | Dropout | Bias


@dataclass(frozen=True)
class Expert:
    """An MLP over the concatenation of its sources; without ops a copy of it."""

    sources: tuple[Source, ...]
    ops: tuple[Op, ...] = ()


@dataclass(frozen=True)
class Gate:
    """A softmax over the experts `sees`, of logits that a linear map gives, divided by `temperature`.

    Row j of that map gives the logit of expert `sees[j]`.

    Args:
        selectors: what the gate reads, one concatenation of sources. Empty: the logits are a
            parameter [len(sees)], the same for every row. Several are alternatives of one width, of
            which a route chooses (`route.py`); without a route the first one is read.
        sees: the experts.
        hidden: what comes before the last linear map.
        bias: whether that has one.
        temperature: what the logits are divided by.
    """

    selectors: tuple[tuple[Source, ...], ...]
    sees: tuple[int, ...]
    hidden: tuple[Op, ...] = ()
    bias: bool = True
    temperature: float = 1.0


@dataclass(frozen=True)
class Attention:
    """A softmax over the experts `sees` of the logits scale * (query . keys[j]).

    Args:
        query: the concatenation of sources that is q.
        keys: one concatenation of the query's width for each expert seen.
        sees: the experts.
        scale: what the products are multiplied by, 1 / sqrt(width of the query) by custom.
    """

    query: tuple[Source, ...]
    keys: tuple[tuple[Source, ...], ...]
    sees: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Static:
    """Static weights v on `experts`: fixed `values`, or consecutive elements of the shared tensor
    number `tensor`, from `offset` on.

    `channels`: one weight for each column of each expert, [len(experts), H] of them, expert by
    expert; these are always learned.
    """

    experts: tuple[int, ...]
    values: tuple[float, ...] | None = None
    tensor: int | None = None
    offset: int = 0
    channels: bool = False


@dataclass(frozen=True)
class Unit:
    """One output of a level: experts mixed by a gate's softmax and static weights, or the product
    of two experts, elementwise. With none of these it is zero."""

    gate: Gate | Attention | None = None
    static: Static | None = None
    product: tuple[int, ...] | None = None

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """The experts whose outputs enter the unit, ascending, in the order of the sum."""
        mixed = {*(self.gate.sees if self.gate else ()), *(self.static.experts if self.static else ())}
        return tuple(sorted({*mixed, *(self.product or ())}))


@dataclass(frozen=True)
class Level:
    """E experts and U fusion units."""

    experts: tuple[Expert, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Task:
    """One task: the sources whose concatenation it reads, and the ops of its tower, if any.

    "slot" means a unit of the last level. Without a tower a task reads whole units of that level.
    """

    sources: tuple[Source, ...]
    tower: tuple[Op, ...] = ()


@dataclass(frozen=True)
class Input:
    """One input tensor: [B, slots, width], or [B, width] for one slot."""

    slots: int
    width: int


@dataclass(frozen=True)
class Draft:
    """The fields of a `Table` while it is put together: nothing is checked yet."""

    inputs: tuple[Input, ...]
    levels: tuple[Level, ...]
    tasks: tuple[Task, ...] = ()
    shared: tuple[tuple[int, ...], ...] = ()


def joined(inputs: tuple[Input, ...]) -> tuple[Input, ...]:
    """The inputs of a graph: several inputs are the columns of one slot, one after another."""
    return inputs if len(inputs) == 1 else (Input(1, column_of(inputs, len(inputs), 0)),)


def column_of(inputs: tuple[Input, ...], number: int, slot: int) -> int:
    """The column at which a slot of an input begins where all inputs are one vector."""
    before = sum(given.slots * given.width for given in inputs[:number])
    return before + (slot * inputs[number].width if slot else 0)


def from_slots(*indices: int) -> tuple[Source, ...]:
    """Return what reads these slots of the level, one after another."""
    return tuple(Source("slot", index) for index in indices)


def mlp(widths: Sequence[int], kind: Activation, bias: bool = True) -> tuple[Op, ...]:
    """Return the ops of linear maps of these widths, each with the activation after it."""
    return tuple(op for width in widths for op in (Linear(width, bias), kind))
