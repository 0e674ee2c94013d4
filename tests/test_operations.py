"""What no family's table has, one thing at a time: sources, ops, gates, static weights and units,
against the reference in float64; wide enough that kernels take columns in several tiles."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fusedmoe.activation import Activation
from fusedmoe.backends import INTERPRETED
from fusedmoe.op import fusion_network
from fusedmoe.parts import (
    Attention,
    Bias,
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
from fusedmoe.testing import assert_parity, eager, evaluate

from .cuda_on_cpu.extension import KIND
from .random_tables import start

WIDTH = 136
FUSED = ("triton",) if INTERPRETED else ("cuda",) if KIND else ("cpu", "reference")
X, Y = from_slots(0)[0], from_slots(1)[0]
SUM = Unit(static=Static((0, 1), (1.0, -0.5)))
GATE = Unit(Gate(((X,),), (0, 1)))
A, B = Source("expert", 0), Source("expert", 1)
LINEARS = Expert((X,), (Linear(WIDTH), Activation("tanh"))), Expert((Y,), (Linear(WIDTH), Activation("silu")))


def table(experts=LINEARS, units=(SUM,), tasks=(), shared=(), above=()) -> Table:
    return Table((Input(2, WIDTH),), (Level(tuple(experts), tuple(units)), *above), tuple(tasks), tuple(shared))


def of_ops(*ops) -> Table:
    """An expert of these ops beside one of a linear map, and both as experts that a gate reads."""
    return table((Expert((X,), ops), LINEARS[1]), (GATE, Unit(Gate(((A,),), (1, 0)))))


TABLES = {
    "LayerNorm": of_ops(LayerNorm()),
    "LayerNorm without parameters": of_ops(LayerNorm(0.5, affine=False), Activation("gelu")),
    "LayerNorm between linear maps": of_ops(Linear(40), LayerNorm(bias=False), Activation("silu"), Linear(WIDTH)),
    "PReLU": of_ops(Linear(WIDTH), PReLU()),
    "PReLU by column": of_ops(LayerNorm(), PReLU(True), Linear(WIDTH), PReLU(True)),
    "activations alone": of_ops(Activation("tanh"), Activation("leaky_relu", 0.3)),
    "biases": of_ops(Bias(), Activation("elu"), Bias()),
    "some columns": table((Expert((replace(X, first=8, width=40),), (Linear(WIDTH),)), LINEARS[1])),
    "columns from an odd one on": table(
        (Expert((replace(X, first=3, width=133), replace(Y, first=1, width=3))), LINEARS[1])
    ),
    "overlapping columns": table(
        (Expert((replace(X, width=100), replace(X, first=64, width=36))), LINEARS[1]), (GATE, SUM)
    ),
    "a detached source": table((Expert((replace(X, detached=True), Y), (Linear(WIDTH),)), LINEARS[1]), (GATE,)),
    "a gate on several sources": table(units=(Unit(Gate(((X, Y),), (0, 1))), Unit(Gate(((A, X),), (1,))))),
    "a temperature": table(units=(Unit(Gate(((X,),), (1, 0), (Linear(7), LayerNorm()), temperature=0.5)), SUM)),
    "a free gate": table(units=(Unit(Gate((), (1, 0), temperature=2.0), Static((0,), (0.25,))),)),
    "attention": table(units=(Unit(Attention((X,), ((Y,), (X,)), (1, 0), 0.1)), SUM)),
    "attention of experts": table(units=(Unit(Attention((A,), ((A,), (B,)), (0, 1), 0.2)),)),
    "attention of some columns": table(
        units=(
            Unit(
                Attention((replace(X, width=5), Y), ((Y, replace(X, first=131)), (A, replace(B, width=5))), (0, 1), 0.1)
            ),
        )
    ),
    "static weights by column": table(
        units=(
            Unit(GATE.gate, Static((1,), tensor=0, offset=5, channels=True)),
            Unit(static=Static((0, 1), tensor=0, channels=True)),
        ),
        shared=((3, WIDTH),),
    ),
    "learned static weights in a mix": table(
        units=(Unit(Gate((), (1,)), Static((0, 1), tensor=0, offset=1)), Unit(static=Static((1,), tensor=0))),
        shared=((3,),),
    ),
    "products": table(units=(Unit(product=(0, 1)), Unit(product=(1, 1)))),
    "a unit of nothing": table(units=(Unit(), Unit(product=(0, 1)))),
    "a linear map of two experts": table(
        (Expert((X,), (Linear(WIDTH, False, 0),)), Expert((Y,), (Linear(WIDTH, True, 0, 1), Activation("tanh")))),
        (GATE,),
        shared=((WIDTH, WIDTH), (WIDTH,)),
    ),
    "a linear map over joined sources, twice": table(
        (Expert((X, Y), (Linear(WIDTH, True, 0),)), Expert((Y, X), (Linear(WIDTH, True, 0),))),
        (GATE,),
        shared=((WIDTH, 2 * WIDTH),),
    ),
    "a bias of everything": table(
        (Expert((X,), (Linear(WIDTH, True, None, 0),)), Expert((Y,), (Bias(0),))),
        (Unit(static=Static((0, 1), tensor=0)), GATE),
        shared=((WIDTH,),),
    ),
    "towers": table(
        units=(GATE, SUM),
        tasks=(
            Task((X, Source("input", 1)), (LayerNorm(), Linear(3), PReLU())),
            Task((replace(Y, first=1, width=9),), (Linear(3), Bias(), Activation("sigmoid"))),
        ),
    ),
    "nothing but copies": table((Expert((X,)), Expert((Y,))), (Unit(Gate((), (0, 1))), Unit(product=(0, 1)))),
}
# What no gradient reaches, and what then has one all the same.
DETACHED = {
    "a level": table(
        units=(GATE, Unit(Gate((), (0, 1)), Static((1,), tensor=0))),
        shared=((2,),),
        above=(
            Level(
                (Expert((replace(X, detached=True), replace(Y, detached=True)), (Linear(4),)),),
                (Unit(static=Static((0,), (1.0,))),),
            ),
        ),
    ),
    "a dense level": table(
        units=(GATE, Unit(GATE.gate, Static((1,), tensor=0))),
        shared=((2,),),
        above=(
            Level(
                (Expert((replace(X, detached=True), replace(Y, detached=True)), (Linear(4),)),),
                (Unit(static=Static((0,), (1.0,))),),
            ),
        ),
    ),
    "a selector": table(units=(Unit(Gate(((replace(A, detached=True),),), (1,), (Linear(4), PReLU()))),)),
}
# The interpreter and the emulator take long: in one of 16 bits in `make test`.
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]


def on(backend: str):
    return partial(fusion_network, backend=backend, return_mixing_weights=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("backend", FUSED)
def test_a_backend_is_the_reference(backend, what, dtype):
    assert_parity(on(backend), start(TABLES[what], 9, dtype))


@pytest.mark.parametrize("what", DETACHED)
@pytest.mark.parametrize("backend", FUSED)
def test_what_is_detached_has_no_gradient(backend, what):
    assert_parity(on(backend), start(DETACHED[what], 5, torch.float32))


@pytest.mark.parametrize("what", ["overlapping columns", "attention of some columns", "products", "nothing but copies"])
@pytest.mark.parametrize("backend", FUSED)
def test_one_x_for_all_slots(backend, what):
    given = start(TABLES[what], 9, torch.float32)
    assert_parity(on(backend), given._replace(x=given.x[:, :1].expand_as(given.x)))


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("backend", FUSED)
def test_inference_and_recomputing(backend, what):
    """Inference is as near as training, where kernels may sum in another order; what a backward has
    computed again has the same bits."""
    given = start(TABLES[what], 9, torch.float32)
    whole, again = evaluate(on(backend), given), evaluate(partial(on(backend), recompute=True), given)
    assert [name for name, value in whole.items() if value is not None and not torch.equal(value, again[name])] == []

    def inference(x, params, table):
        with torch.no_grad():
            return on(backend)(x, params, table)

    assert_parity(inference, given, [name for name in whole if not name.startswith("d_")])


@pytest.mark.parametrize("what", [*TABLES, *DETACHED])
@pytest.mark.parametrize("backend", FUSED)
def test_an_infinite_input_makes_infinite_what_it_does_in_plain_torch(backend, what):
    given = start({**TABLES, **DETACHED}[what], 5, torch.float32)
    given.x[1, 1, 0] = float("inf")
    ours, plain = evaluate(on(backend), given), evaluate(eager, given)
    kinds = {name: (ours[name], value) for name, value in plain.items() if value is not None}
    assert [name for name, (a, b) in kinds.items() if not torch.equal(a.isfinite(), b.isfinite())] == []


SHARED_WITH_WHAT_HAS_NO_GRADIENT = {
    "a bias": (Expert((X,), (Bias(0),)), Unit(static=Static((0,), (1.0,)))),
    "weights of channels": (Expert((X,)), Unit(static=Static((0,), tensor=0, channels=True))),
}


@pytest.mark.parametrize("what", SHARED_WITH_WHAT_HAS_NO_GRADIENT)
@pytest.mark.parametrize("backend", FUSED)
def test_a_tensor_that_what_has_no_gradient_shares(backend, what):
    """Twice, and after a network that leaves other numbers in the kernels' memory."""
    expert, unit = SHARED_WITH_WHAT_HAS_NO_GRADIENT[what]
    above = replace(expert, sources=(replace(X, detached=True),))
    last = Level((above,), (Unit(static=Static((0,), (1.0,))),))
    table = Table((Input(1, WIDTH),), (Level((expert,), (unit,)), replace(last, units=(unit,))), (), ((WIDTH,),))
    evaluate(on(backend), start(TABLES["products"], 70, torch.float32))
    assert_parity(on(backend), start(table, 70, torch.float32))


@pytest.mark.parametrize("last", [(PReLU(),), (LayerNorm(),), (LayerNorm(), PReLU(True))], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_two_towers_and_many_rows(backend, last):
    tasks = tuple(Task((X,), (Linear(3), *last)) for _ in range(2))
    level = Level((Expert((X,)),), (Unit(static=Static((0,), (1.0,))),))
    assert_parity(on(backend), start(Table((Input(1, 4),), (level,), tasks), 257, torch.float32))
