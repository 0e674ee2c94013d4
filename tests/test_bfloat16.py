"""bfloat16 on the cpu backend, and recomputing: parity by the rule, bits that depend on nothing
they should not, autocast."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fusedmoe import families
from fusedmoe import nn as fused_nn
from fusedmoe.op import fusion_network
from fusedmoe.reference.layers import AdaTTSp
from fusedmoe.swap import fuse
from fusedmoe.testing import Case, assert_close, bound, cases, evaluate, expectation, problem, smoothed

BF16 = torch.bfloat16
CASES = cases()
# Widths beyond a tile of 32 x 32 x 32 and its multiples, an odd one among them; rows beyond a block
# of 128.
WIDE = Case(families.ple(75, [[66, 97], [40]], 2, 2, 1, activation="silu", towers=(33, 1)), 150)
fused = partial(fusion_network, backend="cpu", return_mixing_weights=True)


@pytest.mark.parametrize("name", sorted(name for name in CASES if name.endswith(("every_feature", "odd"))))
def test_parity(name):
    """Elementwise, without kinks: in bfloat16 nearly every row has a pre-activation within rounding
    of one."""
    given = problem(CASES[name]._replace(table=smoothed(CASES[name].table)), BF16)
    assert_close(evaluate(fused, given), expectation(given))


def test_parity_of_whole_tiles():
    given = problem(WIDE, BF16)
    assert_close(evaluate(fused, given), expectation(given))


def norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())


def test_parity_with_relu_in_the_norm_of_each_gradient():
    """Rows on the other side of a kink differ wholly, few as they are: the rule holds for the norm,
    against plain torch in bfloat16."""
    table = families.adatt_sp(64, [[48], [40]], 3, 2)
    torch.manual_seed(0)
    x = torch.randn(200, 3, 64).to(BF16)
    params = [(torch.randn(p.shape) / p.shape[-1] ** 0.5).to(BF16) for p in table.parameters]
    d_out = torch.randn(200, 3, 40).to(BF16)

    def gradients(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *params)]
        return torch.autograd.grad(fusion_network(leaves[0], leaves[1:], table, backend), leaves, d_out.to(dtype))

    ours, plain, truth = gradients(BF16, "cpu"), gradients(BF16, "reference"), gradients(torch.float64, "reference")
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert norm(a.double() - exact) <= bound(norm(b.double() - exact), torch.tensor(norm(exact)), BF16)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_row_has_its_bits_in_any_batch(dtype):
    table = WIDE.table
    torch.manual_seed(0)
    params = [torch.randn(p.shape).to(dtype) for p in table.parameters]
    x, d_out = (
        torch.randn(300, table.inputs[0].slots, table.inputs[0].width).to(dtype),
        torch.randn(300, *table.output).to(dtype),
    )

    def run(first, count):
        leaf = x[first : first + count].clone().requires_grad_()
        out = fusion_network(leaf, params, table, "cpu")
        return out.detach(), torch.autograd.grad(out, leaf, d_out[first : first + count])[0]

    whole = run(0, 300)
    for first, count in ((0, 1), (299, 1), (5, 16), (130, 17), (100, 129), (31, 257)):
        for part, all_rows in zip(run(first, count), whole, strict=True):
            assert torch.equal(part, all_rows[first : first + count]), f"{count} rows from {first}"


@pytest.mark.parametrize("rows", [40, 150, 600])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_gradients_have_their_bits_on_any_number_of_threads(dtype, rows):
    given = problem(Case(smoothed(WIDE.table), rows), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(fused, given))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items() if value is not None)


def test_autocast_lowers_the_operands_and_keeps_the_parameters_gradients():
    """The same bits as parameters in bfloat16, but for the gradients' last rounding."""
    table = smoothed(WIDE.table)
    given = problem(Case(table, 70), BF16)
    x, *params = (t.float().requires_grad_() for t in (given.x, *given.params))
    with torch.autocast("cpu", dtype=BF16):
        out = fusion_network(x, params, table)
    wide = torch.autograd.grad(out, [x, *params], given.d_out)
    leaves = [t.clone().requires_grad_() for t in (given.x, *given.params)]
    low_out = fusion_network(leaves[0], leaves[1:], table)
    low = torch.autograd.grad(low_out, leaves, given.d_out)
    assert out.dtype == BF16 and torch.equal(out, low_out)
    assert all(g.dtype == torch.float32 and torch.equal(g.to(BF16), h) for g, h in zip(wide, low, strict=True))


def test_a_layer_trains_under_autocast():
    torch.manual_seed(0)
    layer = AdaTTSp(24, [[32], [16]], 2, 2)
    assert fuse(layer).fused
    head = nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
    x, y = torch.randn(64, 2, 24), torch.randn(64, 2, 1)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", dtype=BF16):
            loss = nn.functional.mse_loss(head(layer(x)).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_float32_parameters_without_autocast_are_refused():
    given = problem(Case(smoothed(CASES["ple-odd"].table), 5), BF16)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32, the parameters' dtype, got torch\.bfloat16"):
        fusion_network(given.x, [p.float() for p in given.params], given.table, "cpu")


def test_nan_and_infinity_pass():
    table = families.single_task(40, [[48]], 2)
    params = [torch.ones(p.shape, dtype=BF16) for p in table.parameters]
    x = torch.zeros(3, table.inputs[0].slots, 40, dtype=BF16)
    x[1, :, 7], x[2, :, 9] = float("nan"), float("inf")
    out = fusion_network(x, params, table, "cpu")
    assert out[0].isfinite().all() and out[1].isnan().all() and out[2].isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(name for name in CASES if name.endswith(("every_feature", "odd", "ragged"))))
def test_recomputing_gives_the_same_bits(name, dtype):
    given = problem(CASES[name]._replace(table=smoothed(CASES[name].table)), dtype)
    again = evaluate(partial(fused, recompute=True), given)
    assert all(value is None or torch.equal(value, again[name]) for name, value in evaluate(fused, given).items())


def saved_bytes(recompute: bool) -> int:
    """Bytes that a training forward of an AdaTT layer keeps, parameters and x aside."""
    table = families.adatt_sp(256, [[256], [128]], 3, 2)
    x, *params = (torch.randn(s).requires_grad_() for s in ((64, 3, 256), *(p.shape for p in table.parameters)))
    own, seen = {t.data_ptr() for t in (x, *params)}, {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fusion_network(x, params, table, "cpu", recompute=recompute)
    return sum(seen.values())


def test_recomputing_keeps_what_levels_hand_on_and_the_softmax():
    rows, header = 64, 16
    mixing = 2 * 3 * 6
    assert saved_bytes(recompute=True) == 4 * (rows * (3 * 256 + mixing) + header)
    assert saved_bytes(recompute=False) == 4 * (rows * (3 * 256 + mixing + 6 * 256 + 6 * 128) + header)


@pytest.mark.parametrize("recompute", [False, True])
def test_fuse_and_modules_take_recompute(recompute):
    torch.manual_seed(0)
    plain = AdaTTSp(24, [[32], [16]], 2, 2)
    swapped, built = copy.deepcopy(plain), fused_nn.AdaTTSp(24, [[32], [16]], 2, 2, recompute=recompute)
    assert fuse(swapped, recompute=recompute).fused
    built.load_state_dict(plain.state_dict())
    x = torch.randn(9, 2, 24)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
    ):
        outs = [module(x) for module in (swapped, built)]
    grads = [
        torch.autograd.grad(out.sum(), module.parameters()) for out, module in zip(outs, (swapped, built), strict=True)
    ]
    assert torch.equal(*outs) and all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    header, mixing = 16, 2 * 2 * 4
    assert kept.count(4 * (16 * (2 * 32 + mixing + (0 if recompute else 4 * 32 + 4 * 16)) + header)) == 2
