"""Several inputs: against loops, on every backend; gradients by input; messages."""

import pytest
import torch

from fusedmoe import packed
from fusedmoe.activation import Activation
from fusedmoe.op import fusion_network
from fusedmoe.parts import Attention, Expert, Gate, Input, Level, Linear, Source, Task, Unit
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table
from fusedmoe.testing import assert_close, expectation, randomise

from . import oracle
from .test_grammar import DTYPES, FUSED
from .test_oracle import assert_rounding

SHAPES = ((2, 5), (1, 3), (3, 4), (1, 6))


def source(number: int, slot: int = 0, **columns) -> Source:
    return Source("input", slot, number, **columns)


def table_of() -> Table:
    """Experts, gates, attention and towers read three inputs; the last one only detached."""
    tanh = Activation("tanh")
    experts = (
        Expert((source(0, 1), source(1)), (Linear(4), tanh)),
        Expert((source(2, 2),)),
        Expert((source(0, 0, first=1, width=3), source(3, detached=True)), (Linear(4), tanh)),
    )
    units = (
        Unit(Gate(((source(1),),), (0, 1, 2))),
        Unit(Attention((source(2, 0),), ((source(2, 1),), (source(3, width=4, detached=True),)), (2, 0))),
    )
    towers = (Task((Source("slot", 0), source(1)), (Linear(2),)), Task((Source("slot", 1),), (Linear(2),)))
    return Table(tuple(Input(*shape) for shape in SHAPES), (Level(experts, units),), towers)


TABLE = table_of()
BACKENDS = FUSED


def drawn(dtype: torch.dtype, rows: int = 17) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    params = [torch.empty(p.shape, dtype=torch.float64) for p in TABLE.parameters]
    randomise(params, seed=1)
    return xs, [p.to(dtype) for p in params]


def test_the_reference_is_the_loops():
    xs, params = drawn(torch.float64, 5)
    out = fusion_network(xs, params, TABLE, "reference")
    values = {p.name: tensor.tolist() for p, tensor in zip(TABLE.parameters, params, strict=True)}
    rows = [oracle.network(TABLE, values, row)[0] for row in zip(*(x.tolist() for x in xs), strict=True)]
    assert_rounding(out, torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_of_every_input(backend, dtype):
    xs, params = drawn(dtype)
    xs[1] = xs[1][:, 0]  # one slot may come without its dimension
    tensors = [t.requires_grad_() for t in (*xs, *params)]
    out = fusion_network(xs, params, TABLE, backend)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(out, tensors, d_out, allow_unused=True)
    # The input that is read without a gradient has none.
    assert [d is None for d in found[:4]] == [False, False, False, True]
    from fusedmoe.inputs import join
    from fusedmoe.testing import Problem

    given = Problem(TABLE, join([x.detach() for x in xs], TABLE), tuple(p.detach() for p in params), d_out, ())
    truth = expectation(given, lambda x, params, table: (reference.forward(x, params, table)[0], ()))
    d_x = torch.cat([d.flatten(1) for d in found[:3]] + [torch.zeros_like(xs[3]).flatten(1)], 1)
    ours = {
        "out": out.detach(),
        "d_x": d_x[:, None],
        **dict(zip([f"d_{p.name}" for p in TABLE.parameters], found[4:], strict=True)),
    }
    assert_close(ours, truth)


def test_frozen():
    xs, params = drawn(torch.float32)
    frozen = packed.runner(TABLE)(xs, packed.pack(params, TABLE))
    assert torch.equal(frozen, fusion_network(xs, params, TABLE, "cpu"))


def test_one_input_may_come_in_a_list():
    table = Table((Input(1, 3),), (Level((Expert((Source("slot"),)),), (Unit(Gate(((Source("slot"),),), (0,))),)),))
    params, x = [torch.randn(p.shape) for p in table.parameters], torch.randn(2, 3)
    assert torch.equal(fusion_network([x], params, table), fusion_network(x, params, table))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda xs: xs[0], TypeError, "x: expected a list of 4 tensors, got Tensor"),
        (lambda xs: xs[:2], ValueError, "x: expected a list of 4 tensors, got 2 of them"),
        (lambda xs: [*xs[:3], None], TypeError, r"x\[3\]: expected a tensor, got NoneType"),
        (
            lambda xs: [*xs[:3], xs[3][:, :, :5]],
            ValueError,
            r"x\[3\]: expected \[B, 1, 6\] or \[B, 6\], got \[17, 1, 5\]",
        ),
        (lambda xs: [xs[0][0], *xs[1:]], ValueError, r"x\[0\]: expected \[B, 2, 5\], got \[2, 5\]"),
        (lambda xs: [*xs[:3], xs[3][:9]], ValueError, r"x\[3\]: expected 17 rows, as x\[0\] has, got 9"),
        (lambda xs: [*xs[:3], xs[3].double()], TypeError, r"x\[3\]: expected torch.float32 on cpu, as x\[0\] is"),
    ],
)
def test_messages(change, error, message):
    xs, params = drawn(torch.float32)
    with pytest.raises(error, match=message):
        fusion_network(change(xs), params, TABLE)
