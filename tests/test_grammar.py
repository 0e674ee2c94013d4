"""Random tables over the whole grammar: the reference against loops and against autograd, every
backend that can run a table against the reference's expectation, the others refuse it by name."""

import warnings
from functools import partial

import pytest
import torch

from fusedmoe import packed
from fusedmoe.backends import INTERPRETED
from fusedmoe.op import fusion_network
from fusedmoe.testing import Problem, assert_close, error, evaluate, expectation

from .cuda_on_cpu.extension import KIND
from .random_grammar import CPU, EVERY, REFERENCE, Grammar
from .random_tables import start
from .test_oracle import loops

SEEDS = range(60)
FUSED = ("triton",) if INTERPRETED else ("cuda",) if KIND else ("cpu", "reference")


def on(backend: str):
    return partial(fusion_network, backend=backend, return_mixing_weights=True)


def drawn(seed: int, most: int, dtype: torch.dtype = torch.float64, rows: int = 5) -> Problem:
    return start(Grammar(seed, most).table(), rows, dtype, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_is_the_loops(seed):
    given = drawn(seed, REFERENCE)
    by_loops = loops(given)
    ours = evaluate(on("reference"), given)
    for name, truth in by_loops.items():
        assert error(ours[name], truth) <= 64 * torch.finfo(torch.float64).eps * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED or KIND else [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("most", [EVERY, CPU, REFERENCE], ids=["of every backend", "of cpu", "of the reference"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", FUSED)
def test_every_backend_computes_what_it_can_run(backend, seed, most, dtype):
    given = drawn(seed, most, dtype)
    lack = given.table.lacking[backend]
    assert lack is None or most > (CPU if backend in ("cpu", "reference") else EVERY)
    if lack is None:
        assert_close(evaluate(on(backend), given), expectation(given))
        return
    with pytest.raises(RuntimeError, match=f"backend {backend}: expected a table that its kernels can run") as caught:
        fusion_network(given.x, given.params, given.table, backend)
    assert lack in str(caught.value)


def test_auto_passes_over_a_backend_that_lacks_kernels_and_says_so(monkeypatch):
    given = drawn(0, REFERENCE)
    monkeypatch.setitem(given.table.lacking, "cpu", "LayerNorm (level 0, expert 1)")
    with pytest.warns(UserWarning, match="backend auto: takes the reference, because cpu has no kernels for LayerNorm"):
        out = fusion_network(given.x, given.params, given.table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(out, fusion_network(given.x, given.params, given.table, "reference"))


@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("seed", SEEDS)
def test_inference_recomputing_and_frozen_calls_are_the_same_bits(seed, rows):
    given = drawn(seed, REFERENCE, torch.float32, rows)
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
    given = drawn(seed, REFERENCE, torch.bfloat16, 19)
    assert_close(evaluate(on("cpu"), given), expectation(given))
