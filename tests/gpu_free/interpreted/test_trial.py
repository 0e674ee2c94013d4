"""The check before the first use on a device: kernels that are right pass it, and wrong ones raise with the figure."""

import pytest
import torch

from fusedmoe.kernels import network, trial

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    # On a device it takes milliseconds, here a second a row block.
    monkeypatch.setattr(trial, "ROWS", (17,))
    trial.once.cache_clear()
    yield
    trial.once.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_kernels_pass(dtype):
    trial.once(CPU, dtype, "triton")


@pytest.mark.parametrize("part", ["output", "gradients", "NaN"])
def test_wrong_kernels_raise(part, monkeypatch):
    real_forward, real_backward = network.forward, network.backward

    def forward(*args, **kwargs):
        out, *rest = real_forward(*args, **kwargs)
        return out * (1.001 if part == "output" else 1.0), *rest

    def backward(*args, **kwargs):
        d_x, grads = real_backward(*args, **kwargs)
        factor = {"output": 1.0, "gradients": 1.001, "NaN": float("nan")}[part]
        return d_x, [None if d is None else d * factor for d in grads]

    monkeypatch.setattr(network, "forward", forward)
    monkeypatch.setattr(network, "backward", backward)
    with pytest.raises(RuntimeError, match=r"backend triton on cpu .never run .*: expected the reference's output and gradients up to rounding, got \S+ times"):
        trial.once(CPU, torch.float32, "triton")
    monkeypatch.setenv("FUSEDMOE_TRIAL", "0")
    trial.once(CPU, torch.float32, "triton")


def test_it_runs_once(monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "worst", lambda *args: calls.append(args) or 0.0)
    for _ in range(3):
        trial.once(CPU, torch.float32, "triton")
    assert len(calls) == len(trial.tables())
