"""Autocast on Triton: the call computes in autocast's dtype, as eager's linear maps do, and
gradients come back in float32."""

import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fusedmoe.casting import cast as cast_params
from fusedmoe.families import mmoe
from fusedmoe.kernels import device, self_test
from fusedmoe.kernels.lowering import lower
from fusedmoe.kernels.plan import plan_of
from fusedmoe.nn import AdaTTSp
from fusedmoe.op import fusion_network
from fusedmoe.swap import fuse
from fusedmoe.testing import Case, build, problem

from ..interpreter import Operators

TABLE = build("adatt_sp", 6, [[5, 4], [3]], 2, 2, activation="silu", towers=(3, 1))
DTYPES = [torch.bfloat16, torch.float16]


def wide() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    given = problem(Case(TABLE, 9), torch.float32)
    return given.x.requires_grad_(), [p.requires_grad_() for p in given.params], given.d_out


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("upstream", [torch.float32, "lowered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_has_autocasts_dtype_where_the_backend_lowers_to_it(dtype, upstream, backend):
    x, params, _ = wide()
    with torch.autocast("cpu", dtype=dtype):
        out, weights = fusion_network(
            x.to(dtype if upstream == "lowered" else upstream), params, TABLE, backend, return_mixing_weights=True
        )
    expected = torch.float32 if (backend, dtype) == ("cpu", torch.float16) else dtype
    assert out.dtype == expected and {w.dtype for w in weights} == {expected}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_those_of_lowered_tensors(dtype):
    """The same bits, and gradients of them in float32."""
    x, params, d_out = wide()
    with torch.autocast("cpu", dtype=dtype):
        out = fusion_network(x, params, TABLE, "triton")
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *params)]
    low = fusion_network(leaves[0], leaves[1:], TABLE, "triton")
    assert torch.equal(out, low)
    ours = torch.autograd.grad(out, [x, *params], d_out.to(dtype), allow_unused=True)
    theirs = torch.autograd.grad(low, leaves, d_out.to(dtype), allow_unused=True)
    assert all(
        a is b is None or (a.dtype == torch.float32 and torch.equal(a, b.float()))
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_layer_trains_under_autocast():
    torch.manual_seed(0)
    layer = AdaTTSp(8, [[8]], 2, 1)
    fuse(layer, backend="triton")
    head = nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-2)
    x, y = torch.randn(16, 2, 8), torch.randn(16, 2, 1)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(head(layer(x)).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_under_torch_compile():
    x, params, _ = wide()

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fusion_network(x, params, TABLE, "triton")

    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_are_cast_in_one_piece(dtype):
    """One operator for all, each at a multiple of 16 bytes; twice differentiable, as plain casts
    are."""
    params = [torch.randn(shape, requires_grad=True) for shape in ((3, 5), (3,), (), (2, 4, 1), (1, 7))]
    with Operators() as operators:
        cast = cast_params(params, dtype)
    assert operators.names == ["_foreach_copy_"]
    assert all(
        torch.equal(a, b.to(dtype)) and a.is_contiguous() and a.data_ptr() % 16 == 0
        for a, b in zip(cast, params, strict=True)
    )
    d = [torch.randn_like(one).requires_grad_() for one in cast]
    first = torch.autograd.grad(cast[:-1], params, d[:-1], create_graph=True, allow_unused=True)
    assert first[-1] is None and all(
        a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(first[:-1], d[:-1], strict=True)
    )
    (second,) = torch.autograd.grad(first[0].sum(), d[0])
    assert torch.equal(second, torch.ones_like(second))


@pytest.fixture
def no_tables(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(device, "_ADDRESSES", OrderedDict())
    monkeypatch.setattr(device, "_OFFSETS", OrderedDict())


def test_new_memory_of_a_known_layout_is_not_uploaded(no_tables):
    """What a CUDA graph may not: the addresses of cast parameters are computed from the distances
    between them, which stay. What comes again is."""
    params = [torch.randn(3, 5), torch.randn(3)]
    casts = [cast_params(params, torch.bfloat16) for _ in range(2)]
    said = []
    for cast in (casts[0], *[casts[1]] * 3):
        with Operators() as operators:
            table, even = device.addresses(cast, params[0].device)
        assert table.tolist() == [one.data_ptr() for one in cast] and even
        said.append(operators.names)
    # `torch.tensor` makes one from numbers, and lifts it.
    assert said == [["lift_fresh"] * 2, ["add"], ["lift_fresh"], []]


def test_a_table_that_a_graph_will_write_is_not_kept(no_tables, monkeypatch):
    params = [torch.randn(3, 5), torch.randn(3)]
    first, second = (cast_params(params, torch.bfloat16) for _ in range(2))
    device.addresses(first, params[0].device)
    monkeypatch.setattr(device, "capturing", lambda _: True)
    for _ in range(2):
        with Operators() as operators:
            assert device.addresses(second, params[0].device)[0].tolist() == [one.data_ptr() for one in second]
        assert operators.names == ["add"]


def test_what_a_graph_cannot_have_is_refused(no_tables, monkeypatch):
    """Copies from the host: the caller is told to make a call before the capture."""
    monkeypatch.setattr(device, "capturing", lambda _: True)
    for call in (
        lambda: device.addresses([torch.randn(3, 5)], torch.device("cpu")),
        lambda: device.written(plan_of(lower(mmoe(5, [[3]], 2, 7)), True, 2, 16), torch.device("cpu")),
        lambda: self_test.check(torch.device("cpu"), torch.float64, "triton"),
    ):
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured: expected a call with this network"):
            call()


def test_what_stays_on_a_gpu_is_made_by_another_thread(monkeypatch):
    """Of the memory pool that torch.compile lends to the calling one for its CUDA graphs nothing
    may stay."""
    monkeypatch.setattr(device, "capturing", lambda _: False)
    there, here = (device.persistent(torch.device(name), threading.get_ident) for name in ("cuda", "cpu"))
    assert there != threading.get_ident() == here
