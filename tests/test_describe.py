"""describe: the wiring in words, of fused models and others."""

import copy
import re

import pytest
from torch import nn

from fusedmoe import nn as fused_nn
from fusedmoe.backends import BACKENDS
from fusedmoe.reference import layers
from fusedmoe.swap import describe, fuse


def central() -> layers.CentralTaskArch:
    return layers.CentralTaskArch(layers.MtlConfigs("att_g", 2, 1, [[256], [128]]), layers.ArchInputs(3, [64]), 100)


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_the_wiring_is_told_level_by_level():
    model = nn.Sequential(nn.Linear(2, 2), central())
    count = sum(parameter.numel() for parameter in model[1].parameters())
    fuse(model, backend="reference")
    text = describe(model)
    assert lines_of(text)[:9] == [
        "1: CentralTaskArch as central, backend reference",
        f"input [B, 100], output [B, 3, 1]; {count:,} parameters, {flops():,} FLOPs a row",
        "level 0: 7 experts, 4 units",
        "experts 0-6: slot 0, 100 > 256 relu",
        "unit 0: sees experts 0-6, gate on slot 0, learned static weights on experts 0-1",
        "unit 1: sees experts 0-6, gate on slot 0, learned static weights on experts 2-3",
        "unit 2: sees experts 0-6, gate on slot 0, learned static weights on experts 4-5",
        "unit 3: sees experts 0-6, gate on slot 0, learned static weights on expert 6",
        "level 1: 7 experts, 3 units",
    ]
    assert "task 2: reads unit 2, tower 64 relu > 1" in lines_of(text)


def flops() -> int:
    """A multiply-add is two: experts, gates and mixing of two levels, towers."""
    level = [7 * 100 * 256 + 4 * 100 * 7 + 4 * 7 * 256, 7 * 256 * 128 + 3 * 256 * 7 + 3 * 7 * 128]
    return 2 * (sum(level) + 3 * (128 * 64 + 64))


FORMS = {
    "ple": (
        lambda: layers.PLE(6, [[5], [4]], 2, [1, 2], 1),
        r"unit 1: sees experts 1-3, gate on slot 1, no static weights",
    ),
    "gates on the input with hidden layers": (
        lambda: layers.MMoE(6, [5], [3], 2, 4),
        r"units 0-1: sees experts 0-3, gate on slot 0 through 3 relu, no static",
    ),
    "order of a gate": (lambda: layers.PLE(6, [[5]], 2, 1, 1), r"unit 0: sees experts 0, 2, gate on slot 0"),
    "fixed static weights": (
        lambda: layers.AdaTTSp(6, [[5]], 2, 1),
        r"unit 1: sees experts 0-1, gate on slot 1, static weights 1 on expert 1",
    ),
    "no gate": (
        lambda: layers.CrossStitch(6, [[5]], 2),
        r"units? 0(-1)?: no gate, learned static weights on experts 0-1",
    ),
    "concatenation": (lambda: layers.CustomizedSharing(6, [5], 2), r"(?s)output \[B, 2, 10\].*task 1: reads units 1-2"),
    "no bias, slope": (lambda: without_bias(), r"experts 0-1: slot 0, 6 > 5 leaky_relu\(0\.2\) without bias"),
    "many slots": (lambda: layers.AdaTTSp(6, [[5]], 3, 1), r"input \[B, 3, 6\], output \[B, 3, 5\]"),
}


def without_bias() -> nn.Module:
    model = layers.MMoE(6, [5], [], 2, 2)
    for expert in model.experts[0]:
        expert.mlp_net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.LeakyReLU(0.2))
    return model


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_its_words(name):
    make, pattern = FORMS[name]
    text = describe(make())
    assert re.search(pattern, text), text


def test_an_unfused_layer_reads_the_same_but_for_the_backend_and_stays_unfused():
    model = central()
    before = list(model.__dict__)
    unfused = describe(model)
    assert list(model.__dict__) == before
    fuse(model, backend="reference")
    assert unfused.splitlines()[1:] == describe(model).splitlines()[1:]
    assert unfused.splitlines()[0].endswith("none (not fused)") and describe(model).splitlines()[0].endswith(
        "reference"
    )


def test_auto_says_what_it_chooses(monkeypatch):
    model = central()
    fuse(model)
    assert describe(model).splitlines()[0].endswith("backend auto (cpu)")
    monkeypatch.setitem(vars(BACKENDS[0]), "dtypes", ("float32",))
    model.bfloat16()
    assert describe(model).splitlines()[0].endswith("backend auto (reference: cpu: expected float32, got bfloat16)")


def test_modules_of_ours_are_described():
    ours = describe(fused_nn.PLE(6, [[5], [4]], 2, 1, 1, backend="reference"))
    theirs = describe(layers.PLE(6, [[5], [4]], 2, 1, 1))
    assert ours.splitlines()[0] == "(the model itself): PLE as ple, backend reference"
    assert ours.splitlines()[1:] == theirs.splitlines()[1:]


def test_what_is_declined_or_changed_is_told_with_the_reason():
    model = nn.ModuleDict({"a": central(), "b": central()})
    model["a"].mtl_arch.experts[0][0].mlp_net.append(nn.Dropout(0.1))
    fuse(model)
    model["b"].task_modules[0].register_forward_hook(lambda *_: None)
    first = [line for line in describe(model).splitlines() if not line.startswith(" ")]
    assert [line.split(":")[0] for line in first] == ["a", "a.mtl_arch", "b"]
    assert "Dropout" in first[0] and "Dropout" in first[1]
    assert "was changed inside after it was fused. task_modules.0: has a forward hook" in first[2]


def test_a_model_without_layers_says_so():
    assert "no layer of this model was recognised" in describe(nn.Linear(2, 2))


def test_something_that_is_no_module_is_an_error():
    with pytest.raises(TypeError, match=r"describe: expected an nn\.Module, got NoneType"):
        describe(None)


def test_describing_a_copy_gives_the_same_words():
    model = central()
    fuse(model)
    assert describe(copy.deepcopy(model)) == describe(model)
