"""`del model` frees a fused model at once, as it frees a plain one, whatever was done with it; and
what holds its forward alone still runs."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import testing
from fusedmoe.nn import AdaTTSp, CentralTaskArch, MMoE
from fusedmoe.reference import layers

from . import swap_cases as edit
from .swap_cases import LAYERS, WIDTHS, D, T, central, sample, smooth_layer
from .test_changes_inside import Configured, adapter

__all__ = ["adapter"]


def fused(layer: nn.Module) -> nn.Module:
    fusedmoe.fuse(layer)
    return layer


# What builds a model, and the slots of its input.
MODELS = {
    "a layer": (lambda: fused(smooth_layer()), T),
    "a layer in a model": (lambda: fused(nn.Sequential(smooth_layer())), T),
    "a layer of layers": (lambda: fused(central("ple")), None),
    "a layer that was fused inside before": (lambda: fused(fused_inside()), None),
    "two layers": (lambda: fused(nn.Sequential(layers.CrossStitch(D, [[6]], T), smooth_layer())), T),
    "a layer with buffers": (lambda: fused(Configured()), T),
    "AdaTTSp": (lambda: AdaTTSp(D, WIDTHS, T, 2), T),
    "MMoE in a model": (lambda: nn.Sequential(MMoE(D, [5, 4], [], T, 4)), None),
    "CentralTaskArch": (
        lambda: CentralTaskArch(layers.MtlConfigs("att_g", 2, 2, WIDTHS), layers.ArchInputs(T, [3]), D),
        None,
    ),
}


def fused_inside() -> nn.Module:
    model = central("ple")
    fusedmoe.fuse(model.mtl_arch)
    return model


def stepped(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    sum(out).sum().backward()
    assert x.grad is not None


def served(model, x):
    model.eval()
    fusedmoe.freeze(model)
    with torch.inference_mode():
        return model(x)


def served_and_thawed(model, x):
    served(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        with pytest.warns(UserWarning, match="no longer frozen"):
            model(x)


def served_and_unfrozen(model, x):
    served(model, x)
    fusedmoe.unfreeze(model)


def served_and_refused(model, x):
    served(model, x)
    model.train()
    try:
        model(x)
    except RuntimeError:
        return
    raise AssertionError("expected the frozen layer to be refused in training mode")


def called_wrongly(model, x):
    for wrong in (None, x[..., 1:], x[0]):
        try:
            model(wrong)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue
        raise AssertionError("expected an error")


def changed_inside(model, x):
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(lambda *_: None)
    try:
        model(x)
    except RuntimeError:
        return fusedmoe.fuse(model)
    raise AssertionError("expected an error")


def declined(model, x):
    fusedmoe.unfuse(model)
    model.extra = nn.Parameter(torch.zeros(1))
    return fusedmoe.fuse(model)


def saved(model, x):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return freed_alone(torch.load(file, weights_only=False), x)


def freed_alone(model, x):
    """Call a copy and let it go, too."""
    watched = watch(model)
    model(x)
    del model
    assert alive(watched) == []


def exported(model, x):
    torch.export.export(model, (x,))


DONE = {
    "nothing": lambda model, x: None,
    "a call, whose output is kept": lambda model, x: model(x),
    "a training step": stepped,
    "served": served,
    "served and thawed": served_and_thawed,
    "served and unfrozen": served_and_unfrozen,
    "served and refused": served_and_refused,
    "deepcopy": lambda model, x: freed_alone(copy.deepcopy(model), x),
    "pickle": lambda model, x: freed_alone(pickle.loads(pickle.dumps(model)), x),
    "torch.save": saved,
    "copy": lambda model, x: copy.copy(model)(x),
    "described": lambda model, x: fusedmoe.describe(model),
    "fused again, the report kept": lambda model, x: fusedmoe.fuse(model),
    "unfused": lambda model, x: fusedmoe.unfuse(model),
    "unfused and fused": lambda model, x: (fusedmoe.unfuse(model), fusedmoe.fuse(model)),
    "called wrongly": called_wrongly,
    "changed inside": changed_inside,
    "declined": declined,
    "functional_call": lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
}


def watch(model: nn.Module) -> list[tuple[str, weakref.ref]]:
    modules = [(path or "the model", weakref.ref(module)) for path, module in model.named_modules()]
    return [
        *modules,
        *((name, weakref.ref(tensor)) for name, tensor in [*model.named_parameters(), *model.named_buffers()]),
    ]


def alive(watched: list[tuple[str, weakref.ref]]) -> list[str]:
    return [name for name, reference in watched if reference() is not None]


@pytest.fixture(autouse=True)
def unprobed(request, monkeypatch):
    """The probe takes most of the time of `fuse`; one test is about it."""
    if request.function is not test_the_probe_keeps_nothing:
        monkeypatch.setattr("fusedmoe.adapters.require_agreement", lambda module, match: None)


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("adapter", "no_collector")
@pytest.mark.parametrize("done", DONE)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_model_outlives_it(name, done):
    make, slots = MODELS[name]
    model = make()
    watched = watch(model)
    result = DONE[done](model, sample(slots))
    # A graph of autograd's holds parameters, those of a plain model too.
    result = result if isinstance(result, (str, fusedmoe.swap.FuseReport)) else None
    del model
    assert alive(watched) == [], result


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["a layer", "AdaTTSp"])
def test_a_compiled_model_is_freed_with_its_code(name, frozen):
    make, slots = MODELS[name]
    model = make().eval().requires_grad_(False)
    if frozen:
        fusedmoe.freeze(model)
    watched = watch(model)
    compiled = torch.compile(model, backend="eager")
    compiled(sample(slots))
    del model, compiled
    torch._dynamo.reset()
    assert alive(watched) == []


@pytest.mark.usefixtures("no_collector")
def test_the_packed_parameters_go_with_the_model():
    model = fused(smooth_layer()).eval()
    fusedmoe.freeze(model)
    packed = weakref.ref(model.forward.binding.frozen.packed)
    del model
    assert packed() is None


@pytest.mark.usefixtures("no_collector")
def test_the_probe_keeps_nothing():
    before = {id(thing) for thing in gc.get_objects()}
    layer = smooth_layer()
    fusedmoe.fuse(layer)
    watched = watch(layer)
    layer.note = nn.Identity()
    fusedmoe.fuse(layer)
    del layer
    left = [thing for thing in gc.get_objects() if id(thing) not in before and isinstance(thing, nn.Module)]
    assert alive(watched) == [] and left == []


@pytest.mark.usefixtures("no_collector")
def test_many_models_take_the_memory_of_one():
    held = []
    for _ in range(3):
        model = fused(smooth_layer())
        model(sample(T)).sum().backward()
        held.append(weakref.ref(next(model.parameters())))
        del model
    assert [reference() for reference in held] == [None] * 3


LAST = ("a layer", "a layer of layers", "a layer with buffers")


def outputs(value) -> torch.Tensor:
    return torch.cat(value) if isinstance(value, list) else value


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("state", ["fused", "called", "frozen", "copied", "loaded"])
@pytest.mark.parametrize("name", LAST)
def test_a_forward_runs_on_when_its_module_is_gone(name, state):
    make, slots = MODELS[name]
    model, x = make().eval().requires_grad_(False), sample(slots)
    expected = outputs(model(x)).clone()
    if state == "frozen":
        fusedmoe.freeze(model)
    forward = model.forward
    if state == "copied":
        forward = copy.deepcopy(forward)
    if state == "loaded":
        forward = pickle.loads(pickle.dumps(forward))
    parts = dict(model.named_modules())
    parts.pop("")
    gone = weakref.ref(model)
    del model
    assert gone() is None
    for _ in range(2):
        assert torch.equal(outputs(forward(x)), expected)
    if state in ("fused", "called", "frozen"):
        # What is left of it is watched as before.
        next(part for part in parts.values() if isinstance(part, nn.Linear)).register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match=r"was changed inside after it was fused.*has a forward hook"):
            forward(x)


def test_a_forward_whose_module_is_gone_trains_saves_and_compiles():
    model = smooth_layer()
    eager = copy.deepcopy(model)
    forward = fused(model).forward
    parameters = dict(model.named_parameters())
    del model
    x = sample(T)
    forward(x).sum().backward()
    eager(x).sum().backward()
    for name, parameter in eager.named_parameters():
        assert testing.error(parameters[name].grad, parameter.grad) <= testing.bound(
            testing.error(parameter.grad, parameter.grad), parameter.grad, torch.float32
        )
    for other in (
        copy.deepcopy(forward),
        pickle.loads(pickle.dumps(forward)),
        torch.compile(forward, backend="eager", fullgraph=True),
    ):
        assert torch.equal(other(x), forward(x))


def test_the_forward_of_a_model_that_no_name_holds_runs():
    x = sample(T)
    assert torch.equal(fused(smooth_layer()).forward(x), fused(smooth_layer())(x))


@pytest.mark.parametrize("make", [lambda: fused(smooth_layer()), lambda: AdaTTSp(D, WIDTHS, T, 2)], ids=["fuse", "nn"])
def test_a_shallow_copy_outlives_its_original(make):
    model, x = make(), sample(T)
    out = model(x)
    twin = copy.copy(model)
    assert torch.equal(twin(x), out)
    del model
    assert torch.equal(twin(x), out)
    testing.randomise(twin.parameters(), seed=4)
    eager = LAYERS["silu" if type(twin) is layers.AdaTTSp else "adatt_sp"][0]()
    eager.load_state_dict(twin.state_dict())
    edit.assert_same(twin, eager, x)


def test_a_shallow_copy_of_ours_is_bound_to_itself():
    model = AdaTTSp(D, WIDTHS, T, 2)
    twin = copy.copy(model)
    twin.self_exp_res_connect = False
    with pytest.raises(RuntimeError, match=r"static weights: expected 0 tensors, got 2"):
        twin(sample(T))
    model(sample(T))
