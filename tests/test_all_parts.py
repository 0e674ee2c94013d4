"""PyTorch's machinery over tables that have everything: torch.compile, export, autocast, recompute,
freezing, transforms, second derivatives, threads."""

from dataclasses import fields, is_dataclass, replace
from functools import partial

import pytest
import torch

from fusedmoe import packed
from fusedmoe.activation import Activation
from fusedmoe.op import fusion_network
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
from fusedmoe.testing import Problem, assert_close, evaluate, expectation

from .random_tables import start
from .test_grammar import on, same
from .test_oracle import assert_rounding

TANH, SILU = Activation("tanh"), Activation("silu")


def everything() -> Table:
    """Every kind of source, op, gate, static weight and unit, of two levels and two towers."""
    part = Source("slot", 1, first=1, width=4)
    experts = (
        Expert((part,), (Linear(6), LayerNorm(), SILU, Linear(4, shared=0, bias=False))),
        Expert(
            (Source("expert", 0), Source("slot", 0, detached=True)), (Linear(6), TANH, Linear(4, shared=0, bias=False))
        ),
        Expert((part,)),
        Expert((Source("slot", 0),), (Linear(4), PReLU(True), Bias(1), Dropout(0.3))),
    )
    units = (
        Unit(Gate((from_slots(0, 1),), (0, 1, 3), (Linear(3), TANH), temperature=2.0)),
        Unit(Gate((), (2, 0)), Static((0, 3), tensor=2)),
        Unit(Attention((part,), ((Source("expert", 1),), (Source("expert", 3, detached=True),)), (1, 2), 0.5)),
        Unit(product=(0, 3)),
        Unit(static=Static((1, 3), tensor=3, channels=True)),
    )
    upper = (
        Expert(from_slots(0, 3), (LayerNorm(affine=False), Linear(4))),
        Expert((Source("unit", 2, 0), Source("input", 1)), (Linear(4), SILU, Dropout(0.2))),
    )
    above = (Unit(Gate((from_slots(1),), (0, 1))), Unit(Gate((from_slots(4),), (1, 0), bias=False)))
    towers = (Task(from_slots(0), (Linear(2),)), Task((Source("slot", 1), Source("unit", 4, 0)), (Linear(2), TANH)))
    shared = ((4, 6), (4,), (3,), (2, 4))
    return Table((Input(2, 5),), (Level(experts, units), Level(upper, above)), towers, shared)


def gated() -> Table:
    """One level of a norm, PReLU and dropout under two gates."""
    experts = (Expert(from_slots(0), (Linear(4), LayerNorm(), PReLU(), Dropout(0.3))), Expert(from_slots(0)))
    units = (
        Unit(Gate((from_slots(0),), (0, 1), temperature=2.0)),
        Unit(Attention(from_slots(0), (from_slots(0),), (1,))),
    )
    return Table((Input(1, 4),), (Level(experts, units),))


TABLES = {"everything": everything(), "gated": gated()}
BACKENDS = ("cpu", "reference")
by_name = pytest.mark.parametrize("name", TABLES)
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def given(name: str, rows: int, dtype: torch.dtype) -> Problem:
    return start(TABLES[name], rows, dtype)


def attached(value):
    """A table without detached reads, of which finite differences know nothing."""
    if isinstance(value, tuple):
        return tuple(attached(item) for item in value)
    if isinstance(value, Source):
        return replace(value, detached=False)
    if not is_dataclass(value):
        return value
    return replace(value, **{field.name: attached(getattr(value, field.name)) for field in fields(value) if field.init})


@by_backend
@by_name
def test_second_derivatives(name, backend):
    problem = start(attached(TABLES[name]), 2, torch.float64)
    inputs = [problem.x.requires_grad_(), *(p.requires_grad_() for p in problem.params)]

    def call(x, *params):
        out, weights = on(backend)(x, params, problem.table)
        return (out, *(w for w in weights if w.requires_grad))

    assert torch.autograd.gradcheck(call, inputs)
    # One direction each: all of them take minutes.
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


# The reference's everything takes a minute to compile.
@pytest.mark.parametrize(("name", "backend"), [("everything", "cpu"), ("gated", "cpu"), ("gated", "reference")])
def test_compiled_whole(name, backend):
    problem = given(name, 7, torch.float32)
    call = partial(fusion_network, table=problem.table, backend=backend, return_mixing_weights=True)
    compiled = torch.compile(lambda x, params, _: call(x, params), fullgraph=True, dynamic=True, backend="aot_eager")
    ours, plain = evaluate(compiled, problem), evaluate(on(backend), problem)
    if backend == "cpu":
        assert [key for key in plain if not same(ours[key], plain[key])] == []
    else:
        # The compiler sums the reference's gradients in another order.
        assert_close(ours, expectation(problem))


def test_compiled_with_inductor_and_dropout():
    problem = given("everything", 400, torch.float32)
    compiled = torch.compile(
        lambda x, params: fusion_network(x, params, problem.table, "cpu", training=True), fullgraph=True
    )
    torch.manual_seed(0)
    first, second = compiled(problem.x, problem.params), compiled(problem.x, problem.params)
    assert first.isfinite().all() and not torch.equal(first, second)


@by_backend
@by_name
def test_exported(name, backend):
    problem = given(name, 6, torch.float32)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.params = torch.nn.ParameterList([torch.nn.Parameter(p) for p in problem.params])

        def forward(self, x):
            return fusion_network(x, list(self.params), problem.table, backend)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), (problem.x,), dynamic_shapes=({0: rows},))
    x = torch.cat([problem.x, problem.x])
    assert torch.equal(program.module()(x), fusion_network(x, problem.params, problem.table, backend))


@by_name
def test_autocast(name):
    narrow = given(name, 9, torch.bfloat16)
    wide = narrow.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fusion_network(wide.x, wide.params, wide.table, "cpu")
    assert torch.equal(out, fusion_network(narrow.x, narrow.params, narrow.table, "cpu"))


@by_name
def test_recomputing_and_frozen_calls_are_the_same_bits(name):
    problem = given(name, 70, torch.float32)
    whole = evaluate(on("cpu"), problem)
    again = evaluate(partial(on("cpu"), recompute=True), problem)
    assert [key for key in whole if not same(whole[key], again[key])] == []
    plain = fusion_network(problem.x, problem.params, problem.table, "cpu")
    assert torch.equal(plain, packed.runner(problem.table)(problem.x, packed.pack(problem.params, problem.table)))


@by_backend
@by_name
def test_transforms(name, backend):
    """torch.func's grad is autograd's, and vmap over gradients is one after another."""
    problem = given(name, 4, torch.float64)

    def loss(x):
        return (fusion_network(x, problem.params, problem.table, backend) ** 2).sum()

    x = problem.x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(x), x)
    if backend == "reference":
        assert_rounding(torch.func.grad(loss)(problem.x), plain)
    out = fusion_network(x, problem.params, problem.table, backend)
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, x, upstream, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = torch.stack([torch.autograd.grad(out, x, d, retain_graph=True)[0] for d in upstream])
    assert_rounding(batched, one_by_one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@by_name
def test_narrow_dtypes(name, dtype):
    problem = given(name, 11, dtype)
    assert_close(evaluate(on("cpu"), problem), expectation(problem))
