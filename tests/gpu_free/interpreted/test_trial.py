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


def test_a_device_that_computes_nothing_fails(monkeypatch):
    """Not even plain PyTorch: what it leaves there is no measure of what the kernels may leave."""

    class Nothing:
        """Plain PyTorch, of which the device's run computes zeros: the first one, after that of the kernels."""

        def __init__(self):
            self.ran = False

        def __call__(self, *arguments):
            found = real(*arguments)
            if self.ran:
                return found
            self.ran = True
            out, d_x, grads = found
            return torch.zeros_like(out), torch.zeros_like(d_x), [None if d is None else torch.zeros_like(d) for d in grads]

    real = trial.plain
    monkeypatch.setattr(trial, "ours", lambda x, params, d_out, table, backend: Nothing()(x, params, d_out, table))
    for table in trial.tables():
        monkeypatch.setattr(trial, "plain", Nothing())
        assert trial.worst(CPU, torch.float32, table, 17, "triton") > 1


def test_it_runs_once(monkeypatch):
    calls = []
    monkeypatch.setattr(trial, "worst", lambda *args: calls.append(args) or 0.0)
    for _ in range(3):
        trial.once(CPU, torch.float32, "triton")
    assert len(calls) == len(trial.tables())
