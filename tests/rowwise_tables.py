"""Tables of everything that GPU backends do row by row: by hand, one for each operation, and sizes
that a warp has in several turns."""

from dataclasses import replace

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
    PReLU,
    Source,
    Static,
    Task,
    Unit,
    from_slots,
)
from fusedmoe.table import Table

SILU, TANH, GELU = Activation("silu"), Activation("tanh"), Activation("gelu")


def passed(*experts: int) -> tuple[Unit, ...]:
    """Units that are one expert each."""
    return tuple(Unit(static=Static((expert,), (1.0,))) for expert in experts)


def stages(width: int, hidden: int) -> Table:
    """LayerNorm with gamma and beta, with gamma, without; PReLU of one slope and of one a column; a bias
    of its own; in front of linear maps, between them and behind them; in experts, gates and towers."""
    experts = (
        Expert(from_slots(0), (Linear(hidden), LayerNorm(), PReLU(True), Linear(hidden), SILU)),
        Expert(from_slots(1), (LayerNorm(affine=False), Linear(hidden), PReLU())),
        Expert(from_slots(1), (PReLU(True), PReLU(), Linear(hidden))),
        Expert(from_slots(0), (Bias(), TANH, Linear(hidden, False), LayerNorm(1e-3, bias=False), GELU)),
        Expert(from_slots(1), (Linear(hidden), Bias(), SILU, Bias(), PReLU(True))),
    )
    gate = Gate((from_slots(0),), (0, 1, 2, 3, 4), (Linear(5), LayerNorm(), SILU))
    level = Level(experts, (Unit(gate), Unit(Gate((from_slots(1),), (3, 1))), *passed(3)))
    towers = (
        Task(from_slots(0), (Linear(6), LayerNorm(), PReLU())),
        Task(from_slots(1, 2), (LayerNorm(), Linear(6), TANH)),
        Task(from_slots(2), (Linear(6), SILU)),
    )
    return Table((Input(2, width),), (level,), towers)


def drops(width: int, hidden: int) -> Table:
    """Dropout behind linear maps, with and without an activation, LayerNorm, in gates and in towers; also of
    nothing, and of nearly all."""
    experts = (
        Expert(from_slots(0), (Linear(hidden), SILU, Dropout(0.3), Linear(hidden), Dropout(0.5))),
        Expert(from_slots(1), (LayerNorm(), Dropout(0.25), Linear(hidden), TANH)),
        Expert(from_slots(1), (Linear(hidden), Dropout(0.0), SILU, Dropout(0.96875))),
    )
    gate = Gate((from_slots(0),), (0, 1, 2), (Linear(5), SILU, Dropout(0.5)))
    level = Level(experts, (Unit(gate), *passed(1, 2)))
    towers = (Task(from_slots(0), (Linear(3), Dropout(0.4))), Task(from_slots(1, 2), (Dropout(0.6), Linear(3))))
    return Table((Input(2, width),), (level,), towers)


def without_kinks(table: Table) -> Table:
    """The table with silu for every PReLU that rounded numbers reach: in 16 bits nearly every row has
    one within rounding of zero. Of slots it is exact."""

    def smooth(mlp):
        return tuple(
            SILU if i and isinstance(op, PReLU) and not isinstance(mlp[0], PReLU) else op for i, op in enumerate(mlp)
        )

    levels = tuple(
        replace(level, experts=tuple(replace(expert, ops=smooth(expert.ops)) for expert in level.experts))
        for level in table.levels
    )
    return replace(table, levels=levels, tasks=tuple(replace(task, tower=smooth(task.tower)) for task in table.tasks))


def gathers(width: int, hidden: int) -> Table:
    """Columns of slots and of units, twice of the same; copies of several; gates on several; detached."""
    part = width // 3
    lower = Level(
        (
            Expert((Source("slot", 0, first=1, width=part), Source("slot", 1)), (Linear(hidden), SILU)),
            Expert((Source("slot", 0, first=2, width=part), Source("slot", 0, first=1, width=hidden - part))),
            Expert((Source("slot", 1, detached=True),), (Linear(hidden), TANH)),
            Expert((Source("expert", 1), Source("expert", 0, detached=True)), (Linear(hidden), TANH)),
        ),
        (
            Unit(Gate(((Source("slot", 0), Source("slot", 1, detached=True)),), (0, 1, 3))),
            Unit(Gate(((Source("expert", 2, first=1, width=2),),), (2, 3), (Linear(4), SILU))),
            *passed(1),
        ),
    )
    upper = Level(
        (
            Expert((Source("slot", 0, first=1, width=hidden - 1), Source("unit", 1, 0, 0, 1)), (Linear(hidden), SILU)),
            Expert((Source("unit", 2, 0, detached=True),), (Linear(hidden),)),
            Expert((Source("slot", 1),)),
        ),
        (Unit(Gate(((Source("unit", 0, 0, 0, 3), Source("input", 1, 0, 2, 2)),), (0, 1, 2))), *passed(0)),
    )
    return Table((Input(2, width),), (lower, upper))


def mixes(width: int, hidden: int, experts: int = 4) -> Table:
    """A temperature, free logits, attention, with fixed and learned static weights, also one a column;
    a product, one of an expert with itself; experts that gates do not see."""
    everyone = tuple(range(experts))
    some = (*everyone[2:], 0)
    shared = ((experts + 2,), (2 * experts * hidden + 3,))
    first = Level(
        tuple(Expert(from_slots(e % 2), (Linear(hidden), SILU if e % 2 else TANH)) for e in everyone),
        (
            Unit(Gate((from_slots(0),), some, temperature=0.5), Static(everyone, tensor=0, offset=1)),
            Unit(Gate((), everyone, temperature=2.0), Static((1, 0), (0.5, -1.0))),
            Unit(Attention((Source("expert", 0),), tuple((Source("expert", e),) for e in some), some, hidden**-0.5)),
            Unit(Gate((from_slots(1),), some), Static(everyone, tensor=1, offset=2, channels=True)),
            Unit(static=Static((2, 0), tensor=1, channels=True)),
            Unit(product=(0, 1)),
            Unit(product=(1, 1)),
            Unit(Gate((), (0, 2)), Static((0, 3), tensor=0)),
        ),
    )
    keys = tuple((Source("slot", u),) for u in (1, 2))
    second = Level(
        (
            Expert(from_slots(0, 7), (Linear(3),)),
            Expert(from_slots(3, 6), (Linear(3), SILU)),
            Expert(from_slots(4, 5), (Linear(3),)),
        ),
        (
            Unit(Attention((Source("slot", 0, detached=True),), keys, (2, 0), 0.5)),
            Unit(Gate(((Source("unit", 1, 0),),), (0, 1, 2), temperature=3.0)),
        ),
    )
    return Table((Input(2, width),), (first, second), shared=shared)


def shares(width: int, hidden: int) -> Table:
    """Linear maps that share W and b, W alone, b alone, also with an operation that adds b; in one
    level, in two, and with a tower."""
    shared = ((hidden, width), (hidden,), (hidden, hidden), (hidden,))
    both = Linear(hidden, True, 0, 1)
    inner = Linear(hidden, False, 2)
    lower = Level(
        (
            Expert(from_slots(0), (both, TANH)),
            Expert(from_slots(1), (both, SILU)),
            Expert(from_slots(0), (Linear(hidden, True, 0), SILU, inner)),
            Expert(from_slots(1), (Linear(hidden, True, shared_bias=3), TANH, Bias(3))),
        ),
        (Unit(Gate((from_slots(0),), (0, 1, 2))), Unit(Gate((from_slots(1),), (3, 1)))),
    )
    upper = Level((Expert(from_slots(0), (inner, SILU)), Expert(from_slots(1), (inner, Bias(1)))), passed(0, 1))
    return Table(
        (Input(2, width),),
        (lower, upper),
        (Task(from_slots(0), (inner,)), Task(from_slots(1), (Linear(hidden), SILU))),
        shared,
    )


def branches(width: int, hidden: int) -> Table:
    """What is computed and has no gradient: units that are read detached alone, and what they read; an
    expert that a gate alone reads, detached."""
    lower = Level(
        (Expert(from_slots(0), (Linear(hidden), LayerNorm())), Expert(from_slots(1), (Linear(hidden), PReLU()))),
        (
            Unit(Gate((from_slots(0),), (0, 1), temperature=2.0), Static((0,), tensor=0)),
            Unit(Gate((from_slots(1),), (1, 0), (Linear(3), LayerNorm()))),
            Unit(product=(0, 1)),
        ),
    )
    stopped = tuple(Source("slot", u, detached=True) for u in range(3))
    selector = Gate(((Source("expert", 2, detached=True),),), (1, 0))
    upper = Level(
        (
            Expert(stopped, (Linear(hidden), SILU)),
            Expert((Source("input", 0),), (Linear(hidden),)),
            Expert((Source("input", 1),), (Linear(hidden),)),
        ),
        (*passed(0, 1), Unit(selector)),
    )
    return Table((Input(2, width),), (lower, upper), shared=((1,),))


def copies(width: int) -> Table:
    """No linear map at all: what is row-wise alone, and columns that another lane has written."""
    shifted = (Source("expert", 1, first=1), Source("slot", 0, first=0, width=1))
    level = Level(
        (Expert(from_slots(0)), Expert(from_slots(1), (LayerNorm(), PReLU(True))), Expert(shifted)),
        (
            Unit(Gate((), (0, 1, 2))),
            Unit(product=(0, 2)),
            Unit(Attention(from_slots(0), (from_slots(1), (Source("expert", 2),)), (1, 0), 0.1)),
        ),
    )
    return Table((Input(2, width),), (level,))


TABLES = {
    "stages, odd": stages(21, 9),
    "stages, whole vectors": stages(48, 80),
    "gathers, odd": gathers(21, 11),
    "gathers, whole vectors": gathers(48, 48),
    "mixes, odd": mixes(13, 7),
    "mixes, whole vectors": mixes(32, 64),
    "mixes of more than a warp": mixes(5, 3, 35),
    "mixes of wide vectors": mixes(5, 150),
    "shares, odd": shares(21, 13),
    "shares, whole vectors": shares(96, 80),
    "branches": branches(10, 6),
    "copies": copies(19),
}
