"""The operator as PyTorch sees it: schema, compilation, double backward, threads."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, library

from fusedmoe.codec import encode
from fusedmoe.families import mmoe, ple
from fusedmoe.op import fusion_network
from fusedmoe.parts import Expert, Input, Level, Linear, Static, Task, Unit, from_slots
from fusedmoe.table import Table
from fusedmoe.testing import Case, Problem, build, cases, error, evaluate, expectation, problem

CASES = cases()
SMALL = ("every_feature", "mmoe-tiny", "ple-tiny", "adatt-tiny", "cross_stitch-tiny", "customized_sharing-tiny")
fused = partial(fusion_network, backend="cpu", return_mixing_weights=True)


def start(name: str, dtype: torch.dtype = torch.float64, rows: int = 5) -> Problem:
    return problem(Case(CASES[name].table, rows), dtype)


def needing_gradients(given: Problem) -> tuple[Tensor, list[Tensor]]:
    return given.x.clone().requires_grad_(), [p.clone().requires_grad_() for p in given.params]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_opcheck_forward(name, gradients):
    given = start(name)
    x, params = needing_gradients(given) if gradients else (given.x, list(given.params))
    library.opcheck(torch.ops.fusedmoe.network_cpu.default, (x, params, encode(given.table), gradients, True, None))


@pytest.mark.parametrize("name", SMALL)
def test_opcheck_backward(name):
    given = start(name)
    text, params = encode(given.table), list(given.params)
    out, weights, saved = torch.ops.fusedmoe.network_cpu(given.x, params, text, True, True, None)
    needs = "1" + "".join(str(int(p.live)) for p in given.table.parameters)
    for d_weights in (None, torch.randn_like(weights)):
        arguments = (torch.randn_like(out), d_weights, given.x, params, saved, text, needs, None)
        library.opcheck(
            torch.ops.fusedmoe.network_cpu_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def differentiable(table):
    """The operator as a function of tensors, of the outputs that can have a gradient."""

    def call(x, *params):
        out, weights = fused(x, params, table)
        return out, *(
            w
            for level, w in zip(table.levels, weights, strict=True)
            if any(u.gate or (u.static and u.static.tensor is not None) for u in level.units)
        )

    return call


@pytest.mark.parametrize("name", [*SMALL, "ple-one_expert", "mmoe-empty_gate", "adatt_sp-ragged"])
def test_gradcheck(name):
    given = start(name, rows=3)
    x, params = needing_gradients(given)
    assert torch.autograd.gradcheck(differentiable(given.table), (x, *params), fast_mode=True)


@pytest.mark.parametrize("name", SMALL)
def test_gradgradcheck(name):
    given = start(name, rows=2)
    x, params = needing_gradients(given)
    assert torch.autograd.gradgradcheck(differentiable(given.table), (x, *params), fast_mode=True)


@pytest.mark.parametrize("family", ["mmoe", "ple"])
def test_one_compilation_for_many_batch_sizes(family):
    torch._dynamo.reset()
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    def train(x, params, d_out):
        out, weights = fused(x, params, table)
        return (out * d_out).sum() + sum(w.sum() for w in weights)

    table = build(family, 6, [[5], [4]], 2, 2, towers=(3, 1))
    compiled = torch.compile(train, fullgraph=True, dynamic=True, backend=counted)
    # A first batch of 5 rows would be taken for one of the widths of 5, and compiled for 5 alone.
    for rows in (11, 2, 33, 64, 7):
        given = problem(Case(table, rows), torch.float32)
        x, params = needing_gradients(given)
        ours = torch.autograd.grad(compiled(x, params, given.d_out), [x, *params])
        plain = torch.autograd.grad(train(x, params, given.d_out), [x, *params])
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert len(graphs) == 1


def test_compiled_with_aot_autograd():
    """Forward and backward are traced through the fake kernels, under `fullgraph`."""
    torch._dynamo.reset()
    given = start("ple-odd", torch.float32, rows=9)
    compiled = torch.compile(
        lambda x, params, table: fused(x, params, table), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    ours, plain = evaluate(compiled, given), evaluate(fused, given)
    assert all((a is None and plain[name] is None) or torch.equal(a, plain[name]) for name, a in ours.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_under_autocast(dtype):
    """Autocast's questions are traced too: what it lowers, what it leaves, and the backward, which
    computes outside it."""
    torch._dynamo.reset()
    given = start("ple-odd", dtype, rows=9)

    def under_autocast(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return fused(*arguments)

    compiled = torch.compile(under_autocast, fullgraph=True, dynamic=True, backend="aot_eager")
    ours, plain = evaluate(compiled, given), evaluate(under_autocast, given)
    assert all((a is None and plain[name] is None) or torch.equal(a, plain[name]) for name, a in ours.items())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", SMALL)
def test_no_rows(name, backend):
    """B = 0: outputs without rows, gradients of zero."""
    given = start(name)
    table = given.table
    x, params = needing_gradients(given._replace(x=given.x[:0]))
    out, weights = fusion_network(x, params, table, backend=backend, return_mixing_weights=True)
    assert out.shape == (0, *fusion_network(given.x, given.params, table).shape[1:])
    assert [w.shape for w in weights] == [(0, len(level.units), len(level.experts)) for level in table.levels]
    grads = torch.autograd.grad(out.sum() + sum(w.sum() for w in weights), [x, *params], allow_unused=True)
    assert grads[0].shape == x.shape
    for p, d in zip(table.parameters, grads[1:], strict=True):
        assert (d is not None) == p.live, p.name
        assert d is None or (tuple(d.shape) == p.shape and not d.any()), p.name


@pytest.mark.parametrize("name", ["every_feature", "adatt-odd", "mmoe-one_row"])
def test_the_inputs_are_not_modified(name):
    given = start(name, torch.float32)
    before = [t.clone() for t in (given.x, *given.params, given.d_out, *given.d_weights)]
    evaluate(fused, given)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (given.x, *given.params, given.d_out, *given.d_weights), strict=True)
    )


@pytest.mark.parametrize("name", ["every_feature", "adatt-odd", "ple-odd", "mmoe-odd"])
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_threads_do_not_change_a_bit(name, rows):
    table = CASES[name].table
    generator = torch.Generator().manual_seed(3)
    given = start(name, torch.float32)
    x, d_out = (torch.randn(rows, *t.shape[1:], generator=generator) for t in (given.x, given.d_out))
    given = given._replace(
        x=x, d_out=d_out, d_weights=tuple(torch.randn(rows, *d.shape[1:], generator=generator) for d in given.d_weights)
    )
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(evaluate(fused, given))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for key, value in results[0].items():
            assert (value is None and other[key] is None) or torch.equal(value, other[key]), key
    assert len(results[0]) == 2 + len(table.levels) + len(table.parameters)


@pytest.mark.parametrize("units", [[(0,)] * 20 + [(2,)], [(0, 1), (1, 0), (0, 2)] * 4], ids=["one", "two"])
def test_a_unit_that_several_tasks_read_keeps_its_bits(units):
    """Its gradient is a sum over tasks: in one order, whatever the threads, and from run to run.
    Without PyTorch's own switch for that."""
    # Few rows of wide units: their sums are shared out among threads.
    table = replace(mmoe(4, [[4096]], 3, 2), tasks=tuple(Task(from_slots(*read)) for read in units))
    given = problem(Case(table, 3), torch.float32)
    x, params = given.x.requires_grad_(), [p.requires_grad_() for p in given.params]
    found, threads, deterministic = [], torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        for count in (1, 2, 4, 8, 7, 8):
            torch.set_num_threads(count)
            out = fusion_network(x, params, table)
            scale = torch.linspace(0.5, 1.5, out.numel()).view(out.shape)
            found.append(torch.autograd.grad(out, [x, *params], scale))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    "name", ["every_feature", "adatt-odd", "ple-empty_gate", "mmoe-one_row", "asymmetric_sharing-odd"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uninitialised_memory_is_never_read(name, dtype):
    """With deterministic algorithms torch fills every `empty` with NaN: not one bit changes."""
    given = problem(CASES[name], dtype)
    plain = evaluate(fused, given)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan().all()
        poisoned = evaluate(fused, given)
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in plain.items():
        assert (value is None and poisoned[key] is None) or torch.equal(value, poisoned[key]), key


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["every_feature", "adatt-odd", "mmoe-tiny"])
def test_any_subset_of_inputs_may_need_gradients(name, backend):
    """The gradients of some inputs are those of all, bit for bit; the frozen ones get none."""
    given = start(name, torch.float32)
    network = partial(fusion_network, backend=backend, return_mixing_weights=True)
    everything = evaluate(network, given)
    names = ["d_x", *(f"d_{p.name}" for p in given.table.parameters)]
    generator = torch.Generator().manual_seed(1)
    subsets = [
        [0],
        [1],
        list(range(1, len(names))),
        *(torch.randperm(len(names), generator=generator)[: len(names) // 2].tolist() for _ in range(3)),
    ]
    for subset in subsets:
        tensors = [t.clone().requires_grad_(i in subset) for i, t in enumerate((given.x, *given.params))]
        out, weights = network(tensors[0], tensors[1:], given.table)
        loss = (out * given.d_out).sum() + sum((w * d).sum() for w, d in zip(weights, given.d_weights, strict=True))
        loss.backward()
        for i, key in enumerate(names):
            if i not in subset:
                assert tensors[i].grad is None, key
            else:
                assert (tensors[i].grad is None and everything[key] is None) or torch.equal(
                    tensors[i].grad, everything[key]
                ), key


def test_no_graph_where_nothing_needs_gradients():
    given = start("mmoe-tiny")
    assert not fusion_network(given.x, given.params, given.table).requires_grad
    x, params = needing_gradients(given)
    with torch.no_grad():
        assert not fusion_network(x, params, given.table).requires_grad
    with torch.inference_mode():
        inside = fusion_network(x, params, given.table)
    assert torch.equal(inside, fusion_network(x, params, given.table))


def test_an_input_of_one_slot_may_leave_it_out():
    table = mmoe(4, [[3]], 2, 2)
    given = problem(Case(table, 5), torch.float32)
    assert torch.equal(fusion_network(given.x[:, 0], given.params, table), fusion_network(given.x, given.params, table))


def test_tasks_that_share_a_unit_get_it_expanded():
    given = start("shared_bottom-tiny")
    out = fusion_network(given.x, given.params, given.table)
    assert out.shape == (5, 2, 2)
    assert out.stride(1) == 0
    assert torch.equal(out[:, 0], out[:, 1])


def test_static_weights_of_any_size_reach_the_kernels():
    """A subnormal number is written into the table's words like any other."""
    for value in (5e-324, -1e-310, 1.7e308, 0.1):
        table = Table(
            (Input(1, 2),), (Level((Expert(from_slots(0), (Linear(2),)),), (Unit(static=Static((0,), (value,))),)),)
        )
        given = problem(Case(table, 3))
        ours, plain = (
            evaluate(fused, given),
            evaluate(partial(fusion_network, backend="reference", return_mixing_weights=True), given),
        )
        assert torch.equal(ours["weights.0"], torch.full_like(ours["weights.0"], value))
        assert error(ours["out"], plain["out"]) <= expectation(given)["out"][1]


def test_what_is_not_finite_stays_in_its_row():
    given = problem(Case(CASES["adatt-odd"].table, 40), torch.float32)
    for value in (float("nan"), float("inf")):
        x = given.x.clone()
        x[3, 1, 2] = value
        clean, dirty = evaluate(fused, given), evaluate(fused, given._replace(x=x))
        others = [i for i in range(len(x)) if i != 3]
        assert not dirty["out"][3].isfinite().all()
        for name in ("out", "d_x", "weights.0", "weights.1"):
            assert torch.equal(dirty[name][others], clean[name][others]), name


@pytest.mark.parametrize(
    "activation", ["relu", "silu", "gelu", "tanh", "sigmoid", "softplus", "elu", "leaky_relu", "gelu_tanh", "identity"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_not_finite_is_where_the_reference_has_it(activation, dtype):
    """NaN reaches the units that read it and no others; overflow to infinity falls where plain
    torch has it."""
    table = ple(5, [[4, 4]], 2, 1, 1, activation=activation)
    given = problem(Case(table, 3), dtype)
    params = [p.clone() for p in given.params]
    params[0][1] = float("nan")
    dirty = given._replace(params=tuple(params))
    ours, plain = (
        evaluate(fused, dirty),
        evaluate(partial(fusion_network, backend="reference", return_mixing_weights=True), dirty),
    )
    assert not ours["out"][:, 0].isfinite().any()
    assert ours["out"][:, 1].isfinite().all()
    for key, value in plain.items():
        assert torch.equal(ours[key].isnan(), value.isnan()), key
