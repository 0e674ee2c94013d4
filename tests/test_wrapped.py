"""Other libraries set forwards of their own around ours: in every order with fuse and unfuse a
model computes what a plain one does."""

import copy
import functools
import inspect
import itertools
import pickle
from types import MethodType

import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import testing
from fusedmoe.adapters import FusedForward
from fusedmoe.reference import layers

from . import swap_cases as edit
from .swap_cases import D, T, everything, sample, smooth_layer


@pytest.fixture(autouse=True)
def unprobed(monkeypatch):
    """The probe takes most of the time of `fuse`, and is not what is tested."""
    monkeypatch.setattr("fusedmoe.adapters.require_agreement", lambda module, match: None)


def calling(function):
    """What such libraries make: a function around another, with its name and attributes."""

    @functools.wraps(function)
    def forward(*args, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return forward


class Calling:
    """The same as an object, which is copied with the module."""

    def __init__(self, function):
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def wrap_by_closure(model):
    model.forward = calling(model.forward)


def wrap_by_object(model):
    model.forward = Calling(model.forward)


def wrap_by_partial(model):
    model.forward = functools.partial(model.forward)


def wrap_by_lambda(model):
    """Without a trace of what it calls."""
    function = model.forward
    model.forward = lambda *args: function(*args)


def prepare(model):
    """As a library for mixed precision does: wrap the function of a bound method, and bind the
    result; keep what was there."""
    model._original_forward = model.forward
    function = getattr(model.forward, "__func__", None)
    model.forward = MethodType(calling(calling(function)), model) if function else calling(calling(model.forward))


def unwrap(model):
    """As the same library does: go down to what was there, or to the last that says what it wraps;
    bind it."""
    forward, original = model.forward, model.__dict__.pop("_original_forward", None)
    if original is None:
        return
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = MethodType(forward, model)


def put_back(model):
    """Set what was there."""
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        model.forward = original


def delete(model):
    model.__dict__.pop("forward", None)


WRAPPERS = (wrap_by_closure, wrap_by_object, wrap_by_partial, wrap_by_lambda, prepare)
# What is done to a model by fusedmoe, and by others; the latter is done to the plain one too.
OURS = {
    "fuse": fusedmoe.fuse,
    "fuse inside": lambda model: fusedmoe.fuse(model.mtl_arch),
    "unfuse": fusedmoe.unfuse,
    "describe": fusedmoe.describe,
}
THEIRS = {
    "prepare": prepare,
    "unwrap": unwrap,
    "put back": put_back,
    "closure": wrap_by_closure,
    "delete": delete,
    "copy": None,
}


STEPS = {**OURS, **THEIRS}
# Of three steps all, of four those that go on to what three can reach.
ORDERS = [*itertools.product(STEPS, repeat=3), *itertools.product(("fuse", "unfuse", "prepare", "unwrap"), repeat=4)]


@pytest.fixture(scope="module")
def plain():
    """A layer with a layer inside, and an input."""
    model = layers.CentralTaskArch(layers.MtlConfigs("mmoe", 2, 2, [[3]]), layers.ArchInputs(2, [3]), D)
    testing.randomise(model.parameters(), seed=1)
    return model.eval().requires_grad_(False)


def assert_computes_the_same(model, plain, told="") -> None:
    assert_near(model, *truth_of(plain), told)


def truth_of(plain) -> tuple[torch.Tensor, float]:
    """Return the output in float64, and how far one in float32 may be from it."""
    x = sample(None)
    truth = torch.stack(copy.deepcopy(plain).double()(x.double()))
    return truth, testing.bound(testing.error(torch.stack(plain(x)), truth), truth, torch.float32)


def assert_near(model, truth, allowed, told="") -> None:
    assert testing.error(torch.stack(model(sample(None))), truth) <= allowed, told


def run(model, order) -> list[nn.Module]:
    """Do to a model what an order says; return it, after those of which it is a copy."""
    models = [model]
    for step in order:
        if step == "copy":
            models.append(copy.deepcopy(models[-1]))
        else:
            STEPS[step](models[-1])
    return models


def plain_runs(plain, order) -> bool:
    """Whether the plain model survives what others do in an order: to bind a function that was a
    bound method before is fatal to any."""
    try:
        for model in run(copy.deepcopy(plain), [step for step in order if step in THEIRS]):
            model(sample(None))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("first", STEPS)
def test_every_order_computes_what_the_plain_model_does(first, plain):
    tried, truth = 0, truth_of(plain)
    for order in ORDERS:
        if order[0] != first or not any(step.startswith("fuse") for step in order):
            continue
        models = run(copy.deepcopy(plain), order)
        if set(order) & {"closure", "unwrap"} == {"closure", "unwrap"} and not plain_runs(plain, order):
            continue
        tried += 1
        for model in models:
            assert_near(model, *truth, order)
    assert tried > 15


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_layer_counts_as_fused(wrap, plain):
    model = nn.Sequential(copy.deepcopy(plain))
    fusedmoe.fuse(model)
    told = fusedmoe.describe(model)
    wrap(model[0])
    before = everything(model)
    report = fusedmoe.fuse(model)
    assert [entry.path for entry in report.already] == ["0"] and not report.fused and not report.declined
    assert everything(model) == before and fusedmoe.describe(model) == told
    assert fusedmoe.freeze(model)
    assert_computes_the_same(model[0], plain)
    wrapper = model[0].__dict__["forward"]
    fusedmoe.unfuse(model)
    assert model[0].__dict__["forward"] is wrapper
    assert torch.equal(torch.stack(model(sample(None))), torch.stack(plain(sample(None))))
    report = fusedmoe.fuse(model)
    assert [entry.path for entry in report.fused] == ["0.mtl_arch"]
    assert "it has a forward of its own set on the instance" in report.declined[0].reason
    assert_computes_the_same(model[0], plain)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_layer_wrapped_before_is_declined_and_its_inside_fused(wrap, plain):
    model = copy.deepcopy(plain)
    wrap(model)
    report = fusedmoe.fuse(model)
    assert [entry.path for entry in report.fused] == ["mtl_arch"]
    assert [entry.path for entry in report.declined] == [
        ""
    ] and "a forward of its own set on the instance (" in report.declined[0].reason
    assert_computes_the_same(model, plain)


def test_what_a_library_leaves_behind_is_no_obstacle(plain):
    """The class's own forward, bound; ours, bound; and ours once it is out of use."""
    for prepared in (False, True):
        model = copy.deepcopy(plain)
        if prepared:
            fusedmoe.fuse(model)
            prepare(model)
            fusedmoe.unfuse(model)
        else:
            prepare(model)
        unwrap(model)
        assert "forward" in model.__dict__
        assert "declined" not in str(report := fusedmoe.fuse(model)) and [entry.path for entry in report.fused] == [""]
        fusedmoe.unfuse(model)
        assert "forward" not in model.__dict__


def test_an_unwrapped_layer_is_fused_still_and_its_copies_stand_on_their_own(plain):
    model = copy.deepcopy(plain)
    fusedmoe.fuse(model)
    prepare(model)
    unwrap(model)
    assert fusedmoe.fuse(model).already
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    x = sample(None)
    expected = torch.stack(model(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        testing.randomise(twin.parameters(), seed=2)
        other = copy.deepcopy(plain)
        other.load_state_dict(twin.state_dict())
        assert_computes_the_same(twin, other)
        assert fusedmoe.fuse(twin).fused
        assert_computes_the_same(twin, other)
        assert torch.equal(torch.stack(model(x)), expected)
    fusedmoe.unfuse(model)
    assert "forward" not in model.__dict__


def test_a_prepared_layers_copy_computes_with_its_own_parameters(plain):
    model = copy.deepcopy(plain)
    fusedmoe.fuse(model)
    prepare(model)
    twin = copy.deepcopy(model)
    testing.randomise(twin.parameters(), seed=2)
    other = copy.deepcopy(plain)
    other.load_state_dict(twin.state_dict())
    assert_computes_the_same(twin, other)
    assert_computes_the_same(model, plain)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_layer_that_was_changed_inside(wrap, plain):
    """It raises, as any; to fuse it again or to unfuse it lets its class run."""
    for cure in (fusedmoe.fuse, fusedmoe.unfuse):
        model, changed = copy.deepcopy(plain), copy.deepcopy(plain)
        fusedmoe.fuse(model)
        wrap(model)
        for module in (model, changed):
            module.mtl_arch.experts[0][0].mlp_net[1] = nn.Hardswish()
        with pytest.raises(RuntimeError, match="was changed inside after it was fused"):
            model(sample(None))
        cure(model)
        assert torch.equal(torch.stack(model(sample(None))), torch.stack(changed(sample(None))))


@pytest.mark.parametrize("wrap", [None, *WRAPPERS])
def test_a_layer_inside_a_fused_one_is_declined_by_name(wrap, plain):
    model = copy.deepcopy(plain)
    fusedmoe.fuse(model)
    if wrap:
        wrap(model)
    report = fusedmoe.fuse(model.mtl_arch)
    assert not report and "it lies inside a CentralTaskArch that is fused; fusedmoe.unfuse(model) before" in str(report)
    assert_computes_the_same(model, plain)
    fusedmoe.unfuse(model)
    assert fusedmoe.fuse(model.mtl_arch)


def test_a_fuse_that_fails_leaves_a_wrapped_layer_as_it_was(plain, monkeypatch):
    models = nn.ModuleList([copy.deepcopy(plain) for _ in range(4)])
    fusedmoe.fuse(models)
    for model in models[:3]:
        prepare(model)
    unwrap(models[1])
    fusedmoe.unfuse(models[1])
    models[1].forward = models[1].forward
    for model in models[2:]:
        model.mtl_arch.experts[0][0].mlp_net[1] = nn.Tanh()
    models.append(smooth_layer())
    before = everything(models)

    def failing(*_):
        raise MemoryError("no memory left")

    monkeypatch.setattr("fusedmoe.adapters.require_agreement", failing)
    with pytest.raises(MemoryError):
        fusedmoe.fuse(models)
    assert everything(models) == before
    assert_computes_the_same(models[0], plain)
    for model in models[2:4]:
        with pytest.raises(RuntimeError, match="was changed inside"):
            model(sample(None))


def test_a_shallow_copy_is_looked_at_anew(plain):
    model = copy.deepcopy(plain)
    fusedmoe.fuse(model)
    twin = copy.copy(model)
    assert fusedmoe.fuse(twin).fused and twin.forward is not model.forward
    fusedmoe.unfuse(twin)
    assert isinstance(model.forward, FusedForward) and fusedmoe.fuse(model).already
    for module in (model, twin):
        assert_computes_the_same(module, plain)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_module_of_ours(wrap):
    plain, model = smooth_layer(), fusedmoe.nn.AdaTTSp(D, [[5, 4], [4]], T, 2, activation="silu")
    model.load_state_dict(plain.state_dict())
    wrap(model)
    assert fusedmoe.fuse(model).already and "adatt_sp" in fusedmoe.describe(model)
    fusedmoe.unfuse(model)
    edit.assert_same(model, plain, sample(T))


@pytest.mark.parametrize("wrap", [wrap_by_closure, prepare])
def test_a_wrapped_layer_compiles(wrap, plain):
    model = copy.deepcopy(plain)
    fusedmoe.fuse(model)
    wrap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = sample(None)
    assert torch.equal(torch.stack(compiled(x)), torch.stack(model(x)))
    fusedmoe.unfuse(model)
    assert torch.equal(torch.stack(compiled(x)), torch.stack(plain(x)))
