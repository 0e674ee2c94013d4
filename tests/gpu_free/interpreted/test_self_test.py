"""The check before the first use on a device: kernels that are right pass it, and wrong ones raise
with the figure."""

import pytest
import torch

from fusedmoe.kernels import network, self_test

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    # On a device it takes milliseconds, here a second a row block.
    monkeypatch.setattr(self_test, "ROWS", (17,))
    self_test.check.cache_clear()
    yield
    self_test.check.cache_clear()


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_kernels_pass(dtype, rowwise):
    self_test.check(CPU, dtype, "triton", rowwise)


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
    with pytest.raises(
        RuntimeError,
        match=(
            r"backend triton on cpu .never run .*: expected the reference's output and gradients up to "
            r"rounding, got \S+ times"
        ),
    ):
        self_test.check(CPU, torch.float32, "triton")
    monkeypatch.setenv("FUSEDMOE_SELF_TEST", "0")
    self_test.check(CPU, torch.float32, "triton")


def test_a_device_that_computes_nothing_fails(monkeypatch):
    """Not even plain PyTorch: what it leaves there is no measure of what the kernels may leave."""

    class Nothing:
        """Plain PyTorch, of which the device's run computes zeros: the first one, after that of the
        kernels."""

        def __init__(self):
            self.ran = False

        def __call__(self, *arguments):
            found = real(*arguments)
            if self.ran:
                return found
            self.ran = True
            out, d_x, grads = found
            return (
                torch.zeros_like(out),
                torch.zeros_like(d_x),
                [None if d is None else torch.zeros_like(d) for d in grads],
            )

    real = self_test.plain
    monkeypatch.setattr(self_test, "ours", lambda x, params, d_out, table, backend: Nothing()(x, params, d_out, table))
    for table in self_test.tables():
        monkeypatch.setattr(self_test, "plain", Nothing())
        assert self_test.worst(CPU, torch.float32, table, 17, "triton") > 1


def test_it_runs_once(monkeypatch):
    calls = []
    monkeypatch.setattr(self_test, "worst", lambda *args: calls.append(args) or 0.0)
    for _ in range(3):
        self_test.check(CPU, torch.float32, "triton")
    assert len(calls) == len(self_test.tables())
