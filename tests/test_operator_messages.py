"""Bad input of the operator, and backends that cannot run: each message says what, where, expected
and got."""

import pytest
import torch

from fusedmoe import available_backends
from fusedmoe.families import ple
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case, problem

GOOD = ple(4, [[3]], 2, 1, 1)


def call(backend="cpu", table=GOOD, **changes):
    """Call the operator with one thing changed."""
    given = problem(Case(GOOD, 2), torch.float32)
    return fusion_network(**{"x": given.x, "params": list(given.params), "table": table, "backend": backend, **changes})


def with_param(index: int, value) -> list:
    params = list(problem(Case(GOOD, 2), torch.float32).params)
    params[index] = value
    return params


BAD = {
    "x has a slot too few": ({"x": torch.zeros(2, 2, 4)}, ValueError, r"x: expected \[B, 3, 4\], got \[2, 2, 4\]"),
    "x is too wide": ({"x": torch.zeros(2, 3, 5)}, ValueError, r"x: expected \[B, 3, 4\], got \[2, 3, 5\]"),
    "x is a vector": ({"x": torch.zeros(4)}, ValueError, r"x: expected \[B, 3, 4\], got \[4\]"),
    "x has four axes": ({"x": torch.zeros(1, 2, 3, 4)}, ValueError, r"x: expected \[B, 3, 4\], got \[1, 2, 3, 4\]"),
    "x is a list": ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
    "x holds integers": (
        {"x": torch.zeros(2, 3, 4, dtype=torch.int64)},
        TypeError,
        "x: expected a floating-point tensor, got torch.int64",
    ),
    "x has another dtype than all parameters": (
        {"x": torch.zeros(2, 3, 4).double()},
        TypeError,
        "x: expected torch.float32, the parameters' dtype, got torch.float64",
    ),
    "x is None": ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
    "a parameter is None": (
        {"params": with_param(1, None)},
        TypeError,
        r"params, levels\.0\.experts\.0\.0\.bias: expected a tensor, got NoneType",
    ),
    "a parameter is transposed": (
        {"params": with_param(0, torch.zeros(4, 3))},
        ValueError,
        r"levels\.0\.experts\.0\.0\.weight: expected \[3, 4\], got \[4, 3\]",
    ),
    "a parameter has another dtype": (
        {"params": with_param(2, torch.zeros(3, 4).double())},
        TypeError,
        r"experts\.1\.0\.weight: expected torch.float32, .*, got torch.float64",
    ),
    "a parameter is elsewhere": (
        {"params": with_param(2, torch.zeros(3, 4, device="meta"))},
        ValueError,
        r"experts\.1\.0\.weight: expected a tensor on cpu, .*, got one on meta",
    ),
    "a parameter too few": (
        {"params": with_param(0, torch.zeros(3, 4))[:-1]},
        ValueError,
        "params: expected 10 tensors, got 9",
    ),
    "no parameters": ({"params": []}, ValueError, "params: expected 10 tensors, got 0"),
    "the table is a string": ({"table": "ple"}, TypeError, "table: expected a fusedmoe.Table, got str"),
    "recompute is text": ({"recompute": "yes"}, TypeError, "recompute: expected True or False, got 'yes'"),
    "tasks_apart is a number": ({"tasks_apart": 1}, TypeError, "tasks_apart: expected True or False, got 1"),
    "return_mixing_weights is None": (
        {"return_mixing_weights": None},
        TypeError,
        "return_mixing_weights: expected True or False, got None",
    ),
    "an unknown backend": ({"backend": "gpu"}, ValueError, "backend: expected auto, .*, got 'gpu'"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("fault", BAD)
def test_bad_input_says_what_where_expected_and_got(fault, backend):
    changes, kind, message = BAD[fault]
    with pytest.raises(kind, match=message):
        call(**{"backend": backend, **changes})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(2, 3, 4, dtype=torch.float8_e4m3fn),
            "backend cpu: expected float32 or float64 or bfloat16 or float16, got float8_e4m3fn",
        ),
        (torch.zeros(2, 3, 4, device="meta"), "backend cpu: expected a tensor on cpu, got one on meta"),
    ],
)
def test_a_backend_that_cannot_run_says_why(x, message):
    with pytest.raises(RuntimeError, match=message):
        call(x=x)


def test_the_cpu_backend_is_built():
    """Without it every test of the cpu backend would fail with a reason; here is the reason."""
    found = available_backends()
    assert list(found) == ["cpu", "triton", "cuda", "reference"] and found["cpu"] is found["reference"] is None


def test_triton_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("gpu: expected a machine without a device, got one with")
    given = problem(Case(GOOD, 2), torch.float32)
    with pytest.raises(
        RuntimeError, match=r"backend triton: expected a GPU, got a machine .* without one; TRITON_INTERPRET=1"
    ):
        fusion_network(given.x, given.params, given.table, "triton")
