"""Layers on the CUDA kernels of the emulated device: those of other people fused in place, and our
own modules."""

import copy

import pytest
import torch

from fusedmoe import fuse, nn, unfuse
from fusedmoe.backends import available_backends
from fusedmoe.swap import describe
from fusedmoe.testing import randomise

from ...swap_cases import LAYERS, WIDTHS, D, T, assert_same, sample

# One of each way to mix; the others differ in their tables alone, which the parity tests go
# through.
QUICK = ("adatt_sp", "ple", "central att_g")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)
def test_a_fused_layer_is_the_same_layer(name):
    make, slots = LAYERS[name]
    eager = make()
    randomise(eager.parameters(), seed=1)
    # Without kinks: their rows would have to go.
    for module in eager.modules():
        for child, activation in module.named_children():
            if isinstance(activation, torch.nn.ReLU):
                setattr(module, child, torch.nn.SiLU())
    fused = copy.deepcopy(eager)
    assert fuse(fused, backend="cuda")
    assert_same(fused, eager, sample(slots))
    unfuse(fused)
    x = sample(slots)
    outputs = [out if isinstance(out, list) else [out] for out in (fused(x), eager(x))]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_module_trains_as_on_the_reference():
    layers = [nn.AdaTTSp(D, WIDTHS, T, 2, activation="silu", backend=backend) for backend in ("cuda", "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            layer(sample(T)).square().mean().backward()
            optimizer.step()
    for ours, plain in zip(*(layer.parameters() for layer in layers), strict=True):
        # Two steps of sums of a few dozen products, in two orders.
        assert (ours - plain).abs().max() <= 64 * 2.0**-24 * max(1.0, float(plain.detach().abs().max()))


def test_describe_tells_the_launches():
    said = describe(nn.AdaTTSp(D, WIDTHS, T, 2, backend="cuda"))
    assert "cuda on cpu (never run on this architecture before)" in said
    assert "up to 256 rows: launches forward 1, backward 2" in said


def test_auto_on_the_processor_stays_there():
    assert available_backends()["cuda"] is None
    assert describe(nn.AdaTTSp(D, WIDTHS, T, 2)).splitlines()[0].endswith("auto (cpu)")
