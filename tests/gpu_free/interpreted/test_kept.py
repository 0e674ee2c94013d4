"""What calls keep: for the backward, with and without `recompute`; and from one to the next, the
plans and choices that do not change."""

import pytest
import torch

from fusedmoe.kernels import bound

from ...recomputed import TABLES, Step, check_kept, worked_out

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_recompute_keeps_less_and_changes_no_bit(name, dtype):
    check_kept(name, "triton", dtype)


@pytest.mark.parametrize("name", TABLES)
def test_recompute_under_torch_compile(name):
    check_kept(name, "triton", torch.float32, compiled=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_call_works_nothing_out_again(recompute):
    step = Step(TABLES["hidden layers"], "triton", torch.float32)
    bound.forward_of.cache_clear()
    bound.backward_of.cache_clear()
    first, second = (worked_out(step, recompute) for _ in range(2))
    assert {"plan_of", "backward_plan_of", "chosen", "written", "of_text"} <= first.keys()
    assert not second
