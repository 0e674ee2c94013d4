"""The table: what contradicts itself is refused by name, what is written comes back, what no output
needs is known.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedmoe.activation import Activation, activation
from fusedmoe.codec import decode, encode
from fusedmoe.families import adatt, mmoe, shared_bottom
from fusedmoe.table import Expert, Gate, Layer, Level, Selector, Static, Table, Task, Unit, product
from fusedmoe.testing import cases

CASES = {name: case.table for name, case in cases().items()}
LAYERS = (Layer(3),)
EXPERTS = (Expert(0, LAYERS), Expert(0, LAYERS))
GATED = Unit(Gate(Selector("slot"), (0, 1)))
GOOD = Table(1, 4, (Level(EXPERTS, (GATED, GATED)),))


def of_unit(unit: Unit) -> dict:
    return {"levels": (Level(EXPERTS, (GATED, unit)),)}


def of_gate(**changes) -> dict:
    return of_unit(Unit(replace(GATED.gate, **changes)))


def of_experts(*experts: Expert) -> dict:
    return {"levels": (Level(experts, (GATED,)),)}


def of_static(**fields) -> dict:
    return {**of_unit(Unit(static=Static(**fields))), "statics": ((2, 2),)}


CONTRADICTIONS = {
    "slots": ({"slots": 0}, "table.slots: expected an integer of at least 1, got 0"),
    "slots of another type": ({"slots": True}, "table.slots: expected an integer of at least 1, got True"),
    "width": ({"width": -3}, "table.width: expected an integer of at least 1, got -3"),
    "root": ({"root": 1}, "table.root: expected one of 1 slots (0 to 0), got 1"),
    "levels of another type": ({"levels": [GOOD.levels[0]]}, "table.levels: expected a tuple of Level, got ["),
    "no levels": ({"levels": ()}, "table.levels: expected at least one level, got none"),
    "no experts": ({"levels": (Level((), (GATED,)),)}, "level 0: expected at least one expert, got none"),
    "no units": ({"levels": (*GOOD.levels, Level(EXPERTS, ()))}, "level 1: expected at least one unit, got none"),
    "expert's slot": (
        of_experts(Expert(0, LAYERS), Expert(1, LAYERS)),
        "level 0, expert 1, slot: expected one of 1 slots (0 to 0), got 1",
    ),
    "expert without layers": (
        of_experts(Expert(0, ()), EXPERTS[0]),
        "level 0, expert 0: expected at least 1 layer, got none",
    ),
    "layer's width": (
        of_experts(EXPERTS[0], Expert(0, (Layer(0),))),
        "level 0, expert 1, width of layer 0: expected an integer of at least 1, got 0",
    ),
    "layer's activation": (
        of_experts(EXPERTS[0], Expert(0, (Layer(3, "relu"),))),
        "level 0, expert 1, layer 0: expected an Activation and a bool, got 'relu' and True",
    ),
    "layer's bias": (
        of_experts(EXPERTS[0], Expert(0, (Layer(3, bias=1),))),
        "level 0, expert 1, layer 0: expected an Activation and a bool",
    ),
    "experts' widths": (
        of_experts(EXPERTS[0], Expert(0, (Layer(5),))),
        "level 0, unit 0: expected experts of one output width, got widths [3, 5]",
    ),
    "sees": (of_gate(sees=(0, 2)), "level 0, unit 1, sees: expected one of 2 experts (0 to 1), got 2"),
    "sees twice": (of_gate(sees=(1, 1)), "level 0, unit 1, sees: expected a tuple of indices, none twice, got (1, 1)"),
    "sees a float": (of_gate(sees=(1.0,)), "level 0, unit 1, sees: expected one of 2 experts (0 to 1), got 1.0"),
    "selector's kind": (
        of_gate(selector=Selector("row")),
        "level 0, unit 1, selector: expected one of slot, root, expert, got 'row'",
    ),
    "selector's slot": (
        of_gate(selector=Selector("slot", 1)),
        "level 0, unit 1, selector: expected one of 1 slots (0 to 0), got 1",
    ),
    "selector's expert": (
        of_gate(selector=Selector("expert", 2)),
        "level 0, unit 1, selector: expected one of 2 experts (0 to 1), got 2",
    ),
    "selector's root": (
        of_gate(selector=Selector("root", 1)),
        "level 0, unit 1, selector: expected one of 1 roots (0 to 0), got 1",
    ),
    "gate's hidden layer": (
        of_gate(hidden=(Layer(-1),)),
        "level 0, unit 1, hidden layers of the gate, width of layer 0: expected an integer of at least 1, got -1",
    ),
    "static: neither": (
        of_static(experts=(0,)),
        "level 0, unit 1, static weights: expected either fixed values or a static tensor, got neither",
    ),
    "static: both": (
        of_static(experts=(0,), values=(1.0,), tensor=0),
        "level 0, unit 1, static weights: expected either fixed values or a static tensor, got both",
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
        "level 0, unit 1, static weights: expected one of 1 static tensors (0 to 0), got '0'",
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
    "gate without a selector": (of_gate(selector=None), "level 0, unit 1, selector: expected a Selector, got None"),
    "gate's bias": (of_gate(bias=None), "level 0, unit 1, bias of the gate: expected a bool, got None"),
    "gate's bias as an integer": (of_gate(bias=1), "level 0, unit 1, bias of the gate: expected a bool, got 1"),
    "sees a list": (of_gate(sees=([0],)), "level 0, unit 1, sees: expected one of 2 experts (0 to 1), got [0]"),
    "expert's slot in a list": (
        of_experts(Expert([0], LAYERS)),
        "level 0, expert 0, slot: expected one of 1 slots (0 to 0), got [0]",
    ),
    "selector's index in a list": (
        of_gate(selector=Selector("slot", [0])),
        "level 0, unit 1, selector: expected one of 1 slots (0 to 0), got [0]",
    ),
    "static: expert": (
        of_static(experts=(4,), values=(1.0,)),
        "level 0, unit 1, static weights: expected one of 2 experts (0 to 1), got 4",
    ),
    "static: tensor": (
        of_static(experts=(0,), tensor=1),
        "level 0, unit 1, static weights: expected one of 1 static tensors (0 to 0), got 1",
    ),
    "static: offset": (
        of_static(experts=(0, 1), tensor=0, offset=3),
        "level 0, unit 1, static weights: expected elements within the 4 of static tensor 0, got 3 to 4",
    ),
    "static: negative offset": (
        of_static(experts=(0,), tensor=0, offset=-1),
        "level 0, unit 1, static weights, offset: expected an integer of at least 0, got -1",
    ),
    "statics": ({"statics": ((2, -1),)}, "table.statics[0]: expected an integer of at least 0, got -1"),
    "task's units": (
        {"tasks": (Task((0,)), Task((2,)))},
        "task 1, units: expected one of 2 units of the last level (0 to 1), got 2",
    ),
    "task without units": (
        {"tasks": (Task(()),)},
        "task 0, units: expected a tuple of at least one index, none twice, got ()",
    ),
    "tower missing": (
        {"tasks": (Task((0,), LAYERS), Task((1,)))},
        "task 1: expected a tower, as the other tasks have, got none",
    ),
    "tasks of several widths": (
        {"tasks": (Task((0,)), Task((0, 1)))},
        "table.tasks: expected tasks of one width, got widths [3, 6]; give them towers",
    ),
    "more slots than the operator counts": (
        {"slots": (1 << 20) + 1},
        "table.slots: expected at most 1048576, got 1048577",
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
        {"width": (1 << 40) + 1},
        "table.width: expected at most 1099511627776, got 1099511627777",
    ),
    "layer wider than the operator counts": (
        of_experts(Expert(0, (Layer((1 << 40) + 1),))),
        "level 0, expert 0, width of layer 0: expected at most 1099511627776, got 1099511627777",
    ),
    "static tensor larger than the operator counts": (
        {"statics": ((1 << 30, 1 << 30),)},
        "table.statics[0], elements: expected at most 1099511627776, got 1152921504606846976",
    ),
    "towers' widths": (
        {"tasks": (Task((0,), (Layer(1),)), Task((1,), (Layer(2),)))},
        "tower outputs: expected one width, got widths [1, 2]",
    ),
}


@pytest.mark.parametrize("fault", CONTRADICTIONS)
def test_a_contradiction_says_what_where_expected_and_got(fault):
    changes, message = CONTRADICTIONS[fault]
    with pytest.raises(ValueError) as error:
        replace(GOOD, **changes)
    assert str(error.value).startswith(message)


def test_units_of_the_last_level_have_one_width():
    experts = (Expert(0, (Layer(3),)), Expert(0, (Layer(5),)))
    units = (Unit(static=Static((0,), (1.0,))), Unit(static=Static((1,), (1.0,))))
    with pytest.raises(ValueError, match=r"last level: expected one width, got widths \[3, 5\]"):
        Table(1, 4, (Level(experts, units),))
    towers = (Task((0, 1), (Layer(2),)), Task((1,), (Layer(2),)))
    assert Table(1, 4, (Level(experts, units),), towers).output == (2, 2)


@pytest.mark.parametrize("name", sorted(CASES))
def test_words_come_back(name):
    table = CASES[name]
    assert decode(encode(table)) == table


@pytest.mark.parametrize("value", [0.1, -1e-300, 1 / 3, float(2**53), 5e-324])
def test_floats_come_back_exactly(value):
    table = replace(GOOD, **of_unit(Unit(static=Static((0,), (value,)))))
    assert decode(encode(table)).levels[0].units[1].static.values == (value,)


def test_encode_takes_tables_alone():
    with pytest.raises(TypeError, match=r"table: expected a fusedmoe\.Table, got dict"):
        encode({})


@given(st.text())
def test_any_text_is_refused_with_a_value_error(text):
    with pytest.raises(ValueError, match="expected"):
        decode(text)


@given(st.integers(0, 400), st.sampled_from(["", "-1", "0", "1", "2", "7", "x", "9" * 5000, "1e9"]))
def test_words_changed_in_one_place_are_a_table_or_a_value_error(place, word):
    words = encode(CASES["every_feature"]).split()
    words[place % len(words)] = word
    try:
        decode(" ".join(words))
    except ValueError as error:
        assert "expected" in str(error)


def test_parameters_in_order():
    names = [(p.name, p.shape) for p in adatt(5, [[4, 3], [2]], 1, 2, 1, towers=(6, 1)).parameters]
    expert = [
        ("experts.{}.0.weight", (4, 5)),
        ("experts.{}.0.bias", (4,)),
        ("experts.{}.1.weight", (3, 4)),
        ("experts.{}.1.bias", (3,)),
    ]
    upper = [("experts.{}.0.weight", (2, 3)), ("experts.{}.0.bias", (2,))]
    gate = [("gates.{}.weight", (3, 5)), ("gates.{}.bias", (3,))]
    upper_gate = [("gates.{}.weight", (3, 3)), ("gates.{}.bias", (3,))]
    assert names == [
        *(("levels.0." + name.format(e), shape) for e in range(3) for name, shape in expert),
        *(("levels.0." + name.format(u), shape) for u in range(2) for name, shape in gate),
        *(("levels.1." + name.format(e), shape) for e in range(3) for name, shape in upper),
        *(("levels.1." + name.format(u), shape) for u in range(1) for name, shape in upper_gate),
        ("towers.0.0.weight", (6, 2)),
        ("towers.0.0.bias", (6,)),
        ("towers.0.1.weight", (1, 6)),
        ("towers.0.1.bias", (1,)),
        ("statics.0", (2, 2)),
        ("statics.1", (1, 1)),
    ]


def test_live_is_what_some_output_depends_on():
    table = CASES["every_feature"]
    # Upper unit 3 has no task; the lower units 0 to 4 feed the upper experts 0 to 4, unit 5 nobody,
    # and with it expert 4.
    assert table.live == (
        (frozenset({0, 1, 2, 3, 4}), frozenset({0, 1, 2, 3})),
        (frozenset({0, 1, 2}), frozenset({0, 1, 2, 3, 4})),
    )
    dead = {p.name.rsplit(".", 1)[0] for p in table.parameters if not p.live}
    assert dead == {"levels.0.experts.4.0", "levels.0.gates.3", "levels.0.gates.5", "statics"}
    assert all(p.live for p in mmoe(3, [[2]], 2, 3).parameters)


def test_an_expert_that_is_only_a_selector_is_live():
    units = (Unit(Gate(Selector("expert", 1), (0,))),)
    assert Table(1, 4, (Level(EXPERTS, units),)).live == ((frozenset({0}), frozenset({0, 1})),)
    blind = (Unit(Gate(Selector("expert", 1), ())),)
    assert Table(1, 4, (Level(EXPERTS, blind),)).live == ((frozenset({0}), frozenset()),)


def test_sizes():
    table = mmoe(5, [[4, 3]], 2, 3, towers=(6, 1))
    assert table.output == (2, 1)
    assert table.widths == ((5,), (3, 3))
    assert table.mixing == 6
    assert table.flops == 2 * (3 * (5 * 4 + 4 * 3) + 2 * 3 * 5 + 2 * 3 * 3 + 2 * (3 * 6 + 6 * 1))
    assert shared_bottom(5, [[3]], 4).output == (1, 3)
    assert product(()) == 1


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Activation("swish"), ValueError, "activation: expected one of identity, relu, .*, got 'swish'"),
        (lambda: Activation("relu", 0.5), ValueError, "activation relu: expected no parameter, got 0.5"),
        (lambda: Activation("elu", float("nan")), ValueError, "activation elu: expected a finite parameter, got nan"),
        (lambda: Activation("elu", True), ValueError, "activation elu: expected a finite parameter, got True"),
        (lambda: activation("PRELU"), ValueError, "activation: expected one of .*, got 'prelu'"),
        (lambda: activation(None), TypeError, "activation: expected a name or an Activation, got NoneType"),
    ],
)
def test_activations_are_checked(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_activations_by_name():
    assert activation("RELU") == Activation("relu")
    assert activation("leaky_relu") == Activation("leaky_relu", 0.01)
    assert activation(Activation("elu", 0.5)) == Activation("elu", 0.5)
    assert str(Activation("elu", 0.5)) == "elu(0.5)"
    assert str(Activation("gelu")) == "gelu"
