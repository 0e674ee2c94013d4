"""Wrong arguments of the reference layers: each message names the argument, what was expected and
what came."""

import re

import pytest

from fusedmoe.reference import layers

ARCHS = [[6, 5], [4]]


def central(name: str, task_mlp: list[int]) -> layers.CentralTaskArch:
    return layers.CentralTaskArch(layers.MtlConfigs(name, 2, 2, ARCHS), layers.ArchInputs(3, task_mlp), 7)


WRONG = {
    "no levels": (
        lambda: layers.AdaTTSp(5, [], 2, 1),
        "expert_out_dims: expected the layer widths of at least one level, as in [[256], [128]], got []",
    ),
    "integers": (
        lambda: layers.MLMMoE(5, [4], [[]], 2, 1),
        "expert_archs: expected the layer widths of at least one level, as in [[256], [128]], got [4]",
    ),
    "an empty level": (
        lambda: layers.CrossStitch(5, [[]], 2),
        "expert_archs: expected the layer widths of at least one level",
    ),
    "gates": (
        lambda: layers.MLMMoE(5, ARCHS, [[]], 2, 1),
        "gate_archs: expected one list for each of 2 levels, got [[]]",
    ),
    "counts": (
        lambda: layers.PLE(5, ARCHS, 3, [1, 2], 1),
        "num_task_experts: expected a number or a list of 3, got [1, 2]",
    ),
    "both counts": (
        lambda: layers.AdaTT(5, ARCHS, 2, 1, 1, [1, 1]),
        "num_task_experts, num_task_expert_list: expected one of them, got both",
    ),
    "neither count": (
        lambda: layers.AdaTT(5, ARCHS, 2, 1),
        "num_task_experts, num_task_expert_list: expected one of them, got neither",
    ),
    "a list of counts": (
        lambda: layers.AdaTT(5, ARCHS, 2, 1, None, [1]),
        "num_task_expert_list: expected a number or a list of 2, got [1]",
    ),
    "borrows": (
        lambda: layers.AsymmetricSharing(5, [4], 2, [[0]]),
        "borrows: expected one list of tasks for each of 2 tasks, got 1",
    ),
    "combine": (
        lambda: layers.AsymmetricSharing(5, [4], 1, [[0]], "max"),
        "combine: expected one of sum, mean, concat, got 'max'",
    ),
    "no tasks": (lambda: layers.SingleTask(5, [4], 0), "num_tasks: expected an integer of at least 1, got 0"),
    "fewer tasks than none": (
        lambda: layers.SharedBottom(5, [4], -1),
        "num_tasks: expected an integer of at least 1, got -1",
    ),
    "tasks as text": (
        lambda: layers.AdaTTSp(5, ARCHS, "2", 1),
        "num_tasks: expected an integer of at least 1, got '2'",
    ),
    "tasks of one gate": (lambda: layers.OMoE(5, [4], [], 0, 2), "num_tasks: expected an integer of at least 1, got 0"),
    "no input": (lambda: layers.CrossStitch(0, ARCHS, 2), "input_dim: expected an integer of at least 1, got 0"),
    "no input of an MLP": (lambda: layers.MLP(0, []), "input_dim: expected an integer of at least 1, got 0"),
    "no experts": (lambda: layers.MMoE(5, [4], [], 2, 0), "num_experts: expected an integer of at least 1, got 0"),
    "no experts of a task": (
        lambda: layers.AdaTTSp(5, ARCHS, 2, 0),
        "num_task_experts: expected an integer of at least 1, got 0",
    ),
    "fewer shared experts than none": (
        lambda: layers.PLE(5, ARCHS, 2, 1, -1),
        "num_shared_experts: expected an integer of at least 0, got -1",
    ),
    "no experts at all": (
        lambda: layers.AdaTT(5, ARCHS, 2, 0, 0),
        "num_task_experts, num_shared_experts: expected at least one expert, got none",
    ),
    "a negative count": (
        lambda: layers.CGC(5, [4], 2, [1, -1], 1),
        "num_task_experts[1]: expected an integer of at least 0, got -1",
    ),
    "counts of another type": (
        lambda: layers.PLE(5, ARCHS, 2, 1.0, 1),
        "num_task_experts: expected a number or a list of 2, got 1.0",
    ),
    "no bottom": (
        lambda: layers.SharedBottom(5, [], 2),
        "hidden_dims: expected a list of layer widths, as in [256, 128], got []",
    ),
    "a bottom that is a number": (
        lambda: layers.CustomizedSharing(5, 4, 2),
        "hidden_dims: expected a list of layer widths, as in [256, 128], got 4",
    ),
    "no expert of one level": (
        lambda: layers.CGC(5, [], 2, 1, 1),
        "expert_arch: expected a list of layer widths, as in [256, 128], got []",
    ),
    "a negative width": (
        lambda: layers.SingleTask(5, [6, -4], 2),
        "hidden_dims[1]: expected an integer of at least 1, got -4",
    ),
    "a negative width of a level": (
        lambda: layers.PLE(5, [[6], [-4]], 2, 1, 1),
        "expert_out_dims[1][0]: expected an integer of at least 1, got -4",
    ),
    "a negative width of an MLP": (
        lambda: layers.MLP(5, [-4]),
        "mlp_arch[0]: expected an integer of at least 1, got -4",
    ),
    "a gate's width": (
        lambda: layers.MMoE(5, [4], [0], 2, 1),
        "gate_arch[0]: expected an integer of at least 1, got 0",
    ),
    "a gate's width of a level": (
        lambda: layers.MLMMoE(5, [[4]], [["3"]], 2, 1),
        "gate_archs[0][0]: expected an integer of at least 1, got '3'",
    ),
    "no gate": (
        lambda: layers.MMoE(5, [4], None, 2, 1),
        "gate_arch: expected a list of layer widths or none, as in [256, 128], got None",
    ),
    "borrows of another type": (
        lambda: layers.AsymmetricSharing(5, [4], 2, [0, 1]),
        "borrows: expected one list of tasks for each of 2 tasks, got [0, 1]",
    ),
    "borrows out of range": (
        lambda: layers.AsymmetricSharing(5, [4], 2, [[0], [2]]),
        "borrows[1]: expected one of 2 tasks (0 to 1), got 2",
    ),
    "nothing borrowed": (
        lambda: layers.AsymmetricSharing(5, [4], 1, [[]]),
        "borrows[0]: expected a tuple of at least one index, none twice, got ()",
    ),
    "borrows of several widths": (
        lambda: layers.AsymmetricSharing(5, [4], 2, [[0], [0, 1]], "concat"),
        "borrows: expected equally many tasks in every list, to be concatenated, got [1, 2]",
    ),
    "no shared experts of a backbone": (
        lambda: layers.CentralTaskArch(layers.MtlConfigs("mmoe", 1, 0, ARCHS), layers.ArchInputs(2), 5),
        "num_shared_experts: expected an integer of at least 1, got 0",
    ),
    "no tasks of a backbone": (
        lambda: layers.CentralTaskArch(layers.MtlConfigs("ple", 1, 1, ARCHS), layers.ArchInputs(0), 5),
        "num_task: expected an integer of at least 1, got 0",
    ),
    "a tower's width": (lambda: central("ple", [-5]), "task_mlp[0]: expected an integer of at least 1, got -5"),
    "model": (
        lambda: central("mtnas", [5]),
        "mtl_model: expected one of att_sp, att_g, ple, cross_st, mmoe, share_bottom,",
    ),
    "activation": (lambda: layers.MLP(5, [4], "swish"), "activation: expected one of identity, relu"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_central_without_configs_is_refused_by_name():
    with pytest.raises(TypeError, match="mtl_configs: expected an MtlConfigs, got NoneType"):
        layers.CentralTaskArch(None, layers.ArchInputs(3), 7)
    with pytest.raises(TypeError, match="opts: expected an ArchInputs, got int"):
        layers.CentralTaskArch(layers.MtlConfigs("ple", 1, 1, ARCHS), 3, 7)
