"""Random tables over the whole grammar: the reference against loops and against autograd, every
backend against the reference's expectation."""

from functools import partial

import pytest
import torch

from fusedmoe import packed
from fusedmoe.backends import INTERPRETED
from fusedmoe.op import fusion_network
from fusedmoe.testing import Problem, assert_close, evaluate, expectation

from .cuda_on_cpu.extension import KIND
from .random_grammar import Grammar
from .random_tables import start
from .test_oracle import assert_rounding, loops

GPU = INTERPRETED or KIND is not None
FUSED = ("triton",) if INTERPRETED else ("cuda",) if KIND else ("cpu", "reference")
# The dtypes of these backends, the widest first; and of random draws, as many as fit into a test run.
DTYPES = (torch.float32, torch.bfloat16) if GPU else (torch.float64, torch.float32, torch.bfloat16)
SEEDS, DRAWS = (range(20), range(4)) if GPU else (range(60), range(40))


def on(backend: str):
    return partial(fusion_network, backend=backend, return_mixing_weights=True)


def drawn(seed: int, dtype: torch.dtype = torch.float64, rows: int = 5, plain: bool = False) -> Problem:
    return start(Grammar(seed, plain).table(), rows, dtype, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_is_the_loops(seed):
    given = drawn(seed)
    by_loops = loops(given)
    ours = evaluate(on("reference"), given)
    for name, truth in by_loops.items():
        assert_rounding(ours[name], truth)


@pytest.mark.parametrize("dtype", DTYPES[: 1 if GPU else 2], ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", FUSED)
def test_every_backend_runs_every_table(backend, seed, plain, dtype):
    given = drawn(seed, dtype, plain=plain)
    assert_close(evaluate(on(backend), given), expectation(given))


@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("seed", SEEDS)
def test_inference_recomputing_and_frozen_calls_are_the_same_bits(seed, rows):
    given = drawn(seed, torch.float32, rows)
    whole = evaluate(on("cpu"), given)
    again = evaluate(partial(on("cpu"), recompute=True), given)
    assert [name for name in whole if not same(whole[name], again[name])] == []
    out, weights = on("cpu")(given.x, given.params, given.table)
    assert torch.equal(out, whole["out"])
    assert all(torch.equal(w, whole[f"weights.{i}"]) for i, w in enumerate(weights))
    frozen = packed.runner(given.table)(given.x, packed.pack(given.params, given.table))
    assert torch.equal(frozen, whole["out"])


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.parametrize("seed", SEEDS)
def test_bfloat16_of_everything(seed):
    given = drawn(seed, torch.bfloat16, 19)
    assert_close(evaluate(on("cpu"), given), expectation(given))
