"""fuse and unfuse: a fused model is the same model, a copy of it is fused, and a call that fails
changes nothing."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from fusedmoe import activation, swap, testing
from fusedmoe.adapters import FusedForward
from fusedmoe.backends import BACKENDS
from fusedmoe.reference import layers
from fusedmoe.swap import fuse, unfuse

from .swap_cases import (
    LAYERS,
    WIDTHS,
    B,
    D,
    T,
    assert_same,
    central,
    everything,
    replaced,
    results,
    sample,
    smooth_layer,
)


@pytest.fixture
def layer() -> nn.Module:
    return smooth_layer()


def assert_runs_fused(module: nn.Module) -> None:
    assert isinstance(module.__dict__.get("forward"), FusedForward)


def test_fuse_and_unfuse_leave_no_trace():
    model = nn.ModuleDict({name.replace(" ", "_"): make() for name, (make, _) in LAYERS.items()})
    before, seeds = everything(model), torch.get_rng_state()
    values = copy.deepcopy(model.state_dict())
    assert fuse(model)
    fused = everything(model)
    changed = {path for path in before if fused[path] != before[path]}
    assert changed == set(model.keys())
    assert all(fused[path][1] == [*before[path][1], "forward"] for path in changed)
    assert torch.equal(torch.get_rng_state(), seeds) and all(p.grad is None for p in model.parameters())
    unfuse(model)
    assert everything(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_state_dict_goes_both_ways(layer):
    eager = copy.deepcopy(layer)
    fuse(layer)
    assert list(layer.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(layer.state_dict())
    testing.randomise(eager.parameters(), seed=9)
    for assign in (False, True):
        layer.load_state_dict(copy.deepcopy(eager.state_dict()), assign=assign)
        assert_same(layer, eager, sample(T))
        testing.randomise(eager.parameters(), seed=10)


def test_outside_hooks_run_around_the_fused_layer(layer):
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    layer.register_forward_hook(lambda module, inputs, out: seen.append("after") or out * 2)
    layer.register_full_backward_hook(lambda module, d_in, d_out: seen.append("backward"))
    eager = copy.deepcopy(layer)
    fuse(layer)
    layer(sample(T).requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]
    assert_same(layer, eager, sample(T))


def test_an_optimizer_built_before_trains_the_fused_layer(layer):
    eager = copy.deepcopy(layer).double()
    layer.double()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1) for module in (layer, eager)]
    fuse(layer)
    for _ in range(3):
        for module, optimizer in zip((layer, eager), optimizers, strict=True):
            optimizer.zero_grad()
            module(sample(T, torch.float64)).square().mean().backward()
            optimizer.step()
    # Adam divides by the root of squared gradients: rounding of 1e-16 may grow to its root in a
    # parameter without gradient.
    for ours, theirs in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=torch.finfo(torch.float64).eps ** 0.5, atol=torch.finfo(torch.float64).eps ** 0.5
        )


def test_weights_are_read_at_every_call(layer):
    eager = copy.deepcopy(layer)
    fuse(layer)
    for module in (layer, eager):
        with torch.no_grad():
            module.experts[0][0].mlp_net[0].weight.mul_(-2)
        module.experts[1][3].mlp_net[0].bias = nn.Parameter(torch.full((4,), 0.7))
        module.self_exp_weights[1] = nn.Parameter(torch.full((T, 2), 1.5))
    assert_same(layer, eager, sample(T))


def test_functional_call_sees_the_parameters_that_it_is_given(layer):
    other = copy.deepcopy(layer)
    testing.randomise(other.parameters(), seed=5)
    fuse(layer)
    ours = torch.func.functional_call(layer, dict(other.named_parameters()), sample(T))
    assert testing.error(ours, other(sample(T))) <= testing.bound(0.0, ours, torch.float32)


def test_modes_and_dtypes_follow(layer):
    eager = copy.deepcopy(layer)
    fuse(layer, backend="reference")
    for change in (
        nn.Module.eval,
        nn.Module.train,
        nn.Module.double,
        nn.Module.float,
        lambda module: module.to(torch.bfloat16),
        nn.Module.half,
    ):
        change(layer)
        change(eager)
        assert layer.training == eager.training
        assert_same(layer, eager, sample(T, next(eager.parameters()).dtype))


def test_a_frozen_parameter_gets_no_gradient(layer):
    fuse(layer)
    layer.experts[0][1].mlp_net[0].weight.requires_grad_(False)
    layer(sample(T)).sum().backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is None] == [
        "experts.0.1.mlp_net.0.weight"
    ]


def _deepcopied(model):
    return copy.deepcopy(model)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("carry", [_deepcopied, _pickled, _saved])
@pytest.mark.parametrize(
    "make",
    [lambda: central("att_g"), lambda: layers.AdaTTSp(D, WIDTHS, T, 2, activation=activation.activation("leaky_relu"))],
)
def test_a_copy_is_fused_and_stands_on_its_own(carry, make):
    model = nn.Sequential(make())
    testing.randomise(model.parameters(), seed=1)
    x = sample(None if isinstance(model[0], layers.CentralTaskArch) else T)
    fuse(model)
    twin = carry(model)
    assert_runs_fused(twin[0])
    assert twin[0].__dict__["forward"].binding.module is twin[0]
    assert [entry.path for entry in fuse(twin).already] == ["0"]
    # A second copy of what its modules' attributes hold would swell every file.
    assert b"_attributes" not in pickle.dumps(model)
    original = results(model, x)
    assert testing.error(results(twin, x)["out.0"], original["out.0"]) == 0
    testing.randomise(twin.parameters(), seed=2)
    eager = copy.deepcopy(twin)
    unfuse(eager)
    assert_same(twin, eager, x)
    assert testing.error(results(model, x)["out.0"], original["out.0"]) == 0
    last = next(module for module in reversed(list(twin.modules())) if isinstance(module, nn.Linear))
    last.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="forward hook"):
        twin(x)
    model(x)
    patched = carry(model)
    next(module for module in patched.modules() if isinstance(module, nn.Linear)).forward = nn.functional.relu
    with pytest.raises(RuntimeError, match="forward set on the instance"):
        patched(x)
    unfuse(twin)
    assert not any("forward" in module.__dict__ for module in twin.modules())


def test_compiles_whole_and_follows_the_weights(layer):
    fuse(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, seed in ((B, 1), (3, 1), (B, 4)):
        testing.randomise(layer.parameters(), seed)
        ours, theirs = results(compiled, sample(T)[:rows]), results(layer, sample(T)[:rows])
        assert all(testing.error(ours[name], value) == 0 for name, value in theirs.items())


def test_the_input_may_be_named_as_in_the_class(layer):
    fuse(layer)
    assert torch.equal(layer(inputs=sample(T)), layer(sample(T)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda layer: layer(), TypeError, r"AdaTTSp\.forward: expected one argument inputs, got 0 positional"),
        (lambda layer: layer(sample(T), sample(T)), TypeError, r"got 2 positional"),
        (lambda layer: layer(x=sample(T)), TypeError, r"got 0 positional and \['x'\]"),
        (lambda layer: layer(sample(None)), ValueError, r"expected inputs \[B, 3, 6\], got \[16, 6\]"),
        (lambda layer: layer(sample(2)), ValueError, r"3.*2"),
        (lambda layer: layer(None), TypeError, "NoneType"),
    ],
)
def test_a_wrong_call_says_what_was_expected(layer, call, error, message):
    fuse(layer)
    with pytest.raises(error, match=message):
        call(layer)


def test_fusing_twice_does_not_stack(layer):
    model = nn.Sequential(layer)
    fuse(model, backend="reference")
    forward = layer.__dict__["forward"]
    report = fuse(model)
    assert not report and not report.declined
    assert [(entry.path, entry.backend) for entry in report.already] == [("0", "reference")]
    assert layer.__dict__["forward"] is forward


def test_an_unknown_backend_is_an_error_and_changes_nothing(layer):
    before = everything(layer)
    with pytest.raises(ValueError, match="warp"):
        fuse(layer, backend="warp")
    assert everything(layer) == before


def test_a_backend_that_cannot_run_is_an_error_and_changes_nothing(layer, monkeypatch):
    def require(name):
        raise RuntimeError(f"backend {name}: no device")

    monkeypatch.setattr(swap, "require", require)
    before = everything(layer)
    with pytest.raises(RuntimeError, match="backend cuda: no device"):
        fuse(layer, backend="cuda")
    assert everything(layer) == before


@pytest.fixture
def single_alone(monkeypatch):
    """The cpu backend, if it took float32 alone."""
    monkeypatch.setitem(vars(BACKENDS[0]), "dtypes", ("float32",))


def test_a_backend_that_does_not_take_the_dtype_is_an_error_and_changes_nothing(layer, single_alone):
    layer.to(torch.bfloat16)
    before = everything(layer)
    with pytest.raises(RuntimeError, match="backend cpu: expected float32, got bfloat16"):
        fuse(layer, backend="cpu")
    assert everything(layer) == before


def test_the_backend_asked_for_is_the_one_called(layer, monkeypatch):
    asked = []
    fuse(layer, backend="reference")
    monkeypatch.setattr(
        "fusedmoe.nn.binding.fusion_network", lambda x, tensors, table, backend, *options: asked.append(backend)
    )
    layer(sample(T))
    assert asked == ["reference"]


def test_the_report_says_what_auto_comes_to(layer, single_alone):
    assert str(fuse(layer)).splitlines()[1] == "  (the model itself): AdaTTSp as adatt_sp, backend auto (cpu)"
    assert fuse(layer).already[0].backend == "auto (cpu)"
    layer.bfloat16()
    assert fuse(layer).already[0].backend == "auto (reference: cpu: expected float32, got bfloat16)"


def test_auto_declines_a_layer_that_only_the_reference_could_run(layer, single_alone):
    layer.bfloat16()
    before = everything(layer)
    report = fuse(layer)
    reason = "only the reference could run it, slower than the layer itself (cpu: expected float32, got bfloat16)"
    assert not report and reason in str(report)
    assert everything(layer) == before
    assert fuse(layer, backend="reference").fused[0].backend == "reference"


def test_a_wrong_name_of_an_isa_is_told_in_the_report():
    script = "import fusedmoe; from tests.swap_cases import smooth_layer; print(fusedmoe.fuse(smooth_layer()))"
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "FUSEDMOE_ISA": "mmx"}, capture_output=True, text=True
    )
    assert (
        "declined: 1" in result.stdout
        and "cpu: FUSEDMOE_ISA: expected" in result.stdout
        and "got 'mmx'" in result.stdout
    ), result.stdout + result.stderr


@pytest.mark.parametrize("strict", [False, True])
def test_exports_whole_and_as_a_copy(layer, strict):
    fuse(layer)
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        program = torch.export.export(
            module, (sample(T),), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=strict
        )
        for x in (sample(T), sample(T)[:3]):
            assert torch.equal(program.module()(x), layer(x))


def test_a_fuse_that_fails_halfway_leaves_the_model_as_it_was(layer, monkeypatch):
    model = nn.ModuleDict(
        {"fused": copy.deepcopy(layer), "stale": copy.deepcopy(layer), "a": layer, "b": copy.deepcopy(layer)}
    )
    fuse(model["fused"])
    fuse(model["stale"])
    replaced(model["stale"])
    before = everything(model)
    made = []
    build = FusedForward.__init__

    def failing(self, found, backend, *options):
        made.append(backend)
        if made.count("auto") == 3:
            raise MemoryError("no memory left")
        build(self, found, backend, *options)

    monkeypatch.setattr(FusedForward, "__init__", failing)
    with pytest.raises(MemoryError):
        fuse(model)
    assert everything(model) == before


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_something_that_is_no_module_is_an_error(function):
    with pytest.raises(TypeError, match=f"{function.__name__}: expected an nn.Module, got list"):
        function([])


def test_fusing_needs_no_grad_mode(layer):
    eager = copy.deepcopy(layer)
    with torch.inference_mode(), torch.autocast("cpu"):
        assert fuse(layer)
    assert_same(layer, eager, sample(T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_probe_serves_every_dtype(layer, dtype):
    layer.to(dtype)
    assert fuse(layer, backend="reference")


def test_a_recompute_that_is_no_bool_is_refused():
    model = layers.SharedBottom(4, [3], 2)
    with pytest.raises(TypeError, match=r"^recompute: expected True or False, got 'yes'$"):
        fuse(model, recompute="yes")
    assert "forward" not in vars(model)
