"""What fuse recognises, proves by its probe, and declines with the reason."""

import copy
import re

import pytest
import torch
from torch import nn

from fusedmoe import nn as fused_nn
from fusedmoe import testing
from fusedmoe.adapters import FusedForward
from fusedmoe.reference import layers
from fusedmoe.swap import fuse, unfuse

from . import swap_cases as edit
from .swap_cases import LAYERS, B, D, T, assert_same, central, everything, sample, smooth_layer


@pytest.fixture
def layer() -> nn.Module:
    return smooth_layer()


@pytest.mark.parametrize("name", LAYERS)
def test_a_fused_layer_computes_what_its_class_computes(name):
    make, slots = LAYERS[name]
    eager = make()
    testing.randomise(eager.parameters(), seed=1)
    fused = copy.deepcopy(eager)
    report = fuse(fused)
    assert [entry.path for entry in report.fused] == [""] and not report.declined, str(report)
    assert report.fused[0].family == name.split(" ")[0].replace("silu", "adatt_sp")
    assert isinstance(fused.__dict__["forward"], FusedForward)
    assert_same(fused, eager, sample(slots))


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


def test_the_outermost_layer_wins_and_every_path_is_named():
    model = nn.Sequential(nn.Linear(D, D), central("att_g"))
    report = fuse(model)
    assert [(entry.path, entry.family) for entry in report.fused] == [("1", "central")]
    assert "forward" not in model[1].mtl_arch.__dict__


def test_towers_that_cannot_be_fused_leave_the_backbone_to_be_fused():
    model = central("ple")
    model.task_modules[1].append(nn.Dropout(0.1))
    report = fuse(model)
    assert [(entry.path, entry.family) for entry in report.fused] == [("mtl_arch", "ple")]
    assert [(entry.path, entry.module) for entry in report.declined] == [("", "CentralTaskArch")]
    assert "task_modules.1.2" in report.declined[0].reason and "Dropout" in report.declined[0].reason


def test_a_central_arch_returns_a_list_whose_items_may_be_changed_in_place():
    model = central("ple")
    fuse(model)
    out = model(sample(None))
    assert type(out) is list and [list(item.shape) for item in out] == [[B, 1]] * T
    others = [item.detach().clone() for item in out[1:]]
    out[0].mul_(2)
    assert all(torch.equal(item, other) for item, other in zip(out[1:], others, strict=True))
    sum(item.sum() for item in out).backward()
    assert all(parameter.grad is not None for parameter in model.task_modules.parameters())


def test_a_shared_submodule_is_fused_once(layer):
    model = nn.ModuleDict({"a": layer, "b": layer})
    report = fuse(model)
    assert [entry.path for entry in report.fused] == ["a"]
    unfuse(model)
    assert "forward" not in layer.__dict__


def test_modules_of_ours_count_as_fused():
    model = nn.Sequential(fused_nn.MMoE(D, [4], [], T, 2))
    report = fuse(model)
    assert not report and not report.declined
    assert [(entry.path, entry.family, entry.backend) for entry in report.already] == [("0", "mmoe", "auto (cpu)")]


DECLINED = {
    edit.hooked: r"experts\.0\.0: has a forward hook \(hooked\.<locals>\.<lambda>\)",
    edit.parametrized: r"gate_weights\.0\.1\.0\.weight: is parametrized",
    edit.weight_normed: r"experts\.0\.0\.mlp_net\.0\.weight: is parametrized",
    edit.pruned: r"experts\.1\.0\.mlp_net\.0: has a forward pre-hook \(L1Unstructured\)",
    edit.root_parametrized: r"self_exp_weights\.0: is parametrized",
    edit.unknown_activation: r"experts\.0\.2\.mlp_net\.1: .*Hardswish",
    edit.dropout: r"experts\.0\.2\.mlp_net\.\d: .*Dropout",
    edit.batch_norm: r"experts\.0\.2\.mlp_net\.1: .*BatchNorm1d",
    edit.patched: r"experts\.0\.2: has a forward set on the instance \(function\)",
    edit.patched_itself: r"it has a forward of its own set on the instance",
    edit.mixed_dtypes: (
        r"gate_weights\.1\.0\.0\.weight: expected torch\.float32 on cpu as experts\S+, got torch\.float64 "
        r"on cpu"
    ),
    edit.complex: r"experts\.0\.0\.mlp_net\.0\.weight: .*complex64",
    edit.meta: r"experts\.0\.0\.mlp_net\.0\.weight: has no data yet \(meta device\)",
    edit.subclass: r"experts\.0\.0\.mlp_net\.0\.bias: expected an ordinary parameter, got Special",
    edit.extra_parameter: r"temperature",
    edit.other_gate: r"gate_weights\.0\.0: .*[Ss]oftmax",
    edit.other_count: r"experts",
}


@pytest.mark.parametrize("spoil", DECLINED, ids=lambda spoil: spoil.__name__)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_what_cannot_be_fused_exactly_stays_and_says_why(layer, spoil):
    spoil(layer)
    model = nn.ModuleDict({"tower": nn.Linear(2, 2), "arch": layer})
    before = everything(model)
    report = fuse(model)
    assert not report and not report.already
    assert [entry.path for entry in report.declined] == ["arch"]
    assert re.search(DECLINED[spoil], report.declined[0].reason), report.declined[0].reason
    assert everything(model) == before


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DistributedDataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("word", WRAPPERS)
def test_nothing_is_fused_under_a_wrapper_that_would_not_see_it(layer, word):
    report = fuse(WRAPPERS[word](layer))
    assert not report and [word in entry.reason for entry in report.declined] == [True]
    assert "forward" not in layer.__dict__


def test_nothing_is_fused_in_a_module_compiled_in_place(layer):
    layer.compile(backend="eager")
    assert "compiled" in fuse(layer).declined[0].reason


def test_flat_experts_are_a_near_miss():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, 4) for _ in range(3))
            self.gates = nn.ModuleList(nn.Linear(D, 3) for _ in range(2))

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, 4) for _ in range(3))
            self.router = nn.Linear(D, 3)

    report = fuse(nn.ModuleDict({"flat": Flat(), "routed": Routed()}))
    assert not report and [entry.path for entry in report.declined] == ["flat", "routed"]
    assert "mmoe" in report.declined[0].reason and "register_adapter" in report.declined[1].reason


def test_a_model_without_layers_says_so():
    report = fuse(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert not report and not report.declined and "no layer of this model was recognised" in str(report)


def test_a_report_reads_as_a_list(layer):
    spoiled = copy.deepcopy(layer)
    edit.hooked(spoiled)
    model = nn.ModuleDict({"good": layer, "bad": spoiled})
    text = str(fuse(model, backend="reference"))
    assert text.splitlines()[:3] == ["fused: 1", "  good: AdaTTSp as adatt_sp, backend reference", "declined: 1"]
    assert text.splitlines()[3].startswith("  bad: AdaTTSp: experts.0.0: has a forward hook")
