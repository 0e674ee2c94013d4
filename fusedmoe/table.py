"""A network as data: which expert reads which slot, and which unit sees which expert.

    y[b,e,:]   = MLP_e(x[b, slot(e), :])
    p[b,u,:]   = softmax over sees(u) of the gate's logits, which read the unit's selector
    w[b,u,e]   = p[b,u,e] + v[u,e]
    out[b,u,:] = sum over e in reads(u) of w[b,u,e] * y[b,e,:]

reads(u) are the experts that the gate sees and those of the static weights v[u].

The units of a level are the slots of the next one. Task towers may stand above the last level;
tower t reads the concatenation of its units. Every family in `families.py` is a function that
returns a `Table`; every backend takes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from fusedmoe.activation import RELU, Activation
from fusedmoe.encoding import write
from fusedmoe.validation import MOST_SLOTS, require_indices, require_instance, require_integer, require_tuple

SELECTORS = ("slot", "root", "expert")


@dataclass(frozen=True)
class Layer:
    """One linear map and the activation after it: act(W h + b), W [width, K]."""

    width: int
    activation: Activation = RELU
    bias: bool = True


@dataclass(frozen=True)
class Expert:
    """An MLP of one or more layers over one slot of the level."""

    slot: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Selector:
    """The vector that a gate reads.

    Args:
        kind: "slot" (a slot of the level), "root" (the root input of the network) or "expert" (the
            output of an expert of the level).
        index: of the slot or the expert.
    """

    kind: str
    index: int = 0


@dataclass(frozen=True)
class Gate:
    """A softmax over the experts `sees`.

    Row j of the last linear map gives the logit of expert `sees[j]`; `hidden` layers come before
    it.
    """

    selector: Selector
    sees: tuple[int, ...]
    hidden: tuple[Layer, ...] = ()
    bias: bool = True


@dataclass(frozen=True)
class Static:
    """Static weights v on `experts`: fixed `values`, or consecutive elements of the static tensor
    number `tensor`, from `offset` on."""

    experts: tuple[int, ...]
    values: tuple[float, ...] | None = None
    tensor: int | None = None
    offset: int = 0


@dataclass(frozen=True)
class Unit:
    """One output of a level. Without a gate p = 0; without gate and static weights it is zero."""

    gate: Gate | None = None
    static: Static | None = None

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """The experts whose outputs enter the unit, ascending, in the order of the sum."""
        return tuple(sorted({*(self.gate.sees if self.gate else ()), *(self.static.experts if self.static else ())}))


@dataclass(frozen=True)
class Level:
    """E experts and U fusion units."""

    experts: tuple[Expert, ...]
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Task:
    """One task: the units whose concatenation it reads, and the layers of its tower, if any."""

    units: tuple[int, ...]
    tower: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One parameter of the operator. `live`: some output depends on it."""

    name: str
    shape: tuple[int, ...]
    live: bool


@dataclass(frozen=True)
class Draft:
    """The fields of a `Table` while it is put together: nothing is checked yet."""

    slots: int
    width: int
    levels: tuple[Level, ...]
    tasks: tuple[Task, ...] = ()
    statics: tuple[tuple[int, ...], ...] = ()
    root: int = 0


@dataclass(frozen=True)
class Table(Draft):
    """A network over inputs x [B, slots, width].

    Args:
        slots: S, the number of input vectors of a row; 1 if all tasks share x.
        width: D, the width of one input vector.
        levels: from the input upward.
        tasks: what each task reads; empty means task t reads unit t.
        statics: the shapes of the learned static tensors, which units of any level may share.
        root: the input slot that selectors of kind "root" read.

    `text` is the table as the operator takes it (`encoding.py`).

    Raises: ValueError for a table that contradicts itself, or that is too large: more than 2^20
        slots, units or experts in a level, or a width or static tensor beyond 2^40. It names the
        place, what was expected and what came.
    """

    def __post_init__(self) -> None:
        require_integer(self.slots, "table.slots", 1, MOST_SLOTS)
        require_integer(self.width, "table.width", 1)
        require_integer(self.root, "table.root")
        if self.root >= self.slots:
            raise ValueError(f"table.root: expected one of {self.slots} slots (0 to {self.slots - 1}), got {self.root}")
        require_tuple(self.levels, Level, "table.levels")
        require_tuple(self.tasks, Task, "table.tasks")
        if not self.levels:
            raise ValueError("table.levels: expected at least one level, got none")
        require_tuple(self.statics, tuple, "table.statics")
        for i, shape in enumerate(self.statics):
            for size in shape:
                require_integer(size, f"table.statics[{i}]")
            require_integer(product(shape), f"table.statics[{i}], elements")
        widths = (self.width,) * self.slots
        for index, level in enumerate(self.levels):
            widths = self._check_level(level, f"level {index}", widths)
        self._check_tasks(widths)
        # The operator's argument. Written here, once: at a call it would cost more than a small
        # network, and torch.compile could not trace it.
        tokens: list[str] = []
        write(self, Table, tokens)
        object.__setattr__(self, "text", " ".join(tokens))

    def _check_level(self, level: Level, where: str, slots: tuple[int, ...]) -> tuple[int, ...]:
        """Check one level over slots of these widths; return the widths of its units."""
        require_tuple(level.experts, Expert, f"{where}, experts")
        require_tuple(level.units, Unit, f"{where}, units")
        if not level.experts:
            raise ValueError(f"{where}: expected at least one expert, got none")
        if not level.units:
            raise ValueError(f"{where}: expected at least one unit, got none")
        # The units are the slots of the next level; experts are counted as widely.
        require_integer(len(level.units), f"{where}, number of units", 1, MOST_SLOTS)
        require_integer(len(level.experts), f"{where}, number of experts", 1, MOST_SLOTS)
        for e, expert in enumerate(level.experts):
            require_indices((expert.slot,), len(slots), f"{where}, expert {e}, slot", "slots")
            _check_layers(expert.layers, f"{where}, expert {e}", 1)
        outputs = tuple(expert.layers[-1].width for expert in level.experts)
        return tuple(self._check_unit(unit, f"{where}, unit {u}", slots, outputs) for u, unit in enumerate(level.units))

    def _check_unit(self, unit: Unit, where: str, slots: tuple[int, ...], outputs: tuple[int, ...]) -> int:
        """Check one unit over experts of these output widths; return its width."""
        if unit.gate is not None:
            gate = unit.gate
            require_instance(gate, Gate, f"{where}, gate")
            require_instance(gate.selector, Selector, f"{where}, selector")
            require_instance(gate.bias, bool, f"{where}, bias of the gate")
            require_indices(gate.sees, len(outputs), f"{where}, sees", "experts")
            _check_layers(gate.hidden, f"{where}, hidden layers of the gate", 0)
            if gate.selector.kind not in SELECTORS:
                raise ValueError(
                    f"{where}, selector: expected one of {', '.join(SELECTORS)}, got {gate.selector.kind!r}"
                )
            count = {"slot": len(slots), "root": 1, "expert": len(outputs)}[gate.selector.kind]
            require_indices((gate.selector.index,), count, f"{where}, selector", f"{gate.selector.kind}s")
        if unit.static is not None:
            require_instance(unit.static, Static, f"{where}, static weights")
            self._check_static(unit.static, f"{where}, static weights", len(outputs))
        widths = {outputs[e] for e in unit.reads} or set(outputs)
        if len(widths) != 1:
            raise ValueError(f"{where}: expected experts of one output width, got widths {sorted(widths)}")
        return widths.pop()

    def _check_static(self, static: Static, where: str, experts: int) -> None:
        require_indices(static.experts, experts, where, "experts")
        require_integer(static.offset, f"{where}, offset")
        if (static.values is None) == (static.tensor is None):
            raise ValueError(
                f"{where}: expected either fixed values or a static tensor, got "
                f"{'neither' if static.values is None else 'both'}"
            )
        if static.values is not None:
            floats = isinstance(static.values, tuple) and all(
                isinstance(v, float) and math.isfinite(v) for v in static.values
            )
            if not floats or len(static.values) != len(static.experts):
                raise ValueError(
                    f"{where}: expected a tuple of {len(static.experts)} finite floats, got {static.values!r}"
                )
            return
        require_indices((static.tensor,), len(self.statics), where, "static tensors")
        assert static.tensor is not None
        size = product(self.statics[static.tensor])
        if static.offset + len(static.experts) > size:
            last = static.offset + len(static.experts) - 1
            raise ValueError(
                f"{where}: expected elements within the {size} of static tensor {static.tensor}, got "
                f"{static.offset} to {last}"
            )

    def _check_tasks(self, widths: tuple[int, ...]) -> None:
        """Check the tasks over units of these widths."""
        for t, task in enumerate(self.tasks):
            require_indices(task.units, len(widths), f"task {t}, units", "units of the last level", 1)
            _check_layers(task.tower, f"task {t}, tower", 0)
        towers = [bool(task.tower) for task in self.tasks]
        if any(towers) and not all(towers):
            raise ValueError(f"task {towers.index(False)}: expected a tower, as the other tasks have, got none")
        if any(towers):
            widths = tuple(task.tower[-1].width for task in self.tasks)
        if len(set(widths)) != 1:
            raise ValueError(
                f"{'tower outputs' if any(towers) else 'last level'}: expected one width, got widths "
                f"{sorted(set(widths))}"
            )
        read = [widths[0] * len(task.units) for task in self.tasks]
        if not any(towers) and len(set(read)) > 1:
            raise ValueError(f"table.tasks: expected tasks of one width, got widths {read}; give them towers")

    @cached_property
    def has_towers(self) -> bool:
        """Whether task towers stand above the last level."""
        return any(task.tower for task in self.tasks)

    @cached_property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """widths[l][s] is the width of slot s of level l; widths[L] are those of the last units."""
        result = [(self.width,) * self.slots]
        for level in self.levels:
            outputs = [expert.layers[-1].width for expert in level.experts]
            result.append(tuple(outputs[unit.reads[0] if unit.reads else 0] for unit in level.units))
        return tuple(result)

    @cached_property
    def output(self) -> tuple[int, int]:
        """(T, width of the towers), or without towers (U, H): the output is [B, *output]."""
        if self.has_towers:
            return len(self.tasks), self.tasks[0].tower[-1].width
        return len(self.levels[-1].units), self.widths[-1][0]

    @cached_property
    def mixing(self) -> int:
        """Mixing weights of a row, all levels: sum of U x E."""
        return sum(len(level.units) * len(level.experts) for level in self.levels)

    @cached_property
    def live(self) -> tuple[tuple[frozenset[int], frozenset[int]], ...]:
        """Per level the units and experts on which some output depends; only these are computed."""
        top = len(self.levels[-1].units)
        wanted = {u for task in self.tasks for u in task.units} if self.has_towers else set(range(top))
        result = []
        for level in reversed(self.levels):
            experts: set[int] = set()
            slots: set[int] = set()
            for u in wanted:
                gate = level.units[u].gate
                experts.update(level.units[u].reads)
                if gate and gate.sees and gate.selector.kind == "expert":
                    experts.add(gate.selector.index)
                if gate and gate.sees and gate.selector.kind == "slot":
                    slots.add(gate.selector.index)
            result.append((frozenset(wanted), frozenset(experts)))
            wanted = slots | {level.experts[e].slot for e in experts}
        return tuple(reversed(result))

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter, in the operator's order.

        These are the experts and then the gates of each level, the towers, and the static tensors.
        A layer has its weight [width, K], then its bias [width] if it has one. The last map of a
        gate is [len(sees), K].
        """
        result: list[Parameter] = []

        def layers(where: str, k: int, stack: tuple[Layer, ...], live: bool) -> int:
            for j, layer in enumerate(stack):
                result.append(Parameter(f"{where}.{j}.weight", (layer.width, k), live))
                if layer.bias:
                    result.append(Parameter(f"{where}.{j}.bias", (layer.width,), live))
                k = layer.width
            return k

        used = set()
        for number, level in enumerate(self.levels):
            units, experts = self.live[number]
            for e, expert in enumerate(level.experts):
                layers(f"levels.{number}.experts.{e}", self.widths[number][expert.slot], expert.layers, e in experts)
            for u, unit in enumerate(level.units):
                if unit.static and unit.static.tensor is not None and u in units and unit.static.experts:
                    used.add(unit.static.tensor)
                if unit.gate is None:
                    continue
                live = u in units and len(unit.gate.sees) > 0
                k = layers(f"levels.{number}.gates.{u}.hidden", self.selector_width(number, u), unit.gate.hidden, live)
                result.append(Parameter(f"levels.{number}.gates.{u}.weight", (len(unit.gate.sees), k), live))
                if unit.gate.bias:
                    result.append(Parameter(f"levels.{number}.gates.{u}.bias", (len(unit.gate.sees),), live))
        for t, task in enumerate(self.tasks):
            layers(f"towers.{t}", sum(self.widths[-1][u] for u in task.units), task.tower, True)
        for i, shape in enumerate(self.statics):
            result.append(Parameter(f"statics.{i}", tuple(shape), i in used))
        return tuple(result)

    def selector_width(self, level: int, unit: int) -> int:
        """The width of the vector that the gate of this unit reads."""
        gate = self.levels[level].units[unit].gate
        assert gate is not None
        selector = gate.selector
        if selector.kind == "expert":
            return self.levels[level].experts[selector.index].layers[-1].width
        return self.width if selector.kind == "root" else self.widths[level][selector.index]

    @cached_property
    def flops(self) -> int:
        """FLOPs of a row's forward: 2 per multiply-add of live linear maps and mixing weights."""
        maps = sum(
            2 * product(p.shape) for p in self.parameters if p.live and len(p.shape) == 2 and p.name.endswith("weight")
        )
        mixes = sum(
            2 * self.widths[i + 1][u] * len(level.units[u].reads)
            for i, level in enumerate(self.levels)
            for u in self.live[i][0]
        )
        return maps + mixes


def product(sizes: Iterable[int]) -> int:
    """The product of integers; 1 for none."""
    result = 1
    for size in sizes:
        result *= size
    return result


def _check_layers(layers: tuple[Layer, ...], where: str, least: int) -> None:
    require_tuple(layers, Layer, where)
    if len(layers) < least:
        raise ValueError(f"{where}: expected at least {least} layer, got none")
    for j, layer in enumerate(layers):
        require_integer(layer.width, f"{where}, width of layer {j}", 1)
        if not isinstance(layer.activation, Activation) or not isinstance(layer.bias, bool):
            raise ValueError(
                f"{where}, layer {j}: expected an Activation and a bool, got {layer.activation!r} and {layer.bias!r}"
            )
