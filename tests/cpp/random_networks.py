"""Random tables of all that the C++ test covers, from a seed: sources, ops, gates and static weights
of every kind, products, shared weights, towers."""

from __future__ import annotations

import random

from fusedmoe.activation import DEFAULT_PARAMETER, Activation
from fusedmoe.parts import (
    Attention,
    Bias,
    Dropout,
    Expert,
    Gate,
    Input,
    LayerNorm,
    Level,
    Linear,
    Op,
    PReLU,
    Source,
    Static,
    Task,
    Unit,
)
from fusedmoe.table import Table

# Neither of them is PyTorch's default, which a kernel might have built in.
PARAMETERS = {"leaky_relu": 0.2, "elu": 0.7}
KINDS = {name: Activation(name, PARAMETERS.get(name, 0.0)) for name in DEFAULT_PARAMETER}

WIDEST, MOST_LEVELS, MOST_EXPERTS, MOST_UNITS = 40, 3, 5, 4


class RandomNetwork:
    """One random table; `build` is called once."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.given = Input(self.random.randint(1, 3), self.random.randint(1, WIDEST))
        # Where weights are shared the linear maps have few widths, so that some have one shape.
        self.shares = self.chance(40)
        # Whether more than linear maps, activations, linear gates and mixes may come.
        self.more = self.chance(40)
        self.few_widths = [self.random.randint(1, WIDEST) for _ in range(2)]
        self.shared: list[tuple[int, ...]] = []
        self.linears: dict[tuple[int, ...], int] = {}  # shared tensors of linear maps, by shape
        self.units: list[list[int]] = []  # widths, by level
        self.experts: list[int] = []  # widths, of the level that is built

    def build(self) -> Table:
        """Return the table."""
        count = self.random.randint(1, MOST_LEVELS)
        towers = self.chance(60)
        levels = tuple(self.level(towers or number + 1 < count) for number in range(count))
        self.experts = []
        width = self.random.randint(1, 4)
        tasks = []
        for _ in range(self.random.randint(1, 3) if towers else 0):
            sources, columns = self.sources(slots_first=True)
            tasks.append(Task(sources, self.ops(columns, width, self.random.randint(1, 2))))
        return Table((self.given,), levels, tuple(tasks), tuple(self.shared))

    def chance(self, percent: int) -> bool:
        return self.random.random() < percent / 100

    def width(self) -> int:
        return self.random.choice(self.few_widths) if self.shares else self.random.randint(1, WIDEST)

    def some(self, choices: list[int], least: int = 0) -> tuple[int, ...]:
        """At least `least` of the choices, in any order."""
        return tuple(self.random.sample(choices, self.random.randint(min(least, len(choices)), len(choices))))

    def level(self, two_widths: bool) -> Level:
        """A level; all that one unit reads has one width, and the units may have two."""
        widths = [self.width(), self.width()] if two_widths and self.chance(40) else [self.width()]
        self.experts = []
        experts = tuple(self.expert(self.random.choice(widths)) for _ in range(self.random.randint(1, MOST_EXPERTS)))
        units, found = [], []
        for _ in range(self.random.randint(1, MOST_UNITS)):
            width = self.random.choice(self.experts)
            units.append(self.unit([e for e, other in enumerate(self.experts) if other == width]))
            found.append(width)
        self.units.append(found)
        return Level(experts, tuple(units))

    def expert(self, width: int) -> Expert:
        if self.chance(15):
            sources, _ = self.sources(columns=width)
            self.experts.append(width)
            return Expert(sources)
        sources, columns = self.sources()
        ops = self.ops(columns, width, self.random.randint(1, 3))
        self.experts.append(width)
        return Expert(sources, ops)

    def ops(self, columns: int, width: int, count: int) -> tuple[Op, ...]:
        """`count` linear maps, the last one of this width, each with an activation."""
        ops: list[Op] = []
        for left in reversed(range(count)):
            out = self.width() if left else width
            ops.append(self.linear(columns, out))
            # Of one column it is 0 in exact arithmetic, and its gradient too: nothing to compare with.
            if self.more and out > 1 and self.chance(25):
                ops.append(LayerNorm(affine=self.chance(70), bias=self.chance(70)))
            if self.more and self.chance(20):
                ops.append(Bias())
            ops.append(PReLU(self.chance(50)) if self.more and self.chance(25) else self.activation())
            if self.more and self.chance(25):
                ops.append(Dropout(self.random.choice([0.1, 0.5, 0.9])))
            columns = out
        return tuple(ops)

    def activation(self) -> Activation:
        return self.random.choice(list(KINDS.values()))

    def linear(self, columns: int, width: int) -> Linear:
        bias = self.chance(80)
        shared = self.tensor((width, columns)) if self.shares and self.chance(60) else None
        shared_bias = self.tensor((width,)) if self.shares and bias and self.chance(40) else None
        return Linear(width, bias, shared, shared_bias)

    def tensor(self, shape: tuple[int, ...]) -> int:
        """The shared tensor of linear maps that has this shape."""
        if shape not in self.linears:
            self.linears[shape] = len(self.shared)
            self.shared.append(shape)
        return self.linears[shape]

    def sources(self, columns: int | None = None, slots_first: bool = False) -> tuple[tuple[Source, ...], int]:
        """Sources of so many columns, or of any number, and that number."""
        sources: list[Source] = []
        total, wanted = 0, self.random.choice([1, 1, 2, 3])
        while total < columns if columns else len(sources) < wanted:
            kind, index, place, whole = self.vector("slot" if slots_first and not sources else None)
            most = min(whole, columns - total) if columns else whole
            width = most if columns or self.chance(60) else self.random.randint(1, most)
            first = self.random.randint(0, whole - width)
            # `width` may be left out where it is the rest.
            left_out = first + width == whole and self.chance(50)
            sources.append(Source(kind, index, place, first, None if left_out else width, self.chance(12)))
            total += width
        return tuple(sources), total

    def vector(self, kind: str | None = None) -> tuple[str, int, int, int]:
        """Kind, index, place and width of anything that may be read."""
        kinds = ["slot", "slot", "input", *(["unit"] if self.units else []), *(["expert"] if self.experts else [])]
        kind, place = kind or self.random.choice(kinds), 0
        inputs = [self.given.width] * self.given.slots
        if kind == "unit":
            place = self.random.randrange(len(self.units))
        widths = {
            "slot": self.units[-1] if self.units else inputs,
            "input": inputs,
            "unit": self.units[place] if self.units else [],
            "expert": self.experts,
        }[kind]
        index = self.random.randrange(len(widths))
        return kind, index, place, widths[index]

    def unit(self, experts: list[int]) -> Unit:
        """A unit that reads some of these experts, or nothing where all have one width."""
        least = int(len(experts) < len(self.experts))
        gate = static = None
        if self.more and self.chance(15):
            return Unit(product=(self.random.choice(experts), self.random.choice(experts)))
        if least or self.chance(80):
            if self.more and self.chance(40):
                return Unit(self.other_gate(self.some(experts, 1)), self.static(self.some(experts)))
            selector, columns = self.sources()
            hidden = self.ops(columns, self.width(), 1) if self.chance(50) else ()
            sees = self.some(experts, max(least, self.chance(90)))
            temperature = self.random.choice([1.0, 1.0, 0.5, 3.0])
            gate = Gate((selector,), sees, hidden, self.chance(80), temperature)
        if self.chance(50):
            static = self.static(self.some(experts))
        return Unit(gate, static)

    def other_gate(self, sees: tuple[int, ...]) -> Gate | Attention:
        """A gate without a selector, or attention over keys of the query's width."""
        if self.chance(50):
            return Gate((), sees, temperature=self.random.choice([1.0, 0.5]))
        query, columns = self.sources()
        return Attention(query, tuple(self.sources(columns)[0] for _ in sees), sees, columns**-0.5)

    def static(self, experts: tuple[int, ...]) -> Static:
        if self.more and experts and self.chance(40):
            self.shared.append((len(experts), self.experts[experts[0]]))
            return Static(experts, tensor=len(self.shared) - 1, channels=True)
        if self.chance(50):
            return Static(experts, tuple(self.random.uniform(-2, 2) for _ in experts))
        offset = self.random.randint(0, 2)
        self.shared.append((max(1, offset + len(experts) + self.random.randint(0, 1)),))
        return Static(experts, tensor=len(self.shared) - 1, offset=offset)
