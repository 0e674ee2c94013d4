"""The operator under what surrounds a call: autocast, the transforms of torch.func, batched and
third derivatives, memory left by others."""

import math
import random
import subprocess
import sys

import pytest
import torch

from fusedmoe import families
from fusedmoe.dtype import row
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case, assert_close, cases, eager, evaluate, expectation, problem

TABLE = families.mmoe(4, [[3]], 2, 2, activation="silu", towers=(2, 1))
BACKENDS = ("cpu", "reference")


def fused(x, params, table):
    return fusion_network(x, params, table, backend="cpu", return_mixing_weights=True)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float32), ("reference", torch.float64), ("cpu", torch.float64)]
)
@pytest.mark.parametrize("upstream", [torch.bfloat16, None])
def test_autocast_does_not_lower_the_precision(backend, dtype, upstream):
    """As any module's, the input under autocast may be bf16 where the parameters are not. (cpu
    lowers float32: test_bfloat16.py.)"""
    given = problem(Case(TABLE, 9), dtype)
    if upstream is not None:
        given = given._replace(x=given.x.to(upstream).to(dtype))

    def under_autocast(x, params, table):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, weights = fusion_network(
                x if upstream is None or dtype == torch.float64 else x.to(upstream), params, table, backend, True
            )
        assert out.dtype == dtype
        return out, weights

    expected = expectation(given)
    if upstream is not None and dtype == torch.float32:
        # The gradient of a bf16 x is a bf16 number: one more rounding.
        d_x, allowed = expected["d_x"]
        expected["d_x"] = (d_x, allowed + row(torch.bfloat16).roundoff * float(d_x.abs().max()))
    assert_close(evaluate(under_autocast, given), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_inside_autocast(backend):
    given = problem(Case(TABLE, 9), torch.float32)
    params = [p.requires_grad_() for p in given.params]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fusion_network(given.x, params, TABLE, backend)
    outside = torch.autograd.grad(out, params, given.d_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(fusion_network(given.x, params, TABLE, backend), params, given.d_out)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def plain(x, params, table):
    """Plain PyTorch, its mixing weights kept to itself."""
    return eager(x, params, table)[0], ()


def next_to_last(network, order):
    """The scalar whose gradient is the derivative of this order: the squares of the one below,
    summed."""

    def scalar(x, params, table):
        loss = network(x, params, table)[0].pow(2).sum()
        for _ in range(order - 1):
            loss = sum((g**2).sum() for g in torch.autograd.grad(loss, [x, *params], create_graph=True))
        return loss[None], ()

    return scalar


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [2, 3])
def test_higher_derivatives(backend, order):
    def ours(x, params, table):
        return fusion_network(x, params, table, backend), ()

    given = problem(Case(TABLE, 5))
    given = given._replace(d_out=torch.ones(1, dtype=given.x.dtype))
    assert_close(evaluate(next_to_last(ours, order), given), expectation(given, next_to_last(plain, order)))


def test_transforms_run_on_the_reference_and_a_named_backend_says_why_not():
    given = problem(Case(TABLE, 5))
    expected = expectation(given, plain)

    def by_row(x, params, table):
        return torch.func.vmap(lambda row: fusion_network(row[None], params, table)[0])(x), ()

    def total(x, backend="auto"):
        return (fusion_network(x, list(given.params), TABLE, backend) * given.d_out).sum()

    assert_close(evaluate(by_row, given), expected)
    assert_close({"d_x": torch.func.grad(total)(given.x)}, {"d_x": expected["d_x"]})
    with pytest.raises(
        RuntimeError, match=r"backend cpu: expected a call outside the transforms of torch\.func, got one inside"
    ):
        torch.func.grad(lambda x: total(x, "cpu"))(given.x)


def test_batched_gradients():
    given = problem(Case(TABLE, 3))
    inputs = [t.detach().requires_grad_() for t in (given.x, *given.params)]
    out = fusion_network(inputs[0], inputs[1:], TABLE, "cpu")
    upstream = torch.eye(out.numel(), dtype=out.dtype).reshape(-1, *out.shape)
    batched = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True)
    names = ["d_x", *(f"d_{p.name}" for p in TABLE.parameters)]
    for number, d_out in enumerate(upstream):
        expected = expectation(given._replace(d_out=d_out), plain)
        assert_close(
            {name: whole[number] for name, whole in zip(names, batched, strict=True)},
            {name: expected[name] for name in names},
        )


def test_a_call_does_not_see_what_another_left_in_the_threads_memory():
    for name, case in cases().items():
        given = problem(case, torch.float32)
        before = evaluate(fused, given)
        poison = given._replace(x=torch.full_like(given.x, math.nan), d_out=torch.full_like(given.d_out, math.nan))
        evaluate(fused, poison)
        after = evaluate(fused, given)
        for key, value in before.items():
            assert (value is None and after[key] is None) or torch.equal(value, after[key]), f"{name}, {key}"


def test_the_operator_survives_garbage_for_a_table():
    """Words changed at random are refused, or mean a table that fits the same tensors."""
    case = cases()["every_feature"]
    given = problem(case, torch.float32)
    words = case.table.text.split()
    draw = random.Random(0)
    refused = 0
    for _ in range(2000):
        garbage = list(words)
        for _ in range(draw.choice([1, 1, 2, 3])):
            place = draw.randrange(len(garbage))
            garbage[place : place + draw.choice([0, 1, 1, 1])] = [
                str(draw.choice([-1, 0, 1, 2, 3, 5, 7, 100, 10**9, 2**32, 10**13, "nan", "slot"]))
            ]
        try:
            torch.ops.fusedmoe.network_cpu(given.x, list(given.params), " ".join(garbage), True, True, None)
        except (RuntimeError, ValueError):
            refused += 1
    assert refused > 1500


ONE_ROW = """
import resource, torch
from fusedmoe import families
from fusedmoe.dtype import row
from fusedmoe.op import fusion_network

def step(width):
    table = families.single_task(width, [[4]], 1)
    params = [torch.zeros(p.shape, requires_grad=True) for p in table.parameters]
    fusion_network(torch.ones(1, width, requires_grad=True), params, table, "cpu").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(-step(16) + step(65536))
"""


def test_memory_of_a_call_follows_its_rows():
    """The buffers of a step with one row are those of 16 rows, not of a whole chunk of 256."""
    taken = (
        int(subprocess.run([sys.executable, "-c", ONE_ROW], capture_output=True, text=True, check=True).stdout) / 1024
    )
    # Input, its gradient and the turned input, 16 rows of 65,536 each: 12 MiB, and 3 MiB of
    # tensors. A chunk's turned input alone: 64.
    assert taken < 32
