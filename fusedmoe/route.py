"""A route: which of the experts that each gate sees a call uses, and which of the gate's selectors.

A search draws a route a step. Its call runs the table's network with some pairs of unit and expert
left out: they are skipped, not multiplied by zero, and experts that nothing reads any more are not
computed. No table is built for it: what changes is worked out from the table's graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusedmoe.encoding import read, write
from fusedmoe.graph import Gate, Graph, Liveness, Node, Reads, Unit, liveness, reads_of_unit, with_liveness
from fusedmoe.table import Table
from fusedmoe.validation import require_indices

# The words between a table's text and a route's.
ROUTE = "route"


@dataclass(frozen=True)
class Choice:
    """What one unit does in a call.

    Args:
        experts: those of `Gate.sees` that the unit reads, at least one; the others do not enter it,
            and the softmax is over these. (An expert of the static weights alone always enters.)
        selector: the number of the gate's selector.
    """

    experts: tuple[int, ...]
    selector: int = 0


Route = Sequence[Sequence[Choice | None]]


class Routed(Table):
    """A table of which a call takes one route: what `fusion_network` takes in its place.

    It has the levels, the parameters and the shapes of its table; `graph` is that of the route. What
    a route leaves out is skipped; experts and parameters that no unit needs then have the gradient
    None. No table is built for it; bench/results/parts.json has what it costs.

    Args:
        table: the network.
        route: of every level, of every unit a `Choice`, or None for all experts and the first
            selector.

    Raises: TypeError, ValueError for a route that leaves a unit no expert, or names an expert that
        its gate does not see or a selector that it does not have.
    Source: MTNAS, the routes that its search draws.
    """

    def __init__(self, table: Table, route: Route):
        if not isinstance(table, Table) or isinstance(table, Routed):
            raise TypeError(f"table: expected a fusedmoe.Table without a route, got {type(table).__name__}")
        fields = {name: value for name, value in vars(table).items() if name in ("inputs", "levels", "tasks", "shared")}
        vars(self).update(
            fields, base=table, whole=table.graph, live_inputs=table.live_inputs, has_dropout=table.has_dropout
        )
        vars(self).update(changed=_changed(table, route))
        reads = dict(table.graph.reads)
        for (number, u), unit in self.changed.items():
            reads.update(reads_of_unit(unit, number, u))
        vars(self).update(reads=reads, liveness=liveness(reads, table.graph.outputs))
        if len(table.inputs) > 1:
            vars(self).update(live_inputs=self._live_inputs())
        vars(self).update(route_text=(words := self._words()), text=f"{table.text} {words}")

    base: Table
    changed: dict[tuple[int, int], Unit]
    liveness: Liveness
    reads: dict[Node, Reads]
    route_text: str

    def computes(self, node: Node) -> bool:
        """As the table's."""
        return node in self.liveness.computed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Routed) and (self.base, self.route_text) == (other.base, other.route_text)

    def __hash__(self) -> int:
        return hash((self.base, self.route_text))

    def __repr__(self) -> str:
        return f"Routed({self.base!r}, {route_of(self)!r})"

    @property
    def graph(self) -> Graph:  # type: ignore[override]
        """The graph of the route, made when it is first asked for."""
        if "made" not in vars(self):
            vars(self)["made"] = self._graph()
        return vars(self)["made"]

    def _graph(self) -> Graph:
        levels = tuple(
            replace(level, units=tuple(self.changed.get((number, u), unit) for u, unit in enumerate(level.units)))
            for number, level in enumerate(self.whole.levels)
        )
        return with_liveness(replace(self.whole, levels=levels), self.liveness)

    def _words(self) -> str:
        """The route as words: of each level a digit an expert; of each unit a digit, the selector and
        the places that its gate leaves out; a digit a parameter. A digit is 1 for what is computed,
        2 more for what has a gradient."""
        alive, words = self.liveness, [ROUTE]

        def digit(here: Any, computed: set, differentiated: set) -> str:
            return str((here in computed) + 2 * (here in differentiated))

        for number, level in enumerate(self.whole.levels):
            nodes = [Node("expert", number, e) for e in range(len(level.experts))]
            words.append("".join(digit(node, alive.computed, alive.differentiated) for node in nodes))
            for u, unit in enumerate(level.units):
                gate = self.changed.get((number, u), unit).gate
                words.append(digit(Node("unit", number, u), alive.computed, alive.differentiated))
                write(gate.choice if gate else 0, int, words)
                write(gate.closed if gate else (), tuple[int, ...], words)
        words.append("".join(digit(i, alive.numbers, alive.live) for i in range(len(self.whole.parameters))))
        return " ".join(words)

    def __reduce__(self) -> tuple[type, tuple]:
        return Routed, (self.base, route_of(self))


def route_of(routed: Routed) -> Route:
    """The choices of every unit that has some."""
    return tuple(
        tuple(
            Choice(tuple(gate.seen), gate.choice)
            if (gate := routed.changed[number, u].gate if (number, u) in routed.changed else None)
            else None
            for u in range(len(level.units))
        )
        for number, level in enumerate(routed.whole.levels)
    )


def with_words(table: Table, words: str) -> Routed:
    """Read a route back. words: `Routed.route_text` without its first word.

    Raises: ValueError for others.
    """
    tokens, route = iter(words.split()), []
    try:
        for level in table.whole.levels:
            next(tokens)
            choices: list[Choice | None] = []
            for unit in level.units:
                next(tokens)
                selector, closed = read(int, tokens), read(tuple[int, ...], tokens)
                sees = unit.gate.sees if unit.gate else ()
                chosen = Choice(tuple(e for j, e in enumerate(sees) if j not in closed), selector)
                choices.append(chosen if selector or closed else None)
            route.append(tuple(choices))
    except (StopIteration, ValueError):
        raise ValueError(f"table: expected the words of a route, got {words[:60]!r}") from None
    found = Routed(table, tuple(route))
    if found.route_text != f"{ROUTE} {words}":
        raise ValueError(f"table: expected the words of a route of this table, got {words[:60]!r}")
    return found


def _changed(table: Table, route: Any) -> dict[tuple[int, int], Unit]:
    """The units that the route changes, checked."""
    found = {}
    for number, u, choice in _choices(table, route):
        where, unit = f"route, level {number}, unit {u}", table.graph.levels[number].units[u]
        if not isinstance(choice, Choice):
            raise TypeError(f"{where}: expected a Choice or None, got {choice!r}")
        if unit.gate is None:
            raise ValueError(f"{where}: expected None, because the unit has no gate, got {choice}")
        count = len(table.levels[number].experts)
        gate = _chosen(unit.gate, choice, where, count)
        found[number, u] = replace(unit, gate=gate, reads=_reads(unit, choice))
    return found


def _choices(table: Table, route: Any) -> Iterator[tuple[int, int, Any]]:
    """(level, unit, choice) of every unit for which a route has one."""
    if not isinstance(route, Sequence) or len(route) != len(table.levels):
        raise ValueError(f"route: expected {len(table.levels)} levels, got {route!r}")
    for number, (level, choices) in enumerate(zip(table.levels, route, strict=True)):
        if not isinstance(choices, Sequence) or len(choices) != len(level.units):
            raise ValueError(f"route, level {number}: expected {len(level.units)} choices, one a unit, got {choices!r}")
        yield from ((number, u, choice) for u, choice in enumerate(choices) if choice is not None)


def _chosen(gate: Gate, choice: Choice, where: str, experts: int) -> Gate:
    require_indices(choice.experts, experts, f"{where}, experts", "experts", least=1)
    for e in choice.experts:
        if e not in gate.sees:
            raise ValueError(f"{where}, experts: expected some of {gate.sees}, got {choice.experts}")
    count = max(len(gate.mlps), 1)
    if type(choice.selector) is not int or not 0 <= choice.selector < count:
        raise ValueError(f"{where}, selector: expected one of {count} (0 to {count - 1}), got {choice.selector!r}")
    return replace(
        gate, choice=choice.selector, closed=tuple(j for j, e in enumerate(gate.sees) if e not in choice.experts)
    )


def _reads(unit: Unit, choice: Choice) -> tuple[int, ...]:
    assert unit.gate is not None
    left_out = set(unit.gate.sees) - set(choice.experts)
    return tuple(e for e in unit.reads if e not in left_out)
