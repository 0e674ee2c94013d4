"""freeze: the bits of the unfrozen layer from parameters packed once, undone by every change of
one, refused in training."""

import copy
import gc
import io
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import testing
from fusedmoe.nn import AdaTTSp, MMoE
from fusedmoe.reference import layers

from . import swap_cases as edit
from .swap_cases import LAYERS, WIDTHS, B, D, T, sample


def frozen_layer(name: str = "adatt_sp") -> tuple[nn.Module, torch.Tensor]:
    """A model with one fused and frozen layer, and an input."""
    make, slots = LAYERS[name]
    model = nn.Sequential(make())
    testing.randomise(model.parameters(), seed=1)
    model.eval().requires_grad_(False)
    fusedmoe.fuse(model)
    report = fusedmoe.freeze(model)
    assert report and not report.declined and [entry.path for entry in report.frozen] == ["0"]
    return model, sample(slots)


def is_frozen(model: nn.Module) -> bool:
    return fusedmoe.describe(model).splitlines()[0].endswith("backend auto (cpu), frozen")


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_freezes_and_thaws_with_the_same_bits(name):
    model, x = frozen_layer(name)
    frozen = model(x)
    assert is_frozen(model)
    fusedmoe.unfreeze(model)
    assert not is_frozen(model)
    plain = model(x)
    pairs = zip(frozen, plain, strict=True) if isinstance(plain, list) else [(frozen, plain)]
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_modules_of_ours_freeze():
    for model, x in (
        (AdaTTSp(D, WIDTHS, T, 2), sample(T)),
        (MMoE(D, [5, 4], [], T, 4).double(), sample(None, torch.float64)),
    ):
        model.eval().requires_grad_(False)
        before = model(x)
        assert fusedmoe.freeze(model)
        assert torch.equal(model(x), before) and is_frozen(model)


def weight(model: nn.Module) -> nn.Parameter:
    return model[0].experts[0][1].mlp_net[0].weight


def step(make):
    """One step of an optimizer, in evaluation mode."""

    def change(model: nn.Module) -> None:
        parameter = weight(model)
        parameter.grad = torch.ones_like(parameter)
        make([parameter]).step()

    return change


def fused_step_at_a_corner(model: nn.Module) -> None:
    parameter = weight(model)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[0, 0] = 1
    torch.optim.Adam([parameter], lr=0.1, fused=True).step()


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        weight(model).mul_(2)


def moved_twice(model: nn.Module) -> None:
    """The allocator likes to give the second the memory of the first, if that is free."""
    for _ in range(2):
        weight(model).data = weight(model).data * 2


def replaced(model: nn.Module) -> None:
    model[0].experts[0][1].mlp_net[0].weight = nn.Parameter(weight(model) * 2, requires_grad=False)


def replaced_by_its_own_values(model: nn.Module) -> None:
    model[0].experts[0][1].mlp_net[0].weight = nn.Parameter(weight(model).clone(), requires_grad=False)
    weight(model).mul_(2)


def doubled(model: nn.Module) -> dict:
    return {name: tensor * 2 for name, tensor in model.state_dict().items()}


def swapped(model: nn.Module) -> None:
    torch.utils.swap_tensors(weight(model), nn.Parameter(weight(model) * 2, requires_grad=False))


CHANGES = {
    "in place": lambda model: weight(model).mul_(2),
    "in place, through a view": lambda model: weight(model)[0].mul_(2),
    "in inference mode": in_inference_mode,
    "load_state_dict": lambda model: model.load_state_dict(doubled(model)),
    "load_state_dict, assign": lambda model: model.load_state_dict(doubled(model), assign=True),
    "replaced": replaced,
    "replaced, then written to": replaced_by_its_own_values,
    "other memory": lambda model: setattr(weight(model), "data", weight(model) * 2),
    "other memory twice": moved_twice,
    "swapped": swapped,
    "SGD": step(lambda params: torch.optim.SGD(params, lr=0.1, foreach=False)),
    "SGD, foreach": step(lambda params: torch.optim.SGD(params, lr=0.1, foreach=True)),
    "Adam, fused": step(lambda params: torch.optim.Adam(params, lr=0.1, fused=True)),
    "Adam, fused, of a gradient with zeros": lambda model: fused_step_at_a_corner(model),
    "through .data": lambda model: weight(model).data.mul_(2),
    "through numpy": lambda model: np.multiply(weight(model).numpy(), 2, out=weight(model).numpy()),
    "initialised": lambda model: nn.init.normal_(weight(model)),
    "a static weight": lambda model: model[0].self_exp_weights[0].add_(1),
    "a bias": lambda model: model[0].experts[1][0].mlp_net[0].bias.add_(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_parameter_thaws_the_layer(name):
    model, x = frozen_layer()
    before = model(x)
    CHANGES[name](model)
    with pytest.warns(
        UserWarning,
        match=r"AdaTTSp is no longer frozen: (experts|self_exp_weights)\S* was changed; fusedmoe\.freeze\(model\)",
    ):
        after = model(x)
    assert not torch.equal(after, before) and not is_frozen(model)
    # Once is enough, and freezing again packs what is there now.
    assert torch.equal(model(x), after)
    assert fusedmoe.freeze(model) and torch.equal(model(x), after) and is_frozen(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_thaws_the_layer(dtype):
    model, x = frozen_layer()
    model.to(dtype)
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="is no longer frozen"):
        out = model(x.to(dtype))
    assert out.dtype == dtype
    # A copy was never frozen in this dtype.
    assert torch.equal(plain(x.to(dtype)), out)


def test_what_only_looks_like_a_change_keeps_it_frozen():
    model, x = frozen_layer()
    model.eval()
    model.to(torch.float32)
    model.cpu()
    model.state_dict()
    model.zero_grad()
    model(x)
    assert is_frozen(model)


def test_training_mode_is_refused():
    model, x = frozen_layer()
    model.train()
    with pytest.raises(
        RuntimeError,
        match=(
            r"AdaTTSp is frozen for serving: expected evaluation mode, got training mode\. Cure: "
            r"model\.eval\(\), or fusedmoe\.unf"
        ),
    ):
        model(x)
    with pytest.raises(
        ValueError,
        match=(
            r"freeze: expected a model in evaluation mode, got 0: AdaTTSp in training mode; call "
            r"model\.eval\(\) before"
        ),
    ):
        fusedmoe.freeze(model)
    fusedmoe.unfreeze(model)
    assert model(x).shape == (B, T, 4)


def test_one_layer_in_training_mode_keeps_all_from_freezing():
    model = nn.ModuleList([AdaTTSp(D, WIDTHS, T, 2), MMoE(D, [5], [], T, 2)]).eval()
    model[1].train()
    with pytest.raises(ValueError, match="got 1: MMoE in training mode"):
        fusedmoe.freeze(model)
    assert "frozen" not in fusedmoe.describe(model)


def test_gradients_are_refused_where_one_would_be_wanted():
    model, x = frozen_layer()
    wanted = x.clone().requires_grad_()
    message = (
        r"AdaTTSp is frozen for serving: expected a call without gradients, got one that needs them\. "
        r"Cure: torch\.inference_mode\(\), or fusedmoe"
    )
    with pytest.raises(RuntimeError, match=message):
        model(wanted)
    weight(model).requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        model(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not model(wanted).requires_grad
    assert is_frozen(model)


def test_autocast_is_refused():
    model, x = frozen_layer()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(
            RuntimeError, match=r"expected a call in torch\.float32, as it was packed, got one under autocast"
        ),
    ):
        model(x)


def test_wrong_inputs_are_refused_as_before():
    model, x = frozen_layer()
    for wrong in (x[..., :-1], x[:, 0], x.double(), x.int(), None, x[:, :1]):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as frozen:
            model(wrong)
        fusedmoe.unfreeze(model)
        with pytest.raises(type(frozen.value)) as plain:
            model(wrong)
        assert str(frozen.value) == str(plain.value)
        fusedmoe.freeze(model)


@pytest.mark.parametrize(
    "change",
    [edit.hooked, edit.replaced, edit.patched, edit.switched, edit.bias_removed, edit.parametrized],
    ids=lambda c: c.__name__,
)
def test_a_change_inside_still_stops_the_next_call(change):
    model, x = frozen_layer()
    change(model[0])
    with pytest.raises(RuntimeError, match="was changed inside after it was fused"):
        model(x)
    assert not fusedmoe.freeze(model)


def test_hooks_outside_still_run():
    model, x = frozen_layer()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == [1] and is_frozen(model)


def loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, loaded], ids=["deepcopy", "torch.save"])
def test_a_copy_is_not_frozen_and_its_original_stays_so(copied):
    model, x = frozen_layer()
    out = model(x)
    other = copied(model)
    assert is_frozen(model) and not is_frozen(other)
    assert torch.equal(other(x), out)
    assert fusedmoe.freeze(other) and torch.equal(other(x), out)
    weight(other).mul_(2)
    with pytest.warns(UserWarning, match="no longer frozen"):
        assert not torch.equal(other(x), out)
    assert torch.equal(model(x), out) and is_frozen(model)


def test_the_state_dict_is_that_of_the_unfrozen_layer():
    model, _ = frozen_layer()
    keys = list(model.state_dict())
    fusedmoe.unfuse(model)
    assert list(model.state_dict()) == keys and "frozen" not in fusedmoe.describe(model)


def test_fusing_again_leaves_it_frozen_and_unfusing_thaws_it():
    model, x = frozen_layer()
    assert fusedmoe.fuse(model).already and is_frozen(model)
    out = model(x)
    fusedmoe.unfuse(model)
    fusedmoe.fuse(model)
    assert not is_frozen(model) and torch.equal(model(x), out)


def test_a_layer_that_nobody_uses_is_freed():
    model, x = frozen_layer()
    model(x)
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None


def sharing() -> nn.Module:
    return fusedmoe.nn.SharedBottom(D, [5], T, backend="reference")


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return AdaTTSp(D, WIDTHS, T, 2)


DECLINED = {
    "not fused": (lambda: layers.AdaTTSp(D, WIDTHS, T, 2), r"AdaTTSp: it is not fused; fusedmoe\.fuse\(model\) before"),
    "reference": (sharing, "expected backend auto or cpu, got reference, which has nothing to pack"),
    "bfloat16": (lambda: AdaTTSp(D, WIDTHS, T, 2).bfloat16(), "expected float32 or float64, got bfloat16"),
    "meta": (lambda: AdaTTSp(D, WIDTHS, T, 2).to("meta"), "expected a tensor on cpu, got one on meta"),
    "inference tensors": (made_in_inference_mode, "was made in inference mode, where PyTorch counts no changes"),
    "nothing recognised": (lambda: nn.Linear(2, 2), "frozen: 0; no layer of this model was recognised"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_cannot_be_frozen_is_declined_with_the_reason(name):
    make, reason = DECLINED[name]
    model = make().eval()
    report = fusedmoe.freeze(model)
    assert not report and not report.frozen
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(report))


def test_a_model_under_fsdp_is_declined(monkeypatch):
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch was built without torch.distributed")
    model = nn.Sequential(AdaTTSp(D, WIDTHS, T, 2)).eval()

    class Sharded(fsdp.FSDPModule, nn.Sequential):
        """What `fully_shard` makes of the class of a module."""

    model.__class__ = Sharded
    report = fusedmoe.freeze(model)
    assert not report and "under FSDP, where a changed parameter cannot be told" in str(report)


def test_something_that_is_no_module_is_an_error():
    for function in (fusedmoe.freeze, fusedmoe.unfreeze):
        with pytest.raises(TypeError, match=rf"{function.__name__}: expected an nn\.Module, got None"):
            function(None)


def test_the_choice_of_another_backend_thaws():
    model = AdaTTSp(D, WIDTHS, T, 2).eval().requires_grad_(False)
    fusedmoe.freeze(model)
    model.backend = "reference"
    with pytest.warns(UserWarning, match="its backend was changed"):
        model(sample(T))


def test_a_compiled_or_exported_model_reads_the_parameters_themselves():
    model, x = frozen_layer()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    exported = torch.export.export(model, (x,)).module()
    out = model(x)
    assert torch.equal(compiled(x), out) and torch.equal(exported(x), out)
    weight(model).mul_(2)
    changed = compiled(x)
    assert not torch.equal(changed, out)
    with pytest.warns(UserWarning, match="no longer frozen"):
        assert torch.equal(model(x), changed)


def test_transforms_of_torch_func_run_on_the_parameters():
    model, x = frozen_layer()
    rows = torch.func.vmap(lambda row: model(row.unsqueeze(0)).squeeze(0))(x)
    assert testing.error(rows, model(x)) <= testing.bound(0.0, model(x), torch.float32)
