"""The table: what is written comes back, what no output needs is known."""

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedmoe.activation import RELU, Activation, activation
from fusedmoe.codec import decode, encode, handle
from fusedmoe.families import adatt, mmoe, shared_bottom
from fusedmoe.graph import product
from fusedmoe.outputs import dependencies
from fusedmoe.parts import (
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
)
from fusedmoe.table import Table
from fusedmoe.testing import Case, cases, problem

from .test_table_messages import EXPERTS, GOOD, OPS, of_unit

CASES = {name: case.table for name, case in cases().items()}


def test_units_of_the_last_level_have_one_width():
    experts = (Expert(from_slots(0), (Linear(3),)), Expert(from_slots(0), (Linear(5),)))
    units = (Unit(static=Static((0,), (1.0,))), Unit(static=Static((1,), (1.0,))))
    with pytest.raises(ValueError, match=r"last level: expected one width, got widths \[3, 5\]"):
        Table((Input(1, 4),), (Level(experts, units),))
    towers = (Task(from_slots(0, 1), (Linear(2),)), Task(from_slots(1), (Linear(2),)))
    assert Table((Input(1, 4),), (Level(experts, units),), towers).output == (2, 2)


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


# What begins with @ is a handle, and may be one of this process.
@given(st.text().filter(lambda text: not text.startswith("@")))
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
        ("shared.0", (2, 2)),
        ("shared.1", (1, 1)),
    ]


def computed(table: Table) -> list[tuple[list[int], list[int]]]:
    """The units and the experts that are computed, by level."""
    return [
        (
            [u for u, unit in enumerate(level.units) if unit.computed],
            [e for e, x in enumerate(level.experts) if x.computed],
        )
        for level in table.graph.levels
    ]


def test_live_is_what_some_output_depends_on():
    table = CASES["every_feature"]
    # Upper unit 3 has no task; the lower units 0 to 4 feed the upper experts 0 to 4, unit 5 nobody,
    # and with it expert 4.
    assert computed(table) == [([0, 1, 2, 3, 4], [0, 1, 2, 3]), ([0, 1, 2], [0, 1, 2, 3, 4])]
    dead = {p.name.rsplit(".", 1)[0] for p in table.parameters if not p.live}
    assert dead == {"levels.0.experts.4.0", "levels.0.gates.3", "levels.0.gates.5", "shared"}
    assert all(p.live for p in mmoe(3, [[2]], 2, 3).parameters)


def test_an_expert_that_is_only_a_selector_is_live():
    selector = ((Source("expert", 1),),)
    units, blind = (Unit(Gate(selector, (0,))),), (Unit(Gate(selector, ())),)
    assert computed(Table((Input(1, 4),), (Level(EXPERTS, units),))) == [([0], [0, 1])]
    assert computed(Table((Input(1, 4),), (Level(EXPERTS, blind),))) == [([0], [])]


def test_what_is_read_detached_is_computed_and_has_no_gradient():
    """Unit 1 of level 0 is read detached alone: its gate and its expert get no gradient through the
    output, the gate one through the mixing weights."""
    lower = Level(EXPERTS, (Unit(static=Static((0,), (1.0,))), Unit(Gate((from_slots(0),), (1,)))))
    upper = Level(
        (Expert((Source("slot", 0), Source("slot", 1, detached=True)), OPS),), (Unit(static=Static((0,), (1.0,))),)
    )
    table = Table((Input(1, 4),), (lower, upper))
    flags = {p.name: (p.computed, p.live) for p in table.parameters}
    assert all(is_computed for is_computed, _ in flags.values())
    assert [name for name, (_, live) in flags.items() if not live] == [
        "levels.0.experts.1.0.weight",
        "levels.0.experts.1.0.bias",
    ]
    names = [p.name for p in table.parameters]
    needed = dict(zip(names, dependencies(table, (True,), (False, False))[1:], strict=True))
    assert [name for name, need in needed.items() if not need] == [
        *("levels.0.experts.1.0.weight", "levels.0.experts.1.0.bias"),
        *("levels.0.gates.1.weight", "levels.0.gates.1.bias"),
    ]


def test_ops_fold_into_stages():
    """Linear, LayerNorm and what follows: an op that cannot follow in its stage begins another."""
    ops = (Linear(3), LayerNorm(), RELU, Dropout(0.5), PReLU(True), Dropout(0.25), Dropout(0.0), Activation("identity"))
    table = Table((Input(1, 4),), (Level((Expert(from_slots(0), ops),), (Unit(static=Static((0,), (1.0,))),)),))
    stages = table.graph.levels[0].experts[0].mlp.stages
    assert [(s.kind, s.weight, s.bias, s.slope, s.activation.name, s.dropout, s.stream) for s in stages] == [
        ("linear", 0, 1, -1, "identity", 0.0, -1),
        ("norm", 2, 3, -1, "relu", 0.5, 0),
        ("copy", -1, -1, 4, "identity", 0.25, 1),
    ]
    assert [(p.name.split(".", 4)[4], p.shape) for p in table.parameters] == [
        *(("0.weight", (3, 4)), ("0.bias", (3,)), ("1.weight", (3,)), ("1.bias", (3,)), ("2.weight", (3,)))
    ]


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("1 4 1 2 0 1 3 relu", "got a table of the first edition: '1 4 1 2"),
        ('{"slots": 1}', "got a table of the first edition: '{"),
        ("fusedmoe-table 1 4", "got version 1"),
        ("fusedmoe-table", "got version none"),
        ("hello", "got 'hello'"),
    ],
)
def test_another_format_is_refused_with_its_version(text, got):
    with pytest.raises(ValueError, match="table: expected an encoding that begins with 'fusedmoe-table 3'") as caught:
        decode(text)
    assert got in str(caught.value)


def test_sizes():
    table = mmoe(5, [[4, 3]], 2, 3, towers=(6, 1))
    assert table.output == (2, 1)
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


def test_a_handle_is_a_name_in_this_process_alone():
    table = CASES["every_feature"]
    name = handle(table)
    assert (name, decode(name)) == (handle(replace(table)), table)
    assert len(name) < 10
    copied = pickle.loads(pickle.dumps(table))
    assert copied == table and not hasattr(copied, "handle")
    given = problem(Case(table, 3), torch.float32)
    save, mixing = 0, False
    by_name, by_text = (
        torch.ops.fusedmoe.network_cpu(given.x, given.params, text, save, mixing, None)[0]
        for text in (name, encode(table))
    )
    assert torch.equal(by_name, by_text)
    with pytest.raises(ValueError, match="or the handle of one that this process bound"):
        torch.ops.fusedmoe.network_cpu(given.x, given.params, "@987654", save, mixing, None)
