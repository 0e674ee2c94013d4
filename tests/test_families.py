"""The families: each table says what its row of the taxonomy says, and wrong arguments are refused
by name."""

import pytest
import torch

from fusedmoe.activation import RELU, activation
from fusedmoe.drafts import share_input, with_towers
from fusedmoe.families import (
    FAMILIES,
    adatt,
    adatt_sp,
    asymmetric_sharing,
    cgc,
    cross_stitch,
    customized_sharing,
    ml_mmoe,
    mmoe,
    omoe,
    ple,
    shared_bottom,
    single_task,
)
from fusedmoe.parts import Level, Linear, Static, Task, from_slots, mlp
from fusedmoe.reference import operator
from fusedmoe.table import Table
from fusedmoe.testing import Case, bound, error, problem

ROOT = "input 0"


def slots(level: Level) -> list[int]:
    return [expert.sources[0].index for expert in level.experts]


def sees(level: Level) -> list[tuple[int, ...] | None]:
    return [unit.gate.sees if unit.gate else None for unit in level.units]


def selectors(level: Level) -> list[str | None]:
    sources = [unit.gate.selectors[0][0] if unit.gate else None for unit in level.units]
    return [f"{source.kind} {source.index}" if source else None for source in sources]


def units_of(task: Task) -> tuple[int, ...]:
    return tuple(source.index for source in task.sources)


def statics(level: Level) -> list[Static | None]:
    return [unit.static for unit in level.units]


def ones(*experts: int) -> Static:
    return Static(experts, values=(1.0,) * len(experts))


def test_every_family_stands_under_its_name():
    assert list(FAMILIES) == [
        *("single_task", "shared_bottom", "omoe", "mmoe", "ml_mmoe", "cgc", "ple", "adatt_sp", "adatt"),
        *("cross_stitch", "asymmetric_sharing", "customized_sharing"),
    ]
    assert all(name == family.__name__ for name, family in FAMILIES.items())


def test_single_task_gives_each_task_its_own_bottom():
    table = single_task(5, [[4, 3]], 3)
    (level,) = table.levels
    assert (table.inputs[0].slots, slots(level), sees(level)) == (1, [0, 0, 0], [None] * 3)
    assert statics(level) == [ones(0), ones(1), ones(2)]
    assert (table.tasks, table.output, table.shared) == ((), (3, 3), ())


def test_shared_bottom_hands_one_unit_to_every_task():
    table = shared_bottom(5, [[4, 3]], 3)
    (level,) = table.levels
    assert (table.inputs[0].slots, slots(level), statics(level)) == (1, [0], [ones(0)])
    assert table.tasks == (Task(from_slots(0)),) * 3


def test_omoe_hands_one_gated_unit_to_every_task():
    table = omoe(5, [[4]], 3, 2)
    (level,) = table.levels
    assert (slots(level), sees(level), selectors(level)) == ([0, 0], [(0, 1)], [ROOT])
    assert table.tasks == (Task(from_slots(0)),) * 3


def test_mmoe_gives_each_task_a_gate_over_all_experts():
    table = mmoe(5, [[4]], 3, 2, gate_widths=(6,))
    (level,) = table.levels
    assert (table.inputs[0].slots, slots(level)) == (1, [0, 0])
    assert (sees(level), selectors(level)) == ([(0, 1)] * 3, [ROOT] * 3)
    assert [unit.gate.hidden for unit in level.units] == [mlp((6,), RELU)] * 3


def test_ml_mmoe_reads_unit_by_unit_and_gates_on_the_root_at_every_level():
    table = ml_mmoe(5, [[4], [3]], 2, 3, gate_widths=[[], [6]])
    lower, upper = table.levels
    assert (slots(lower), slots(upper)) == ([0, 0, 0], [0, 1, 2])
    assert (sees(lower), sees(upper)) == ([(0, 1, 2)] * 3, [(0, 1, 2)] * 2)
    assert (selectors(lower), selectors(upper)) == ([ROOT] * 3, [ROOT] * 2)
    assert [level.units[0].gate.hidden for level in table.levels] == [(), mlp((6,), RELU)]
    assert ml_mmoe(5, [[4]], 2, 3) == mmoe(5, [[4]], 2, 3)


def test_ple_sees_own_then_shared_and_the_shared_unit_sees_all():
    table = ple(5, [[4], [3]], 2, [2, 1], 1)
    lower, upper = table.levels
    assert (table.inputs[0].slots, slots(lower), slots(upper)) == (3, [0, 0, 1, 2], [0, 0, 1, 2])
    assert sees(lower) == [(0, 1, 3), (2, 3), (0, 1, 2, 3)]
    assert sees(upper) == [(0, 1, 3), (2, 3)]
    assert (selectors(lower), selectors(upper)) == (["slot 0", "slot 1", "slot 2"], ["slot 0", "slot 1"])
    assert ple(5, [[4]], 3, 2, 1) == ple(5, [[4]], 3, [2, 2, 2], 1)


def test_cgc_is_ple_of_one_level_on_one_slot():
    table = cgc(5, [[4]], 2, [2, 0], 1)
    (level,) = table.levels
    assert (table.inputs[0].slots, slots(level), selectors(level)) == (1, [0, 0, 0], ["slot 0", "slot 0"])
    assert sees(level) == [(0, 1, 2), (2,)]


def test_adatt_sp_adds_learned_weights_of_own_experts():
    table = adatt_sp(5, [[4], [3]], 2, 2)
    assert (table.inputs[0].slots, table.shared) == (2, ((2, 2), (2, 2)))
    for number, level in enumerate(table.levels):
        assert (slots(level), sees(level), selectors(level)) == ([0, 0, 1, 1], [(0, 1, 2, 3)] * 2, ["slot 0", "slot 1"])
        assert statics(level) == [Static((0, 1), tensor=number), Static((2, 3), tensor=number, offset=2)]


def test_adatt_sp_with_ragged_counts_has_flat_static_tensors():
    table = adatt_sp(5, [[4]], 3, [1, 2, 0])
    assert table.shared == ((3,),)
    assert statics(table.levels[0]) == [
        Static((0,), tensor=0),
        Static((1, 2), tensor=0, offset=1),
        Static((), tensor=0, offset=3),
    ]


def test_adatt_has_static_tensors_by_unit_and_none_for_the_shared_unit_of_the_last_level():
    table = adatt(5, [[4], [3]], 2, [2, 1], 3)
    lower, upper = table.levels
    assert (table.inputs[0].slots, table.shared) == (3, ((2, 2), (2, 1), (1, 3)))
    assert slots(lower) == slots(upper) == [0, 0, 1, 2, 2, 2]
    assert (len(lower.units), len(upper.units)) == (3, 2)
    assert set(sees(lower)) == set(sees(upper)) == {(0, 1, 2, 3, 4, 5)}
    assert statics(lower) == [Static((0, 1), tensor=0), Static((2,), tensor=1), Static((3, 4, 5), tensor=2)]
    assert statics(upper) == [Static((0, 1), tensor=0, offset=2), Static((2,), tensor=1, offset=1)]


def test_adatt_adds_fixed_ones_where_every_unit_has_one_expert():
    assert statics(adatt_sp(5, [[4]], 2, 1).levels[0]) == [ones(0), ones(1)]
    assert statics(adatt(5, [[4], [4]], 2, 1, 1).levels[0]) == [ones(0), ones(1), ones(2)]
    assert adatt(5, [[4]], 2, 1, 2).shared == ((1, 1), (1, 1), (0, 2))


def test_adatt_without_static_weights_has_none():
    for table in (adatt_sp(5, [[4]], 2, 2, static_weights=False), adatt(5, [[4], [4]], 2, 1, 1, static_weights=False)):
        assert table.shared == ()
        assert all(unit.static is None for level in table.levels for unit in level.units)


def test_cross_stitch_mixes_by_rows_of_a_learned_matrix():
    table = cross_stitch(5, [[4], [3]], 2)
    assert (table.inputs[0].slots, table.shared) == (2, ((2, 2), (2, 2)))
    for number, level in enumerate(table.levels):
        assert (slots(level), sees(level)) == ([0, 1], [None, None])
        assert statics(level) == [Static((0, 1), tensor=number), Static((0, 1), tensor=number, offset=2)]


def test_asymmetric_sharing_sums_averages_or_concatenates():
    borrows = [[0], [0, 1]]
    assert statics(asymmetric_sharing(5, [[4]], 2, borrows).levels[0]) == [ones(0), ones(0, 1)]
    assert statics(asymmetric_sharing(5, [[4]], 2, borrows, "mean").levels[0]) == [
        ones(0),
        Static((0, 1), values=(0.5, 0.5)),
    ]
    assert asymmetric_sharing(5, [[4]], 2, [[0, 1], [1, 0]], "concat").tasks == (
        Task(from_slots(0, 1)),
        Task(from_slots(1, 0)),
    )


def test_tasks_of_several_widths_are_a_table_under_towers_alone():
    with pytest.raises(
        ValueError, match=r"table\.tasks: expected tasks of one width, got widths \[4, 8\]; give them towers"
    ):
        asymmetric_sharing(5, [[4]], 2, [[0], [0, 1]], "concat")
    table = asymmetric_sharing(5, [[4]], 2, [[0], [0, 1]], "concat", towers=(1,))
    assert list(table.graph.tasks or map(units_of, table.tasks)) == [(0,), (0, 1)]
    assert [p.shape for p in table.parameters if p.name.startswith("towers") and p.name.endswith("weight")] == [
        (1, 4),
        (1, 8),
    ]


def test_customized_sharing_concatenates_a_shared_bottom():
    table = customized_sharing(5, [[4]], 2, towers=(3, 1))
    assert (slots(table.levels[0]), statics(table.levels[0])) == ([0, 0, 0], [ones(0), ones(1), ones(2)])
    assert list(table.graph.tasks or map(units_of, table.tasks)) == [(0, 2), (1, 2)]
    assert [p.shape for p in table.parameters if p.name == "towers.0.0.weight"] == [(3, 8)]


def test_the_activation_follows_every_layer_but_the_last_of_gates_and_towers():
    table = mmoe(5, [[4, 4]], 2, 2, gate_widths=(6,), activation="SiLU", towers=(3, 1))
    silu = activation("silu")
    assert table.levels[0].experts[0].ops == (Linear(4), silu, Linear(4), silu)
    assert table.levels[0].units[0].gate.hidden == (Linear(6), silu)
    assert table.tasks == (
        Task(from_slots(0), (Linear(3), silu, Linear(1))),
        Task(from_slots(1), (Linear(3), silu, Linear(1))),
    )
    assert table.output == (2, 1)


def test_with_towers_keeps_what_the_tasks_read():
    layers = mlp((2,), RELU, bias=False)
    assert with_towers(single_task(5, [[4]], 2), layers).tasks == (
        Task(from_slots(0), layers),
        Task(from_slots(1), layers),
    )
    assert with_towers(shared_bottom(5, [[4]], 2), layers).tasks == (Task(from_slots(0), layers),) * 2


SHARED = {
    "ple": ple(5, [[4], [3]], 3, [1, 0, 2], 1, towers=(1,)),
    "adatt_sp": adatt_sp(5, [[4], [3]], 3, 2),
    "adatt": adatt(5, [[4], [3]], 2, 1, 2),
    "cross_stitch": cross_stitch(5, [[4], [3]], 3),
    "ml_mmoe": ml_mmoe(5, [[4], [3]], 2, 3),
}


@pytest.mark.parametrize("table", SHARED.values(), ids=SHARED)
def test_share_input_gives_the_output_of_equal_slots(table: Table):
    given = problem(Case(share_input(table), 6))
    shared, _ = operator.forward(given.x, given.params, given.table)
    spread, _ = operator.forward(given.x.expand(-1, table.inputs[0].slots, -1), given.params, table)
    assert given.table.inputs[0].slots == 1
    assert [p.shape for p in given.table.parameters] == [p.shape for p in table.parameters]
    assert error(shared, spread) <= bound(0.0, spread, torch.float64)


def dead(table: Table) -> list[str]:
    return [p.name for p in table.parameters if not p.live]


def test_parameters_that_no_output_needs():
    assert dead(adatt(5, [[4], [3]], 2, 2, 1)) == []
    # Without shared experts nobody reads the shared unit.
    assert dead(adatt(5, [[4], [3]], 1, 2, 0)) == ["levels.0.gates.1.weight", "levels.0.gates.1.bias", "shared.1"]
    assert dead(ple(5, [[4], [3]], 1, 2, 0)) == ["levels.0.gates.1.weight", "levels.0.gates.1.bias"]
    # One level has no shared unit, but a static tensor for it.
    assert dead(adatt(5, [[4]], 2, 2, 1)) == ["shared.2"]
    # Nobody borrows from task 1.
    assert dead(asymmetric_sharing(5, [[4]], 2, [[0], [0]])) == [
        "levels.0.experts.1.0.weight",
        "levels.0.experts.1.0.bias",
    ]


WRONG = {
    "widths of one level as integers": (
        lambda: ple(5, [4, 3], 2, 1, 1),
        "expert_widths: expected one list of layer widths per level, as in [[256], [128]], got [4, 3]",
    ),
    "no levels": (lambda: adatt_sp(5, [], 2, 1), "expert_widths: expected one list of layer widths per level"),
    "an expert without layers": (
        lambda: cross_stitch(5, [[4], []], 2),
        "expert_widths, level 1: expected at least one layer width, got none",
    ),
    "two levels": (
        lambda: mmoe(5, [[4], [3]], 2, 2),
        "expert_widths: expected the layer widths of one level, as in [[256, 128]], got 2 levels",
    ),
    "no tasks": (lambda: single_task(5, [[4]], 0), "num_tasks: expected an integer of at least 1, got 0"),
    "tasks that are no integer": (
        lambda: shared_bottom(5, [[4]], 2.0),
        "num_tasks: expected an integer of at least 1, got 2.0",
    ),
    "no experts": (lambda: omoe(5, [[4]], 2, 0), "num_experts: expected an integer of at least 1, got 0"),
    "no experts at all": (lambda: ple(5, [[4]], 2, 0, 0), "level 0: expected at least one expert, got none"),
    "gates of another number of levels": (
        lambda: ml_mmoe(5, [[4], [3]], 2, 2, [[6]]),
        "gate_widths: expected one list for each of 2 levels, got 1",
    ),
    "counts of another number of tasks": (
        lambda: cgc(5, [[4]], 3, [1, 2], 1),
        "num_task_experts: expected a number or a list of 3, got [1, 2]",
    ),
    "a negative count": (
        lambda: adatt(5, [[4]], 2, [1, -1], 1),
        "num_task_experts: expected an integer of at least 0, got -1",
    ),
    "a boolean count": (
        lambda: ple(5, [[4]], 2, 1, True),
        "num_shared_experts: expected an integer of at least 0, got True",
    ),
    "borrows of another number of tasks": (
        lambda: asymmetric_sharing(5, [[4]], 2, [[0]]),
        "borrows: expected one list of tasks for each of 2 tasks, got 1",
    ),
    "nothing borrowed": (
        lambda: asymmetric_sharing(5, [[4]], 2, [[0], []]),
        "borrows, task 1: expected a tuple of at least one index, none twice, got ()",
    ),
    "no such task": (
        lambda: asymmetric_sharing(5, [[4]], 2, [[0], [2]]),
        "borrows, task 1: expected one of 2 tasks (0 to 1), got 2",
    ),
    "borrows that are a number": (
        lambda: asymmetric_sharing(5, [[4]], 2, 3),
        "borrows: expected one list of tasks for each of 2 tasks, got 3",
    ),
    "borrows that are numbers": (
        lambda: asymmetric_sharing(5, [[4]], 2, [0, 1]),
        "borrows: expected one list of tasks for each of 2 tasks, got 0",
    ),
    "counts that are no list": (
        lambda: ple(5, [[4]], 2, None, 1),
        "num_task_experts: expected a number or a list of 2, got None",
    ),
    "a tower that is a number": (
        lambda: mmoe(5, [[4]], 2, 2, towers=3),
        "towers: expected a list of layer widths, got 3",
    ),
    "a gate that is a number": (
        lambda: mmoe(5, [[4]], 2, 2, gate_widths=5),
        "gate_widths: expected a list of layer widths, got 5",
    ),
    "gates that are numbers": (
        lambda: ml_mmoe(5, [[4]], 2, 2, gate_widths=[5]),
        "gate_widths: expected a list of layer widths, got 5",
    ),
    "gates that are a number": (
        lambda: ml_mmoe(5, [[4]], 2, 2, gate_widths=5),
        "gate_widths: expected one list of layer widths per level, got 5",
    ),
    "an unknown way to combine": (
        lambda: asymmetric_sharing(5, [[4]], 2, [[0], [1]], "max"),
        "combine: expected one of sum, mean, concat, got 'max'",
    ),
    "an unknown activation": (
        lambda: mmoe(5, [[4]], 2, 2, activation="swish"),
        "activation: expected one of identity, relu",
    ),
    "no layers for a tower": (lambda: with_towers(mmoe(5, [[4]], 2, 2), ()), "ops: expected at least one op, got none"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
