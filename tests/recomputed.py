"""What a GPU backend keeps for the backward with and without `recompute`, and how often a call
works out what does not change; for both of them."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor

from fusedmoe.kernels import bound
from fusedmoe.kernels.lowering import lower
from fusedmoe.op import fusion_network
from fusedmoe.table import Table
from fusedmoe.testing import Case, Problem, build, problem

ROWS = 9
# Networks with segments between their levels, hidden layers and towers of two layers, and one
# without.
TABLES = {
    "hidden layers": build("adatt_sp", 6, [[5, 4], [3]], 2, 2, activation="silu", towers=(3, 1)),
    "levels alone": build("adatt_sp", 6, [[5], [3]], 2, 2, activation="silu"),
}


class Step:
    """A training step that counts the bytes that autograd keeps of memory that is neither x nor a
    parameter."""

    def __init__(self, table: Table, backend: str, dtype: torch.dtype, compiled: bool = False):
        self.table, self.backend, self.given = table, backend, problem(Case(table, ROWS), dtype)
        self.network = (
            torch.compile(fusion_network, backend="aot_eager", fullgraph=True) if compiled else fusion_network
        )

    def __call__(self, recompute: bool) -> tuple[int, list[Tensor]]:
        given: Problem = self.given
        x, *params = (t.clone().requires_grad_() for t in (given.x, *given.params))
        known, kept = {t.data_ptr() for t in (x, *params)}, {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in known:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out, weights = self.network(
                x, params, self.table, self.backend, return_mixing_weights=True, recompute=recompute
            )
        loss = (out * given.d_out).sum() + sum((w * d).sum() for w, d in zip(weights, given.d_weights, strict=True))
        # Those of the loss itself are there either way.
        return sum(kept.values()), [out, *weights, *torch.autograd.grad(loss, [x, *params], allow_unused=True)]


def least(table: Table, size: int) -> int:
    """Bytes of what the docstring of `fusion_network` lets `recompute` keep besides x: each softmax
    in float32, and what each level hands on."""
    program = lower(table)
    handed_on = sum(program.segments[group[-1]].width for group in program.levels[:-1])
    softmax = sum(len(unit.reads) for segment in program.segments for unit in segment.units)
    return bound.lines(4 * softmax * ROWS) + bound.lines(size * handed_on * ROWS)


def check_kept(name: str, backend: str, dtype: torch.dtype, compiled: bool = False) -> None:
    """With `recompute` at most what the docstring says is kept, less than without where there is
    more, and all results are the same bits."""
    table, size = TABLES[name], dtype.itemsize
    step = Step(table, backend, dtype, compiled)
    (most, plain), (fewest, again) = step(False), step(True)
    assert fewest <= least(table, size)
    assert fewest < most if name == "hidden layers" else fewest == most > 0
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# What works out a call's launches from its table.
WORKED_OUT = ("plan_of", "backward_plan_of", "program_of", "vectorizable", "store")


def worked_out(step: Step, recompute: bool) -> Counter[str]:
    """How often a step decodes, plans or chooses anything, by the name of what does so."""
    counted: Counter[str] = Counter()

    def counting(name: str, function):
        def call(*arguments, **named):
            counted[name] += 1
            return function(*arguments, **named)

        return call

    with ExitStack() as patches:
        for owner, name in [
            *((bound, name) for name in WORKED_OUT),
            (bound.tiles, "chosen"),
            (bound.device, "written"),
            (bound.lowering, "of_text"),
        ]:
            patches.enter_context(patch.object(owner, name, counting(name, getattr(owner, name))))
        step(recompute)
    return counted
