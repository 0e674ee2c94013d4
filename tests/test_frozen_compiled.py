"""A frozen layer, eager and under torch.compile or torch.export: what one refuses the other
refuses, and neither is ever outdated."""

import contextlib
import itertools
import re

import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import testing
from fusedmoe.nn import AdaTTSp

from .swap_cases import WIDTHS, D, T, sample, smooth_layer
from .test_freeze import frozen_layer, weight

# Whether the input and the parameters ask for gradients, and the mode of the call.
WANTED = {"none": (False, False), "of the input": (True, False), "of the parameters": (False, True)}
MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
REFUSED = re.compile(
    r"(\w+) is frozen for serving: expected [\w ,.]+, got [\w ]+\. Cure: [\w.(), ]*fusedmoe\.unfreeze\(model\)"
)


def fused_layer() -> nn.Module:
    layer = smooth_layer()
    fusedmoe.fuse(layer)
    return layer


MAKES = {"fuse": fused_layer, "nn": lambda: AdaTTSp(D, WIDTHS, T, 2)}


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """The probe is not what is tested; and every cell is compiled, where torch.compile would else
    go on in eager mode after a few."""
    monkeypatch.setattr("fusedmoe.adapters.require_agreement", lambda module, match: None)
    torch._dynamo.reset()
    # torch 2.11 does not look at a parameter again, not even at its requires_grad, while the dict
    # that holds it is the same.
    with torch._dynamo.config.patch(recompile_limit=64, skip_tensor_guards_with_matching_dict_tags=False):
        yield


def outcome(call, x: torch.Tensor) -> torch.Tensor | str:
    """Return what a call gives, or what it says when it refuses."""
    try:
        return call(x)
    except RuntimeError as error:
        found = REFUSED.search(str(error))
        assert found, error
        return found[0]


def assert_alike(ours, theirs) -> None:
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
        return
    assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad


# Each takes a minute, and what comes first has nothing to do with who made the layer.
@pytest.mark.parametrize(("make", "first"), [("nn", "frozen"), ("fuse", "compiled")])
def test_what_is_refused_eagerly_is_refused_compiled(make, first):
    layer, x = MAKES[make]().eval(), sample(T)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    if first == "compiled":
        with torch.no_grad():
            compiled(x)
        compiled(x)
    fusedmoe.freeze(layer)
    refused = 0
    for training, wanted, mode, autocast in itertools.product((False, True), WANTED, MODES, (False, True)):
        layer.train(training)
        layer.requires_grad_(WANTED[wanted][1])
        given = x.clone().requires_grad_(WANTED[wanted][0])
        with MODES[mode](), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            eager = outcome(layer, given)
            assert_alike(outcome(compiled, given), eager)
        expected = training or autocast or (mode == "grad" and wanted != "none")
        assert isinstance(eager, str) == expected, (training, wanted, mode, autocast)
        refused += expected
    assert refused == 29
    layer.eval()
    with torch.no_grad():
        assert "frozen" in fusedmoe.describe(layer).splitlines()[0]
    fusedmoe.unfreeze(layer)
    layer.train().requires_grad_()
    # They are refused no longer, by either.
    assert_alike(compiled(x), layer(x))


@pytest.mark.parametrize("make", MAKES)
def test_code_that_is_not_whole_refuses_with_the_same_words(make):
    layer, x = MAKES[make]().eval(), sample(T)

    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return layer(x)

    compiled = torch.compile(broken, backend="eager")
    compiled(x)
    fusedmoe.freeze(layer)
    for call in (broken, compiled):
        with pytest.raises(
            RuntimeError,
            match=r"^AdaTTSp is frozen for serving: expected a call without gradients, got one that needs them",
        ):
            call(x)
    with torch.no_grad():
        assert torch.equal(compiled(x), broken(x))


CHANGED = {
    "in place": lambda model: weight(model).mul_(2),
    "replaced": lambda model: setattr(
        model[0].experts[0][1].mlp_net[0], "weight", nn.Parameter(weight(model) * 2, requires_grad=False)
    ),
    "loaded": lambda model: model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()}),
}


@pytest.mark.parametrize("thawed", [False, True])
@pytest.mark.parametrize("first", ["frozen", "compiled"])
@pytest.mark.parametrize("change", CHANGED)
def test_compiled_code_is_never_outdated(change, first, thawed):
    model, x = frozen_layer()
    if first == "compiled":
        fusedmoe.unfreeze(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x)
    fusedmoe.freeze(model)
    assert torch.equal(compiled(x), before)
    CHANGED[change](model)
    if thawed:
        with pytest.warns(UserWarning, match="no longer frozen"):
            model(x)
    out = compiled(x)
    fusedmoe.unfreeze(model)
    assert torch.equal(out, model(x)) and not torch.equal(out, before)


def test_a_changed_layer_is_refused_before_it_is_thawed():
    """Compiled code cannot look whether a parameter changed, so that eager calls do not go by it
    either."""
    model, x = frozen_layer()
    weight(model).mul_(2)
    model.train()
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        with pytest.raises(RuntimeError, match="is frozen for serving: expected evaluation mode"):
            call(x)
    assert not fusedmoe.describe(model).splitlines()[0].endswith("frozen")
    model.eval()
    with pytest.warns(UserWarning, match="no longer frozen"):
        out = model(x)
    assert torch.equal(model.train()(x), out)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_refused_where_a_call_is(strict):
    model, x = frozen_layer()
    model.requires_grad_()
    with pytest.raises(RuntimeError, match="is frozen for serving: expected a call without gradients"):
        torch.export.export(model, (x,), strict=strict)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        assert torch.equal(program.module()(x), model(x))
    fusedmoe.unfreeze(model)
    program = torch.export.export(model, (x,), strict=strict)
    assert testing.error(program.module()(x), model(x)) == 0
