"""Layers of other people's classes: the probe proves those that compute what a table computes, and
refuses those that only look alike."""

import copy
import re

import pytest
import torch
from torch import nn

from fusedmoe import testing
from fusedmoe.reference import layers
from fusedmoe.swap import fuse

from .swap_cases import D, T, assert_same, everything, sample


class Blend(nn.Module):
    """The public library's AdaTT-sp under another name and another way of writing it, as people
    copy it."""

    def __init__(self, width: int, experts: int, tasks: int, out: int):
        super().__init__()
        self.num_tasks, self.num_task_experts, self.self_exp_res_connect = tasks, experts, True
        self.experts = nn.ModuleList(
            [nn.ModuleList([nn.Sequential(nn.Linear(width, out), nn.ReLU()) for _ in range(tasks * experts)])]
        )
        self.gate_weights = nn.ModuleList(
            [
                nn.ModuleList(
                    [nn.Sequential(nn.Linear(width, tasks * experts), nn.Softmax(dim=-1)) for _ in range(tasks)]
                )
            ]
        )
        self.self_exp_weights = nn.ParameterList([nn.Parameter(torch.rand(tasks, experts))])

    def forward(self, z):
        ys = [expert(z[:, i // self.num_task_experts]) for i, expert in enumerate(self.experts[0])]
        outs = []
        for t in range(self.num_tasks):
            p = self.gate_weights[0][t](z[:, t])
            own = range(t * self.num_task_experts, (t + 1) * self.num_task_experts)
            mixed = sum(p[:, i : i + 1] * y for i, y in enumerate(ys))
            outs.append(self.finish(mixed + sum(self.self_exp_weights[0][t, j] * ys[e] for j, e in enumerate(own)), ys))
        return torch.stack(outs, 1)

    def finish(self, mixed, ys):
        return mixed


class Residual(Blend):
    def finish(self, mixed, ys):
        return mixed + ys[0]


class Clipped(Blend):
    def finish(self, mixed, ys):
        return mixed.clamp(max=4.0)


class GradientStopped(Blend):
    def finish(self, mixed, ys):
        return mixed.detach()


class Dropping(Blend):
    def finish(self, mixed, ys):
        return nn.functional.dropout(mixed, 0.5, self.training)


class Logging(Blend):
    def finish(self, mixed, ys):
        self.last = mixed.detach()
        return mixed


class Counting(Blend):
    log: list

    def finish(self, mixed, ys):
        self.log.append(1)
        return mixed


class Single(Blend):
    """Runs in float32 alone, as where a constant is made in the forward."""

    def finish(self, mixed, ys):
        return mixed @ torch.eye(4)


class CountingInPlace(Counting):
    def finish(self, mixed, ys):
        self.counts[0] += 1
        return mixed


class CountingByName(Blend):
    def finish(self, mixed, ys):
        self.seen["rows"] += len(mixed)
        return mixed


class Accumulating(Blend):
    def finish(self, mixed, ys):
        self.aux.add_(1)
        return mixed


class WritingToItsInput(Blend):
    def forward(self, z):
        out = super().forward(z)
        if not z.requires_grad:
            z.zero_()
        return out


class Cleaning(Blend):
    def forward(self, z):
        return super().forward(torch.nan_to_num(z, posinf=torch.inf, neginf=-torch.inf))


class BoundingInfinities(Blend):
    def forward(self, z):
        return super().forward(torch.nan_to_num(z, nan=torch.nan))


class ClampingInput(Blend):
    def forward(self, z):
        return super().forward(z.clamp(-100, 100))


class ClampingOverflow(Blend):
    def forward(self, z):
        return super().forward(z.clamp(-1e6, 1e6))


class ManyRows(Blend):
    def finish(self, mixed, ys):
        return mixed * 2 if len(mixed) > 4 else mixed


class OneRow(Blend):
    def finish(self, mixed, ys):
        return mixed * 2 if len(mixed) == 1 else mixed


class Serving(Blend):
    def finish(self, mixed, ys):
        return mixed if torch.is_grad_enabled() else mixed.round(decimals=2)


class FailingBackward(Blend):
    def finish(self, mixed, ys):
        mixed.register_hook(fail)
        return mixed


def fail(d_out):
    raise RuntimeError("no gradient today")


class TwoInputs(Blend):
    def forward(self, z, scale=1.0):
        return super().forward(z) * scale


class Raising(Blend):
    def finish(self, mixed, ys):
        raise NotImplementedError("not written yet")


class AsDict(Blend):
    def forward(self, z):
        return {"out": super().forward(z)}


def blend(cls: type = Blend) -> Blend:
    module = cls(D, 2, T, 4)
    testing.randomise(module.parameters(), seed=2)
    return module


def test_a_copy_of_a_layer_under_another_name_is_fused():
    fused, eager = blend(), blend()
    assert fuse(fused).fused[0].module == "Blend"
    assert_same(fused, eager, sample(T))


def test_a_layer_that_runs_in_its_own_dtype_alone_is_probed_there():
    fused, eager = blend(Single), blend(Single)
    assert fuse(fused)
    assert testing.error(fused(sample(T)), eager(sample(T))) <= testing.bound(0.0, eager(sample(T)), torch.float32)


class OneExpert(layers.AdaTTSp):
    def forward(self, inputs):
        y = self.experts[0][0](inputs[:, 0])
        scores = self.gate_weights[0][0][0](inputs[:, 0])
        # Without overflow, but not exactly 1.
        scores = (scores - scores.detach() + 0.3).exp()
        return (scores / scores.sum(-1, keepdim=True) * y + y).unsqueeze(1)


def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference():
    assert fuse(OneExpert(D, [[4]], 1, 1, activation="silu"))


LOOK_ALIKES = {
    Residual: r"computes something else: \S+ differs by \d\.\d[eE][+-]\d\d of its norm, allowed 3\.5e-04",
    Clipped: r"computes something else",
    GradientStopped: r"computes something else: d_\S+ differs by",
    Dropping: r"in train mode, on rows of three sizes, its forward computes something else",
    Logging: r"its forward also writes to last",
    Counting: r"its forward also writes to log",
    CountingInPlace: r"its forward also writes to counts\[0\]",
    CountingByName: r"its forward also writes to seen\['rows'\]",
    Accumulating: r"its forward also writes to aux",
    WritingToItsInput: r"its forward also writes to its input",
    Cleaning: r"on a row with nan, its forward computes something else",
    BoundingInfinities: r"on a row with inf, its forward computes something else",
    ClampingInput: r"on rows of size 1e\+04, its forward computes something else",
    ClampingOverflow: r"on rows of size 1e\+08, its forward computes something else",
    ManyRows: r"on a batch of 9, its forward computes something else",
    OneRow: r"on a batch of 1, its forward computes something else",
    Serving: r"without gradients, its forward computes something else",
    FailingBackward: r"it could not be probed: no gradient today|requires gradient",
    TwoInputs: r"its forward takes \(z, scale=1\.0\), expected one input",
    Raising: r"its forward raised NotImplementedError on x \[3, 3, 6\]: not written yet",
    AsDict: r"its forward returns dict",
}


@pytest.mark.parametrize("cls", LOOK_ALIKES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_a_look_alike_is_declined_and_untouched(cls, training):
    module = blend(cls).train(training)
    module.log, module.counts, module.seen, module.aux = [], [0], {"rows": 0}, torch.zeros(())
    before, state, seeds = everything(module), copy.deepcopy(module.state_dict()), torch.get_rng_state()
    report = fuse(module)
    assert not report and re.search(LOOK_ALIKES[cls], report.declined[0].reason), str(report)
    assert everything(module) == before and (module.log, module.counts, module.seen, module.aux.item()) == (
        [],
        [0],
        {"rows": 0},
        0.0,
    )
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seeds)


def test_zero_parameters_hide_nothing_from_the_probe():
    module = blend(Residual)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert not fuse(module)
