"""What a backward is asked for and handed: outputs without a gradient, saved tensors of another
layout, tensors without memory.

On every backend; those whose kernels are interpreted or emulated have runs of their own, as
`test_parity` has.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fusedmoe.families import adatt_sp, ple
from fusedmoe.op import fusion_network
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table
from fusedmoe.testing import Case, assert_close, bound, cases, error, problem

from .test_parity import BACKENDS

TABLES = {
    "adatt_sp": adatt_sp(12, [[8], [8]], 3, 2, activation="silu", towers=(4, 1)),
    "ple": ple(12, [[9, 8], [7]], 3, 2, 1, activation="tanh", towers=(2,)),
}
WEIGHTS = {
    name: cases()[name].table
    for name in ("adatt_sp-odd", "ple-odd", "ml_mmoe-odd", "cross_stitch-odd", "every_feature")
}
# Plain PyTorch promises no bits, and says in its own words what it lacks.
KERNELS = [name for name in BACKENDS if name != "reference"]
DTYPE = torch.float32
BYTES = "expected a storage of [0-9]+ bytes or more, got one of [0-9]+"

Loss = Callable[[list[Tensor], tuple[Tensor, ...]], Tensor]


def leaves(table: Table, dtype: torch.dtype = DTYPE, rows: int = 5) -> tuple[Tensor, list[Tensor]]:
    given = problem(Case(table, rows), dtype)
    return given.x.clone().requires_grad_(), [p.clone().requires_grad_() for p in given.params]


def plain(x: Tensor, params: list[Tensor], table: Table, **_) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Plain PyTorch, whose own autograd differentiates it."""
    out, weights = reference.forward(x, params, table)
    return list(out.unbind(1)), weights


def gradients(network, table: Table, loss: Loss, dtype: torch.dtype = DTYPE) -> dict[str, Tensor | None]:
    x, params = leaves(table, dtype)
    outs, weights = network(x, params, table, return_mixing_weights=True, tasks_apart=True)
    found = torch.autograd.grad(loss(outs, weights), [x, *params], allow_unused=True)
    return dict(zip(["x", *(p.name for p in table.parameters)], found, strict=True))


def expectation(table: Table, loss: Loss) -> dict[str, tuple[Tensor | None, float]]:
    """Truth and bound of every gradient, by the rule of fusedmoe/testing/."""
    narrow = {name: None if d is None else d.double() for name, d in gradients(plain, table, loss).items()}
    # Of the same numbers: those that were drawn in the dtype of the test.
    x, params = (
        [t.detach().double().requires_grad_() for t in tensors] for tensors in ([leaves(table)[0]], leaves(table)[1])
    )
    found = torch.autograd.grad(loss(*plain(*x, params, table)), [*x, *params], allow_unused=True)
    truth = dict(zip(narrow, found, strict=True))
    # Of one tensor plain PyTorch's error may be nothing by luck: of all of them the worst, beside
    # the largest number.
    largest = {name: float(t.abs().max()) for name, t in truth.items() if t is not None}
    worst = max(error(narrow[name], truth[name]) / size for name, size in largest.items() if size)
    return {name: (t, 0.0 if t is None else bound(worst * largest[name], t, DTYPE)) for name, t in truth.items()}


@pytest.mark.parametrize("wanted", [(0,), (1, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_loss_on_some_tasks(table, backend, wanted):
    """Towers that the loss leaves out have no gradient, as in plain PyTorch; what is below them
    has."""

    def loss(outs, _):
        return sum(outs[t].square().sum() for t in wanted)

    expected = expectation(table, loss)
    # The reference stacks its towers' outputs, and hands down zeros.
    for name, (truth, _) in expected.items():
        if name.startswith("towers.") and int(name.split(".")[1]) not in wanted:
            assert not truth.any()
            expected[name] = None, 0.0
    assert_close(gradients(partial(fusion_network, backend=backend), table, loss), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", WEIGHTS.values(), ids=WEIGHTS)
def test_a_loss_on_the_mixing_weights_of_a_level(table, backend):
    """They depend on gates and static weights, and on what gates select, never on the experts that
    they weigh; a level sees none above it."""
    for level in range(len(table.levels)):

        def loss(_, weights, level=level):
            return weights[level].square().sum()

        assert_close(gradients(partial(fusion_network, backend=backend), table, loss), expectation(table, loss))


def strided(saved: Tensor) -> Tensor:
    """The same numbers, every second one of a larger tensor."""
    wide = saved.new_full((*saved.shape, 2), float("nan") if saved.is_floating_point() else 255)
    wide[..., 0] = saved.detach()
    return wide[..., 0]


def shifted(saved: Tensor) -> Tensor:
    """The same numbers, contiguous at an odd address."""
    long = saved.new_empty(saved.numel() + 1)
    long[1:] = saved.detach().flatten()
    return long[1:].view(saved.shape)


def reversed_layout(saved: Tensor) -> Tensor:
    """The same numbers, the first dimension the nearest."""
    order = list(range(saved.dim()))[::-1]
    return saved.detach().permute(order).contiguous().permute(order)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [strided, shifted, reversed_layout])
@pytest.mark.parametrize("backend", KERNELS)
def test_hooks_of_saved_tensors_may_change_the_layout(backend, layout, dtype, expanded, recompute):
    table = TABLES["adatt_sp"]
    x, params = leaves(table, dtype, 37)
    x = (x[:, :1].expand(-1, table.inputs[0].slots, -1) if expanded else x).detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out, weights = fusion_network(x, params, table, backend, return_mixing_weights=True, recompute=recompute)
        return torch.autograd.grad(
            out.float().square().sum() + sum(w.float().square().sum() for w in weights), [x, *params]
        )

    expected = step()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, layout):
        got = step()
    # Parameters at other addresses are read in another way, but summed in the same order.
    assert all(map(torch.equal, expected, got))


def free(tensor: Tensor) -> None:
    """What FSDP does to a parameter that it has gathered."""
    tensor.untyped_storage().resize_(0)


def halve(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


@pytest.mark.parametrize("lose", [free, halve])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_tensors_without_memory(backend, gradients, lose):
    """x, and each parameter: a bias too, which by its address alone looks like none."""
    table = TABLES["adatt_sp"]
    for number in range(-1, len(table.parameters)):
        x, params = leaves(table)
        lose(params[number] if number >= 0 else x)
        name = f"params, {table.parameters[number].name}" if number >= 0 else "x"
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=f"{name}: {BYTES}"):
            fusion_network(x, params, table, backend)


@pytest.mark.parametrize("lose", [free, halve])
@pytest.mark.parametrize("what", ["x", "params", "d_out"])
@pytest.mark.parametrize("backend", KERNELS)
def test_tensors_that_lose_their_memory_before_the_backward(backend, what, lose):
    table = TABLES["adatt_sp"]
    x, params = leaves(table)
    out = fusion_network(x, params, table, backend)
    d_out = torch.ones_like(out)
    lose({"x": x, "params": params[2], "d_out": d_out}[what])
    with pytest.raises((RuntimeError, ValueError), match=f"{what}.*: {BYTES}"):
        out.backward(d_out)


@pytest.mark.parametrize("lose", [free, halve])
@pytest.mark.parametrize("backend", KERNELS)
def test_what_forward_saved_loses_its_memory(backend, lose):
    table = TABLES["adatt_sp"]
    x, params = leaves(table, rows=64)

    def unpack(saved: Tensor) -> Tensor:
        # Neither x nor a parameter.
        if saved.shape != x.shape and all(saved.shape != p.shape for p in params):
            saved = saved.clone()
            lose(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        out = fusion_network(x, params, table, backend)
        with pytest.raises((RuntimeError, ValueError), match=f"saved.*: {BYTES}"):
            out.sum().backward()
