"""Gradients of what no wanted output depends on: None, as plain PyTorch has it, so that optimizers
leave it alone."""

import copy

import pytest
import torch
from torch import nn

import fusedmoe
from fusedmoe import nn as fused_nn
from fusedmoe.reference.layers.central import BACKBONES, ArchInputs, CentralTaskArch, MtlConfigs
from fusedmoe.testing import cases

TASKS = 3
CASES = cases()


def arch(cls: type, backbone: str, **options) -> nn.Module:
    torch.manual_seed(0)
    configs = MtlConfigs(backbone, num_task_experts=2, num_shared_experts=2, expert_out_dims=[[8], [8]])
    return cls(configs, ArchInputs(TASKS, [4], configs), 12, **options).double()


def pairs(backbone: str) -> list[tuple[nn.Module, nn.Module]]:
    """A plain model beside the same one fused, and beside the class that is fused from the start."""
    plain = arch(CentralTaskArch, backbone)
    fused, built = copy.deepcopy(plain), arch(fused_nn.CentralTaskArch, backbone)
    assert fusedmoe.fuse(fused)
    built.load_state_dict(plain.state_dict())
    return [(plain, fused), (copy.deepcopy(plain), built)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_alike(plain: nn.Module, fused: nn.Module) -> None:
    """The same gradients, and None in the same places."""
    expected, got = gradients(plain), gradients(fused)
    assert {k for k, g in expected.items() if g is None} == {k for k, g in got.items() if g is None}
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("wanted", [(0,), (2,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_a_loss_on_some_tasks(backbone, wanted):
    for plain, fused in pairs(backbone):
        for model in (plain, fused):
            outs = model(torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 12))
            sum(outs[t].square().sum() for t in wanted).backward()
        assert_alike(plain, fused)
        if len(wanted) < TASKS:
            assert any(g is None for g in gradients(fused).values())


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1)],
    ids=["adamw", "sgd"],
)
@pytest.mark.parametrize("backbone", ["att_sp", "ple", "mmoe", "customized"])
def test_tasks_trained_in_turn_end_where_plain_pytorch_ends(backbone, optimizer):
    for plain, fused in pairs(backbone):
        for model in (plain, fused):
            steps = optimizer(model.parameters())
            generator = torch.Generator().manual_seed(1)
            for step in range(6):
                steps.zero_grad()
                model(torch.randn(9, 12, dtype=torch.float64, generator=generator))[
                    step % TASKS
                ].square().mean().backward()
                steps.step()
        for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(q, p, msg=lambda text, name=name: f"{name}: {text}")


def test_a_gradient_for_each_task_over_one_graph():
    """As PCGrad and MGDA ask for them: several backward passes, each for one task."""
    for plain, fused in pairs("ple"):
        x = torch.randn(7, 12, dtype=torch.float64)
        found = []
        for model in (plain, fused):
            outs, params = model(x), list(model.parameters())
            found.append([torch.autograd.grad(out.sum(), params, retain_graph=True, allow_unused=True) for out in outs])
        for expected, got in zip(*found, strict=True):
            assert [g is None for g in expected] == [g is None for g in got]
            assert any(g is None for g in got)
            torch.testing.assert_close([g for g in got if g is not None], [g for g in expected if g is not None])


def test_outputs_of_tasks_may_be_changed_in_place():
    """Each task's output is a tensor of its own: plain PyTorch's can be written to, too."""
    for plain, fused in pairs("att_sp"):
        x = torch.randn(4, 12, dtype=torch.float64)
        for model in (plain, fused):
            first, second, _ = model(x)
            first.sigmoid_()
            (first.sum() + second.square().sum()).backward()
        assert_alike(plain, fused)


def test_distributed_data_parallel_leaves_unused_towers_alone():
    """`find_unused_parameters`: what got no gradient in any process is not stepped."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for plain, fused in pairs("att_sp"):
            for model in (plain, fused):
                parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
                steps = torch.optim.AdamW(parallel.parameters(), lr=0.01)
                generator = torch.Generator().manual_seed(1)
                for step in range(6):
                    steps.zero_grad()
                    parallel(torch.randn(9, 12, dtype=torch.float64, generator=generator))[
                        step % TASKS
                    ].square().mean().backward()
                    steps.step()
            for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
                torch.testing.assert_close(q, p, msg=lambda text, name=name: f"{name}: {text}")
    finally:
        torch.distributed.destroy_process_group()
