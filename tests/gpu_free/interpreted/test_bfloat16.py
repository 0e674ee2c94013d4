"""bfloat16 in the mended interpreter: output, mixing weights and all gradients by name, without
kinks, as in `tests/test_half.py`."""

from functools import partial

import pytest
import torch

from fusedmoe.op import fusion_network
from fusedmoe.testing import assert_close, cases, evaluate, expectation, problem, smoothed

CASES = cases()
NETWORK = partial(fusion_network, backend="triton", return_mixing_weights=True)
QUICK = ("every_feature", "adatt_sp-odd", "mmoe-tiny", "ple-ragged")


def given_of(name: str):
    return problem(CASES[name]._replace(table=smoothed(CASES[name].table)), torch.bfloat16)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(CASES)]
)
def test_parity(name):
    given = given_of(name)
    assert_close(evaluate(NETWORK, given), expectation(given))


def test_bits_are_the_same_from_run_to_run():
    given = given_of("adatt_sp-odd")
    first, second = evaluate(NETWORK, given), evaluate(NETWORK, given)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_a_rows_result_does_not_depend_on_its_batch():
    """Where the same kernels run: up to `tiles.WHOLE_ROWS` rows, and beyond."""
    given = given_of("ple-odd")
    with torch.no_grad():
        whole = fusion_network(given.x, given.params, given.table, "triton")
        parts = [
            fusion_network(part, given.params, given.table, "triton")
            for part in given.x.split([1, 19, len(given.x) - 20])
        ]
    assert torch.equal(whole, torch.cat(parts))
