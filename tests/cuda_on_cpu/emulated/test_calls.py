"""Calls of the CUDA kernels on the emulated device: schedules, memory that they may touch,
launches, autocast, torch.compile, the self-test, errors."""

from contextlib import ExitStack
from functools import cache, partial

import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from fusedmoe.casting import cast as cast_params
from fusedmoe.codec import encode
from fusedmoe.kernels import cuda, device, registered, self_test, tiles
from fusedmoe.kernels.launchers import GRADIENT_LAUNCHES
from fusedmoe.nn import AdaTTSp
from fusedmoe.op import fusion_network
from fusedmoe.testing import Case, Problem, assert_close, build, cases, evaluate, expectation, problem, smoothed

from ..extension import control, counts
from ..watched import watched

CASES = cases()
NETWORK = partial(fusion_network, backend="cuda", return_mixing_weights=True)
TABLE = build("adatt_sp", 6, [[5, 4], [3]], 2, 2, activation="silu", towers=(3, 1))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows up to which all stages are one launch.
FORMS = {"a launch a level": 0, "one launch": 1 << 30}
SCHEDULES = {
    f"seed {seed}, {'eager' if eager else 'lazy'}": (seed, eager) for seed in (1, 2, 3) for eager in (False, True)
}


@cache
def expected(name: str, dtype: torch.dtype) -> tuple[Problem, dict]:
    """In 16 bits without kinks: nearly every row has a pre-activation within rounding of one."""
    given = problem(
        CASES[name] if dtype == torch.float32 else CASES[name]._replace(table=smoothed(CASES[name].table)), dtype
    )
    return given, expectation(given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["every_feature", "adatt_sp-odd"])
def test_any_schedule(name, dtype, schedule, form, monkeypatch):
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form])
    given, wanted = expected(name, dtype)
    control().fusedmoe_schedule(*SCHEDULES[schedule])
    try:
        assert_close(evaluate(NETWORK, given), wanted)
    finally:
        control().fusedmoe_schedule(0, False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["every_feature", "adatt_sp-odd", "ple-ragged", "adatt-empty_gate", "mmoe-one_row"])
def test_only_what_was_given_is_touched(name, form, monkeypatch):
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form])
    given, wanted = expected(name, torch.float32)

    # `evaluate` takes copies of the parameters: lend those that a call gets.
    def network(x, params, table):
        lent = [(parameter.name, tensor) for parameter, tensor in zip(table.parameters, params, strict=True)]
        watching.enter_context(watched(lent))
        return NETWORK(x, params, table)

    with ExitStack() as watching:
        assert_close(evaluate(network, given), wanted)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("towers", [(), (6, 1)])
def test_launches(levels, towers, monkeypatch):
    """AdaTT of L levels: L forward, 2 L backward and one for all parameters; one more each way for
    towers; one launch in the small form."""
    table = build("adatt_sp", 8, [[8]] * levels, 2, 2, towers=towers)
    given = problem(Case(table, 20), torch.float32)
    for most, forward in ((0, levels + bool(towers)), (1 << 30, 1)):
        monkeypatch.setattr(tiles, "WHOLE_ROWS", most)
        x, params = given.x.clone().requires_grad_(), [p.clone().requires_grad_() for p in given.params]
        before = counts().launches
        out = fusion_network(x, params, table, "cuda")
        assert counts().launches - before == forward
        torch.autograd.grad(out, [x, *params], given.d_out)
        backward = 1 if most else 2 * levels + bool(towers)
        assert counts().launches - before == forward + backward + GRADIENT_LAUNCHES["cuda"]


def test_more_parameters_than_travel_with_a_launch():
    table = build("mmoe", 4, [[4]], 2, 230)
    given = problem(Case(table, 3), torch.float32)
    assert len(given.params) > cuda._extension().MOST_PARAMETERS
    out, weights = NETWORK(given.x, given.params, table)
    wanted = expectation(given)
    assert_close({"out": out, "weights.0": weights[0]}, {name: wanted[name] for name in ("out", "weights.0")})


def test_a_table_that_a_graph_writes_stays_as_long_as_the_call(monkeypatch):
    """It is kept by nobody else: of a captured call what it leaves would be the next buffer's."""
    params = [torch.randn(4) for _ in range(500)]
    first, second = (cast_params(params, torch.bfloat16) for _ in range(2))
    cuda._reachable(first, torch.device("cpu"))
    monkeypatch.setattr(device, "capturing", lambda _: True)
    _, table = cuda._reachable(second, torch.device("cpu"))
    assert table.tolist() == [one.data_ptr() for one in second]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_test_passes(dtype, monkeypatch):
    monkeypatch.setattr(self_test, "ROWS", (17,))
    self_test.check.cache_clear()
    self_test.check(torch.device("cpu"), dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    given = problem(Case(TABLE, 9), torch.float32)
    x, params = given.x.requires_grad_(), [p.requires_grad_() for p in given.params]
    with torch.autocast("cpu", dtype=dtype):
        out = fusion_network(x, params, TABLE, "cuda")
    lowered = fusion_network(x.to(dtype), [p.to(dtype) for p in params], TABLE, "cuda")
    assert out.dtype == dtype and torch.equal(out, lowered)
    assert all(d.dtype == torch.float32 for d in torch.autograd.grad(out, [x, *params], given.d_out.to(dtype)))


def test_compiled_calls_are_the_eager_ones():
    given = problem(Case(TABLE, 5), torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (
        given.x.requires_grad_(),
        [p.requires_grad_() for p in given.params],
        encode(TABLE),
        True,
        True,
        False,
        "cuda",
        None,
    )
    library.opcheck(registered.forward, arguments, test_utils=checks)
    module = AdaTTSp(8, [[8], [8]], 2, 2, backend="cuda")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, plain = compiled(x), module(x)
    assert torch.equal(ours, plain)
    wanted = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), wanted), torch.autograd.grad(plain.square().sum(), wanted), strict=True
    ):
        assert torch.equal(a, b)


def test_bad_calls_are_refused_with_the_words_of_the_other_backends():
    given = problem(Case(TABLE, 5), torch.float32)
    calls = {
        "x": (given.x[:, :, :-1], given.params),
        "a parameter": (given.x, [p[..., :1] for p in given.params]),
        "too few": (given.x, given.params[1:]),
        "dtypes": (given.x.bfloat16(), given.params),
        "a list": (given.x, [p.tolist() for p in given.params]),
    }
    for x, params in calls.values():
        said = []
        for backend in ("reference", "cuda"):
            with pytest.raises((ValueError, TypeError)) as caught:
                fusion_network(x, params, TABLE, backend)
            said.append((caught.type, str(caught.value)))
        assert said[0] == said[1]
    with pytest.raises(RuntimeError, match=r"backend cuda: expected float32 or bfloat16 or float16, got float64"):
        fusion_network(given.x.double(), [p.double() for p in given.params], TABLE, "cuda")


def test_a_launch_that_fails_leaves_nothing_behind(monkeypatch):
    """The next call is as if it had not been."""
    given = problem(Case(TABLE, 5), torch.float32)
    before = fusion_network(given.x, given.params, TABLE, "cuda")
    # Memory that no kernel may touch.
    control().fusedmoe_lend(b"nothing", 64, 1, False)
    try:
        with pytest.raises(RuntimeError, match="forward"):
            fusion_network(given.x, given.params, TABLE, "cuda")
    finally:
        control().fusedmoe_take_back()
    assert torch.equal(fusion_network(given.x, given.params, TABLE, "cuda"), before)


class OutOfMemory(TorchDispatchMode):
    """Lets so many allocations pass; from the next one on all fail."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_strided):
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("no memory is left")
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("form", FORMS)
def test_an_allocation_that_fails_leaves_nothing_behind(form, monkeypatch):
    """Whichever of a training step's it is: PyTorch's own error comes up, and the next step is as
    if it had not been."""
    monkeypatch.setattr(tiles, "WHOLE_ROWS", FORMS[form])
    given = problem(Case(TABLE, 5), torch.float32)

    def step() -> list[torch.Tensor]:
        x, *params = (t.clone().requires_grad_() for t in (given.x, *given.params))
        out = fusion_network(x, params, TABLE, "cuda")
        return [out, *torch.autograd.grad(out, [x, *params], given.d_out)]

    before, failed, left = step(), 0, 0
    while failed == left:
        try:
            with OutOfMemory(left):
                step()
        except torch.OutOfMemoryError as error:
            assert str(error) == "no memory is left"
            failed += 1
        assert all(map(torch.equal, step(), before))
        left += 1
    # The output, what it leaves for the backward; d_x, the parameters' gradients, and what that
    # needs besides.
    assert failed == 5


def test_an_empty_batch():
    given = problem(Case(TABLE, 5), torch.float32)
    x, params = given.x[:0].clone().requires_grad_(), [p.requires_grad_() for p in given.params]
    out = fusion_network(x, params, TABLE, "cuda")
    assert out.shape == (0, *given.d_out.shape[1:])
    d_x, *d_params = torch.autograd.grad(out.sum(), [x, *params])
    assert d_x.shape == x.shape and not any(d.any() for d in d_params)
