"""Random tables over the whole grammar of `fusedmoe/parts.py`, from a seed."""

from random import Random

from fusedmoe.activation import Activation
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

# Every vector has this many columns, so that anything can be shared, mixed and multiplied.
WIDTH = 4
# Shared: a weight of linear maps over one vector, a bias, static weights.
SHARED = ((WIDTH, WIDTH), (WIDTH,), (3, 2 * WIDTH))
WEIGHT, BIAS, STATIC = range(3)
MOST_EXPERTS = 3


class Grammar:
    """Draws tables of one or two levels. plain: of linear maps, linear gates and whole sources alone."""

    def __init__(self, seed: int, plain: bool = False):
        self.random, self.all = Random(seed), not plain

    def table(self) -> Table:
        inputs = self.random.randint(1, 2)
        counts = [inputs]
        levels = []
        for _ in range(self.random.randint(1, 2)):
            levels.append(self.level(counts))
            counts.append(len(levels[-1].units))
        tasks = tuple(self.task(counts) for _ in range(self.random.randint(0, 2)))
        return Table((Input(inputs, WIDTH),), tuple(levels), tasks, SHARED)

    def task(self, counts: list[int]) -> Task:
        sources = self.sources(counts, 0)
        return Task(sources, self.ops(sum(source.width or WIDTH for source in sources), 3))

    def chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def source(self, counts: list[int], experts: int) -> Source:
        """One whole source, perhaps detached."""
        detached = self.all and self.chance(15)
        if experts and self.chance(20):
            return Source("expert", self.random.randrange(experts), detached=detached)
        if self.chance(60):
            return Source("slot", self.random.randrange(counts[-1]), detached=detached)
        place = self.random.randrange(len(counts))
        kind, place = ("unit", place - 1) if place else ("input", 0)
        count = counts[place + 1 if kind == "unit" else 0]
        return Source(kind, self.random.randrange(count), place, detached=detached)

    def sources(self, counts: list[int], experts: int, joined: bool = True) -> tuple[Source, ...]:
        """One source, two, or some columns of one."""
        first = self.source(counts, experts)
        if joined and self.chance(25):
            return (first, self.source(counts, experts))
        if self.all and self.chance(15):
            return (Source(first.kind, first.index, first.place, 1, 2, first.detached),)
        return (first,)

    def ops(self, width: int, out: int | None) -> tuple[Op, ...]:
        """Linear maps and what follows them, from `width` columns to `out` where that is given."""
        ops: list[Op] = []
        for last in [False] * self.random.randint(0, 1) + [True]:
            columns = out if last and out else self.random.randint(2, 5)
            shared = self.all and width == columns == WIDTH and self.chance(40)
            ops.append(Linear(columns, True, WEIGHT, BIAS) if shared else Linear(columns, self.chance(70)))
            width = columns
            if self.all and self.chance(25):
                affine = self.chance(70)
                ops.append(LayerNorm(affine=affine, bias=self.chance(70)))
            if self.all and self.chance(15):
                ops.append(Bias(BIAS if width == WIDTH and self.chance(50) else None))
            if self.all and self.chance(25):
                ops.append(PReLU(self.chance(50)))
            elif self.chance(70):
                ops.append(Activation(self.random.choice(("tanh", "silu", "sigmoid"))))
            if self.all and self.chance(20):
                ops.append(Dropout(0.4))
        return tuple(ops)

    def expert(self, counts: list[int], before: int) -> Expert:
        sources = self.sources(counts, before)
        width = sum(source.width or WIDTH for source in sources)
        if width == WIDTH and self.chance(25):
            return Expert(sources)
        return Expert(sources, self.ops(width, WIDTH))

    def seen(self, experts: int) -> tuple[int, ...]:
        return tuple(self.random.sample(range(experts), self.random.randint(1, experts)))

    def gate(self, counts: list[int], experts: int) -> Gate | Attention:
        sees = self.seen(experts)
        if self.all and self.chance(30):
            keys = tuple((self.source(counts, experts),) for _ in sees)
            return Attention((self.source(counts, experts),), keys, sees, 0.5)
        if self.all and self.chance(20):
            return Gate((), sees, temperature=2.0)
        sources = self.sources(counts, experts, joined=self.all)
        width = sum(source.width or WIDTH for source in sources)
        hidden = self.ops(width, None) if self.chance(30) else ()
        return Gate((sources,), sees, hidden, self.chance(70), 0.5 if self.all and self.chance(30) else 1.0)

    def static(self, experts: int) -> Static:
        seen = self.seen(experts)
        if self.all and self.chance(30):
            return Static(seen, tensor=STATIC, offset=self.random.randint(0, 3), channels=True)
        if self.chance(50):
            return Static(seen, tensor=STATIC, offset=self.random.randint(0, 3))
        return Static(seen, tuple(self.random.uniform(-1, 1) for _ in seen))

    def unit(self, counts: list[int], experts: int) -> Unit:
        if self.all and self.chance(20):
            return Unit(product=(self.random.randrange(experts), self.random.randrange(experts)))
        gate = self.gate(counts, experts) if self.chance(80) else None
        return Unit(gate, self.static(experts) if self.chance(40) or gate is None else None)

    def level(self, counts: list[int]) -> Level:
        experts = self.random.randint(2, MOST_EXPERTS)
        return Level(
            tuple(self.expert(counts, before) for before in range(experts)),
            tuple(self.unit(counts, experts) for _ in range(self.random.randint(1, 3))),
        )
