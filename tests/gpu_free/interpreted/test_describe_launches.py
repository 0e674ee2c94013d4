"""`describe` says of a layer on Triton what the interpreter then counts, and whether its kernels
have ever run on the architecture."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fusedmoe import nn as fused_nn
from fusedmoe.kernels import self_test, tiles
from fusedmoe.kernels.describe import describe_launches
from fusedmoe.reference import layers
from fusedmoe.swap import describe, fuse
from fusedmoe.testing import build, every_feature

from ..interpreter import watched

LAYERS = {
    "two levels": lambda: layers.AdaTTSp(4, [[3], [3]], 2, 1),
    "hidden layers": lambda: layers.AdaTTSp(4, [[5, 3]], 2, 1),
    "hidden layers in gates": lambda: layers.MMoE(4, [3], [3], 2, 2),
    "experts of three layers": lambda: layers.MMoE(4, [3, 5, 2], [], 2, 2),
    "towers": lambda: layers.CentralTaskArch(
        layers.MtlConfigs("att_g", 1, 1, [[5], [3]]), layers.ArchInputs(2, [2]), 4
    ),
}


def said(model: nn.Module, batch: str) -> tuple[int, int]:
    """The numbers of launches that `describe` gives for a batch, forward and backward."""
    found = re.findall(rf"^ +{batch}: launches forward (\d+), backward (\d+)$", describe(model), re.MULTILINE)
    assert len(found) == 1, describe(model)
    return int(found[0][0]), int(found[0][1])


def counted(model: nn.Module, rows: int, training: bool) -> tuple[int, int]:
    x = torch.randn(rows, 2, 4) if isinstance(model, layers.AdaTTSp) else torch.randn(rows, 4)
    lent = list(model.named_parameters())
    with watched(lent) as watch, torch.set_grad_enabled(training):
        out = model(x)
        if training:
            (torch.cat(out) if isinstance(out, list) else out).sum().backward()
    return watch.launches.count("forward"), len(watch.launches) - watch.launches.count("forward")


@pytest.mark.parametrize("name", LAYERS)
def test_launches_are_those_that_run(name, monkeypatch):
    # Rows cost time here.
    monkeypatch.setattr(tiles, "WHOLE_ROWS", 16)
    model = LAYERS[name]()
    fuse(model, backend="triton")
    for batch, rows in ((f"up to {tiles.WHOLE_ROWS} rows", 3), ("more rows", tiles.WHOLE_ROWS + 1)):
        assert counted(model, rows, training=True) == said(model, batch)
        assert counted(model, rows, training=False) == (said(model, batch)[0], 0)


STAGES = {
    "two levels": ("none", "none"),
    "hidden layers": ("level 0, hidden 0 (2 linears)", "none"),
    "hidden layers in gates": ("level 0, hidden 0 (2 linears)", "none"),
    "experts of three layers": ("level 0, hidden 0 (2 linears); level 0, hidden 1 (2 linears)",) * 2,
    "towers": ("towers, hidden 0 (2 linears)", "none"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_stages_through_memory_are_named(name):
    model = LAYERS[name]()
    fuse(model, backend="triton")
    for when, stages in zip(("training", "inference"), STAGES[name], strict=True):
        assert f"segments of their own, handed on in memory, {when}: {stages}" in [
            line.strip() for line in describe(model).splitlines()
        ]


def test_only_where_triton_runs_the_layer():
    model = LAYERS["two levels"]()
    assert "launches" not in describe(model)
    fuse(model)
    assert describe(model).splitlines()[0].endswith("auto (cpu)") and "launches" not in describe(model)
    assert "triton on cpu (never run on this architecture before)" in describe(
        fused_nn.MMoE(4, [3], [], 2, 2, backend="triton")
    )


@pytest.mark.parametrize("known", [{}, {("triton", "sm_90"): "a report"}])
def test_an_architecture_and_whether_it_has_been_run(known, monkeypatch):
    """As on a machine that has the device."""
    monkeypatch.setattr(self_test, "KNOWN", known)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    line = describe_launches(
        build("mmoe", 4, [[3]], 2, 2), torch.bfloat16, torch.device("cuda", 0), "triton"
    ).splitlines()[0]
    assert (
        line
        == f"triton on H100, sm_90 ({'run before: a report' if known else 'never run on this architecture before'})"
    )


def test_every_feature_can_be_said():
    lines = describe_launches(every_feature(), torch.float32, torch.device("cpu"), "triton").splitlines()
    assert lines[1].strip() == "up to 256 rows: launches forward 1, backward 3"
    assert all("level 0, hidden 2" in line for line in lines[3:])


def test_a_layer_that_is_too_wide_says_so():
    model = fused_nn.MMoE(70000, [1], [], 1, 1, backend="triton")
    assert "at most 65536 columns, got 70000" in describe(model).splitlines()[-1]
