"""A network as data: which expert reads which sources, and which unit sees which experts.

    y[b,e,:]   = MLP_e(concatenation of the sources of e)
    p[b,u,:]   = softmax over sees(u) of the gate's logits
    w[b,u,e]   = p[b,u,e] + v[u,e]
    out[b,u,:] = sum over e in reads(u) of w[b,u,e] * y[b,e,:]

reads(u) are the experts that the gate sees and those of the static weights v[u].

The units of a level are the slots of the next one. Task towers may stand above the last level.
Every family in `families.py` is a function that returns a `Table`; every backend takes one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from fusedmoe.backends import TABLE_VERSION
from fusedmoe.encoding import write
from fusedmoe.graph import Graph, Node, Parameter, Reads, live_columns
from fusedmoe.parts import Draft, column_of
from fusedmoe.resolve import resolve

# The words that an encoded table begins with; the number is that of the format.
VERSION = ("fusedmoe-table", str(TABLE_VERSION))


@dataclass(frozen=True)
class Table(Draft):
    """A network.

    Args:
        inputs: the input tensors.
        levels: from the inputs upward.
        tasks: what each task reads; empty means task t reads unit t.
        shared: the shapes of learned tensors that static weights and linear maps may share.

    `graph` is the table with every reference resolved (`graph.py`), `text` the table as the
    operator takes it (`codec.py`). `live_inputs` says which inputs have a gradient, and
    `has_dropout` whether a call that trains drops something out.

    Raises: ValueError for a table that contradicts itself, or that is too large: more than 2^20
        slots, units or experts in a level, or a width or shared tensor beyond 2^40. It names the
        place, what was expected and what came.
    """

    graph: Graph = field(init=False, repr=False, compare=False)
    # The graph of all experts and selectors, also where a call's route cuts it down (`route.py`).
    whole: Graph = field(init=False, repr=False, compare=False)
    text: str = field(init=False, repr=False, compare=False)
    live_inputs: tuple[bool, ...] = field(init=False, repr=False, compare=False)
    has_dropout: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Worked out here, once: at a call it would cost more than a small network, and
        # torch.compile could not trace it.
        graph = resolve(self)
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "whole", graph)
        object.__setattr__(self, "live_inputs", self._live_inputs())
        object.__setattr__(self, "has_dropout", any(s.dropout > 0 for mlp in graph.mlps for s in mlp.stages))
        own: list[str] = []
        write(self, Table, own)
        resolved: list[str] = []
        write(graph, Graph, resolved)
        object.__setattr__(self, "text", " ".join([*VERSION, str(len(own)), *own, *resolved]))

    def __reduce__(self) -> tuple[type, tuple]:
        # What is worked out is worked out anew: a handle (`codec.handle`) is one of this process.
        return Table, (self.inputs, self.levels, self.tasks, self.shared)

    def _live_inputs(self) -> tuple[bool, ...]:
        if len(self.inputs) == 1:
            return (True,)
        ends = [column_of(self.inputs, i, 0) for i in range(len(self.inputs) + 1)]
        columns = live_columns(self.graph)
        return tuple(
            any(first < end and begin < first + width for first, width in columns)
            for begin, end in itertools.pairwise(ends)
        )

    @property
    def reads(self) -> Mapping[Node, Reads]:
        """What every node of the graph reads."""
        return self.graph.reads

    def computes(self, node: Node) -> bool:
        """Whether some output depends on the weights of a unit."""
        return self.graph.levels[node.place].units[node.number].computed

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter, in the operator's order.

        These are the experts and then the gates of each level, the towers, and the shared tensors.
        A linear map has its weight [width, K], then its bias [width] if it has one. The last map of
        a gate is [len(sees), K].
        """
        return self.whole.parameters

    @property
    def output(self) -> tuple[int, ...]:
        """(T, width of the towers), or without towers (U, H): the output is [B, *output]."""
        return self.whole.output

    @property
    def mixing(self) -> int:
        """Mixing weights of a row, all levels: sum of U x E."""
        return self.whole.mixing

    @property
    def has_towers(self) -> bool:
        """Whether task towers stand above the last level."""
        return bool(self.whole.towers)

    @property
    def flops(self) -> int:
        """FLOPs of a row's forward: 2 per multiply-add of computed linear maps and mixing weights."""
        return self.graph.flops
