"""A table that contradicts itself is refused: what, where, expected and got."""

from dataclasses import replace

import pytest

from fusedmoe.activation import RELU
from fusedmoe.parts import (
    Attention,
    Dropout,
    Expert,
    Gate,
    Input,
    LayerNorm,
    Level,
    Linear,
    PReLU,
    Source,
    Static,
    Task,
    Unit,
    from_slots,
    mlp,
)
from fusedmoe.table import Table

OPS = mlp((3,), RELU)
EXPERTS = (Expert(from_slots(0), OPS), Expert(from_slots(0), OPS))
GATED = Unit(Gate((from_slots(0),), (0, 1)))
GOOD = Table((Input(1, 4),), (Level(EXPERTS, (GATED, GATED)),))


def of_unit(unit: Unit) -> dict:
    return {"levels": (Level(EXPERTS, (GATED, unit)),)}


def of_gate(**changes) -> dict:
    return of_unit(Unit(replace(GATED.gate, **changes)))


def of_experts(*experts: Expert) -> dict:
    return {"levels": (Level(experts, (GATED,)),)}


def of_source(*sources: Source) -> dict:
    return of_gate(selectors=(sources,))


def of_ops(*ops) -> dict:
    return of_experts(EXPERTS[0], Expert(from_slots(0), ops))


def of_attention(**changes) -> dict:
    given = {"query": from_slots(0), "keys": (from_slots(0), from_slots(0)), "sees": (0, 1)}
    return of_unit(Unit(Attention(**{**given, **changes})))


def of_static(**fields) -> dict:
    return {**of_unit(Unit(static=Static(**fields))), "shared": ((2, 2),)}


CONTRADICTIONS = {
    "no inputs": ({"inputs": ()}, "table.inputs: expected at least one input, got none"),
    "inputs of another type": ({"inputs": ((1, 4),)}, "table.inputs: expected a tuple of Input, got ("),
    "slots": ({"inputs": (Input(0, 4),)}, "table.inputs[0], slots: expected an integer of at least 1, got 0"),
    "slots of another type": (
        {"inputs": (Input(True, 4),)},
        "table.inputs[0], slots: expected an integer of at least 1, got True",
    ),
    "width": ({"inputs": (Input(1, -3),)}, "table.inputs[0], width: expected an integer of at least 1, got -3"),
    "levels of another type": ({"levels": [GOOD.levels[0]]}, "table.levels: expected a tuple of Level, got ["),
    "no levels": ({"levels": ()}, "table.levels: expected at least one level, got none"),
    "no experts": ({"levels": (Level((), (GATED,)),)}, "level 0: expected at least one expert, got none"),
    "no units": ({"levels": (*GOOD.levels, Level(EXPERTS, ()))}, "level 1: expected at least one unit, got none"),
    "expert's slot": (
        of_experts(Expert(from_slots(0), OPS), Expert(from_slots(1), OPS)),
        "level 0, expert 1, sources: expected one of 1 slots (0 to 0), got 1",
    ),
    "expert without sources": (
        of_experts(Expert((), OPS), EXPERTS[0]),
        "level 0, expert 0, sources: expected at least one source, got none",
    ),
    "linear map's width": (
        of_ops(Linear(0)),
        "level 0, expert 1, linear map 0, width: expected an integer of at least 1, got 0",
    ),
    "op of another type": (
        of_ops(Linear(3), "relu"),
        "level 0, expert 1, ops: expected a tuple of Linear, Activation, PReLU, LayerNorm, Dropout, Bias, got (Linear",
    ),
    "linear map's bias": (of_ops(Linear(3, bias=1)), "level 0, expert 1, linear map 0, bias: expected a bool, got 1"),
    "linear map's shared weight": (
        {**of_ops(Linear(3, shared=0)), "shared": ((3, 5),)},
        "level 0, expert 1, linear map 0, weight: expected shared tensor 0 of [3, 4], got [3, 5]",
    ),
    "linear map's shared weight that is not there": (
        of_ops(Linear(3, shared=0)),
        "level 0, expert 1, linear map 0, weight: expected one of 0 shared tensors, got 0",
    ),
    "linear map's shared bias": (
        {**of_ops(Linear(3, shared_bias=0)), "shared": ((4,),)},
        "level 0, expert 1, linear map 0, bias: expected shared tensor 0 of [3], got [4]",
    ),
    "linear map without the shared bias": (
        {**of_ops(Linear(3, bias=False, shared_bias=0)), "shared": ((3,),)},
        "level 0, expert 1, linear map 0: expected no shared bias, as it has none, got 0",
    ),
    "shared tensor as a weight and as static weights": (
        {
            "levels": (
                Level(
                    (EXPERTS[0], Expert(from_slots(0), (Linear(3, shared=0),))), (Unit(static=Static((0,), tensor=0)),)
                ),
            ),
            "shared": ((3, 4),),
        },
        "table.shared[0]: expected the weight of linear maps, or biases and static weights, got both",
    ),
    "PReLU's channels": (of_ops(PReLU(1)), "level 0, expert 1, channels of a PReLU: expected a bool, got 1"),
    "LayerNorm's eps": (
        of_ops(LayerNorm(-1.0)),
        "level 0, expert 1, LayerNorm, eps: expected a finite number of at least 0, got -1.0",
    ),
    "dropout of all": (of_ops(Dropout(1.0)), "level 0, expert 1, dropout: expected p in [0, 1), got 1.0"),
    "dropout below zero": (of_ops(Dropout(-0.5)), "level 0, expert 1, dropout: expected p in [0, 1), got -0.5"),
    "dropout of another type": (of_ops(Dropout("0.5")), "level 0, expert 1, dropout: expected p in [0, 1), got '0.5'"),
    "experts' widths": (of_ops(Linear(5)), "level 0, unit 0: expected experts of one output width, got widths [3, 5]"),
    "sees": (of_gate(sees=(0, 2)), "level 0, unit 1, sees: expected one of 2 experts (0 to 1), got 2"),
    "sees twice": (of_gate(sees=(1, 1)), "level 0, unit 1, sees: expected a tuple of indices, none twice, got (1, 1)"),
    "sees a float": (of_gate(sees=(1.0,)), "level 0, unit 1, sees: expected one of 2 experts (0 to 1), got 1.0"),
    "selector's kind": (
        of_source(Source("row")),
        "level 0, unit 1, selector: expected one of slot, input, unit, expert, got 'row'",
    ),
    "selector's slot": (
        of_source(Source("slot", 1)),
        "level 0, unit 1, selector: expected one of 1 slots (0 to 0), got 1",
    ),
    "selector's expert": (
        of_source(Source("expert", 2)),
        "level 0, unit 1, selector: expected one of 2 experts (0 to 1), got 2",
    ),
    "selector's input": (
        of_source(Source("input", 0, place=1)),
        "level 0, unit 1, selector, place: expected one of 1 inputs (0 to 0), got 1",
    ),
    "selector's level": (
        of_source(Source("unit", 0, place=0)),
        "level 0, unit 1, selector, place: expected one of 0 levels below, got 0",
    ),
    "slot's place": (
        of_source(Source("slot", place=1)),
        "level 0, unit 1, selector: expected place 0 of a slot, got 1",
    ),
    "columns": (
        of_source(Source("slot"), Source("slot", first=3, width=2)),
        "level 0, unit 1, selector, source 1: expected columns within 4, got first=3, width=2",
    ),
    "no columns": (
        of_source(Source("slot", first=4)),
        "level 0, unit 1, selector: expected columns within 4, got first=4, width=None",
    ),
    "detached of another type": (
        of_source(Source("slot", detached=1)),
        "level 0, unit 1, selector, detached: expected a bool, got 1",
    ),
    "expert that reads a later one": (
        of_experts(Expert((Source("expert", 1),), OPS), EXPERTS[0]),
        "level 0, expert 0, sources: expected one of 0 experts, got 1",
    ),
    "selectors of two widths": (
        of_gate(selectors=(from_slots(0), from_slots(0, 0))),
        "level 0, unit 1, selectors: expected alternatives of one width, got widths [4, 8]",
    ),
    "free gate without a bias": (
        of_gate(selectors=(), bias=False),
        "level 0, unit 1, gate: expected no hidden ops and a bias, as there is no selector",
    ),
    "temperature": (
        of_gate(temperature=0.0),
        "level 0, unit 1, temperature: expected a finite number above 0, got 0.0",
    ),
    "attention's keys": (
        of_attention(keys=(from_slots(0), from_slots(0, 0))),
        "level 0, unit 1, keys: expected the query's width 4, got widths [4, 8]",
    ),
    "attention's number of keys": (
        of_attention(keys=(from_slots(0),)),
        "level 0, unit 1, keys: expected 2, one for each expert seen, got 1",
    ),
    "attention's scale": (
        of_attention(scale=float("nan")),
        "level 0, unit 1, scale: expected a finite number, got nan",
    ),
    "product of one": (of_unit(Unit(product=(0,))), "level 0, unit 1, product: expected a pair of experts, got (0,)"),
    "product and a gate": (
        of_unit(Unit(GATED.gate, product=(0, 1))),
        "level 0, unit 1: expected a product, or a gate and static weights, got both",
    ),
    "gate's hidden ops": (
        of_gate(hidden=(Linear(-1),)),
        "level 0, unit 1, hidden ops of the gate, linear map 0, width: expected an integer of at least 1, got -1",
    ),
    "static: neither": (
        of_static(experts=(0,)),
        "level 0, unit 1, static weights: expected either fixed values or a shared tensor, got neither",
    ),
    "static: both": (
        of_static(experts=(0,), values=(1.0,), tensor=0),
        "level 0, unit 1, static weights: expected either fixed values or a shared tensor, got both",
    ),
    "static: values": (
        of_static(experts=(0, 1), values=(1.0,)),
        "level 0, unit 1, static weights: expected a tuple of 2 finite floats, got (1.0,)",
    ),
    "static: values in a list": (
        of_static(experts=(0,), values=[1.0]),
        "level 0, unit 1, static weights: expected a tuple of 1 finite floats, got [1.0]",
    ),
    "static: NaN": (
        of_static(experts=(0,), values=(float("nan"),)),
        "level 0, unit 1, static weights: expected a tuple of 1 finite floats, got (nan,)",
    ),
    "static: infinity": (
        of_static(experts=(0,), values=(float("inf"),)),
        "level 0, unit 1, static weights: expected a tuple of 1 finite floats, got (inf,)",
    ),
    "static: an integer": (
        of_static(experts=(0,), values=(1,)),
        "level 0, unit 1, static weights: expected a tuple of 1 finite floats, got (1,)",
    ),
    "static: tensor of another type": (
        of_static(experts=(0,), tensor="0"),
        "level 0, unit 1, static weights: expected one of 1 shared tensors (0 to 0), got '0'",
    ),
    "static: offset of another type": (
        of_static(experts=(0,), tensor=0, offset=0.0),
        "level 0, unit 1, static weights, offset: expected an integer of at least 0, got 0.0",
    ),
    "static: offset of fixed values": (
        of_static(experts=(0,), values=(1.0,), offset=None),
        "level 0, unit 1, static weights, offset: expected an integer of at least 0, got None",
    ),
    "static of another type": (
        of_unit(Unit(static="g")),
        "level 0, unit 1, static weights: expected a Static, got 'g'",
    ),
    "gate of another type": (of_unit(Unit("g")), "level 0, unit 1, gate: expected a Gate, got 'g'"),
    "gate without selectors": (
        of_gate(selectors=None),
        "level 0, unit 1, selectors: expected a tuple of tuple, got None",
    ),
    "static per channel of fixed values": (
        of_static(experts=(0,), values=(1.0,), channels=True),
        "level 0, unit 1, static weights, channels: expected a shared tensor, got fixed values",
    ),
    "static per channel": (
        of_static(experts=(0, 1), tensor=0, channels=True),
        "level 0, unit 1, static weights: expected elements within the 4 of shared tensor 0, got 0 to 5",
    ),
    "gate's bias": (of_gate(bias=None), "level 0, unit 1, bias of the gate: expected a bool, got None"),
    "gate's bias as an integer": (of_gate(bias=1), "level 0, unit 1, bias of the gate: expected a bool, got 1"),
    "sees a list": (of_gate(sees=([0],)), "level 0, unit 1, sees: expected one of 2 experts (0 to 1), got [0]"),
    "expert's slot in a list": (
        of_experts(Expert(from_slots([0]), OPS)),
        "level 0, expert 0, sources: expected one of 1 slots (0 to 0), got [0]",
    ),
    "selector's index in a list": (
        of_source(Source("slot", [0])),
        "level 0, unit 1, selector: expected one of 1 slots (0 to 0), got [0]",
    ),
    "static: expert": (
        of_static(experts=(4,), values=(1.0,)),
        "level 0, unit 1, static weights: expected one of 2 experts (0 to 1), got 4",
    ),
    "static: tensor": (
        of_static(experts=(0,), tensor=1),
        "level 0, unit 1, static weights: expected one of 1 shared tensors (0 to 0), got 1",
    ),
    "static: offset": (
        of_static(experts=(0, 1), tensor=0, offset=3),
        "level 0, unit 1, static weights: expected elements within the 4 of shared tensor 0, got 3 to 4",
    ),
    "static: negative offset": (
        of_static(experts=(0,), tensor=0, offset=-1),
        "level 0, unit 1, static weights, offset: expected an integer of at least 0, got -1",
    ),
    "shared": ({"shared": ((2, -1),)}, "table.shared[0]: expected an integer of at least 0, got -1"),
    "task's units": (
        {"tasks": (Task(from_slots(0)), Task(from_slots(2)))},
        "task 1, sources: expected one of 2 slots (0 to 1), got 2",
    ),
    "task without units": ({"tasks": (Task(()),)}, "task 0, sources: expected at least one source, got none"),
    "tower missing": (
        {"tasks": (Task(from_slots(0), OPS), Task(from_slots(1)))},
        "task 1: expected a tower, as the other tasks have, got none",
    ),
    "tasks of several widths": (
        {"tasks": (Task(from_slots(0)), Task(from_slots(0, 1)))},
        "table.tasks: expected tasks of one width, got widths [3, 6]; give them towers",
    ),
    "task of columns without a tower": (
        {"tasks": (Task((Source("slot", first=1),)),)},
        "task 0, sources: expected whole units of the last level, got (Source(",
    ),
    "more slots than the operator counts": (
        {"inputs": (Input((1 << 20) + 1, 4),)},
        "table.inputs[0], slots: expected at most 1048576, got 1048577",
    ),
    "more units than the operator counts": (
        {"levels": (Level(EXPERTS, (GATED,) * ((1 << 20) + 1)),)},
        "level 0, number of units: expected at most 1048576, got 1048577",
    ),
    "more experts than the operator counts": (
        {"levels": (Level(EXPERTS[:1] * ((1 << 20) + 1), (GATED,)),)},
        "level 0, number of experts: expected at most 1048576, got 1048577",
    ),
    "wider than the operator counts": (
        {"inputs": (Input(1, (1 << 40) + 1),)},
        "table.inputs[0], width: expected at most 1099511627776, got 1099511627777",
    ),
    "layer wider than the operator counts": (
        of_ops(Linear((1 << 40) + 1)),
        "level 0, expert 1, linear map 0, width: expected at most 1099511627776, got 1099511627777",
    ),
    "static tensor larger than the operator counts": (
        {"shared": ((1 << 30, 1 << 30),)},
        "table.shared[0], elements: expected at most 1099511627776, got 1152921504606846976",
    ),
    "towers' widths": (
        {"tasks": (Task(from_slots(0), (Linear(1),)), Task(from_slots(1), (Linear(2),)))},
        "tower outputs: expected one width, got widths [1, 2]",
    ),
}


@pytest.mark.parametrize("fault", CONTRADICTIONS)
def test_a_contradiction_says_what_where_expected_and_got(fault):
    changes, message = CONTRADICTIONS[fault]
    with pytest.raises(ValueError) as error:
        replace(GOOD, **changes)
    assert str(error.value).startswith(message)
