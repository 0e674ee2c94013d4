"""What one level says to arguments that do not fit: what, where, expected, got, and never an error
of Python's own."""

import pytest
import torch
from torch import Tensor

from fusedmoe.functional import LevelShape, fusion_level, mixing_weights
from fusedmoe.parts import Source


def good(**changes) -> dict:
    """Arguments of a level with 4 experts and 2 units, with some things changed."""
    arguments = {
        "x": torch.ones(2, 5),
        "weights": torch.ones(4, 3, 5),
        "biases": torch.ones(4, 3),
        "gates": torch.ones(2, 4, 5),
    }
    return {**arguments, **changes}


def matrices(*shapes) -> list[Tensor]:
    return [torch.ones(shape) for shape in shapes]


BAD = {
    "x is a list": ({"x": [[1.0]]}, TypeError, r"x: expected a tensor \[B, D\] or \[B, S, D\], got list"),
    "x is a vector": ({"x": torch.ones(5)}, ValueError, r"x: expected \[B, D\] or .*, got a tensor \[5\]"),
    "x has no slots": (
        {"x": torch.ones(2, 0, 5)},
        ValueError,
        r"x: expected .* S and D at least 1, got a tensor \[2, 0, 5\]",
    ),
    "x is too wide": (
        {"x": torch.ones(2, 6)},
        ValueError,
        r"params, levels\.0\.experts\.0\.0\.weight: expected \[3, 6\], got \[3, 5\]",
    ),
    "x has another dtype": (
        {"x": torch.ones(2, 5).double()},
        TypeError,
        r"^x: expected torch\.float32, the parameters' dtype, got torch\.float64$",
    ),
    "weights is None": (
        {"weights": None},
        TypeError,
        r"weights: expected \[E, H, D\] or a list of E tensors \[H, D\], or a list of either, .*, got None",
    ),
    "weights is a matrix": (
        {"weights": torch.ones(3, 5)},
        ValueError,
        r"weights: expected \[E, H, D\], .*, got a tensor \[3, 5\]",
    ),
    "weights is an empty list": (
        {"weights": []},
        ValueError,
        r"weights: expected \[E, H, D\] or .*, got an empty list",
    ),
    "weights has no experts": (
        {"weights": torch.ones(0, 3, 5)},
        ValueError,
        r"weights: expected \[E, H, D\], E at least 1, .*, got a tensor \[0, 3, 5\]",
    ),
    "weights is a list of integers": (
        {"weights": [1, 2]},
        TypeError,
        r"weights, layer 0: expected \[E, H, D\] or a list .*, got int",
    ),
    "weights holds None": (
        {"weights": [None, *matrices((3, 5))]},
        TypeError,
        r"weights, expert 0: expected a tensor \[H, D\], got None",
    ),
    "weights holds a vector": (
        {"weights": matrices((3, 5), (3,))},
        ValueError,
        r"weights, expert 1: expected \[H, D\], got a tensor \[3\]",
    ),
    "weights has an empty layer": (
        {"weights": [torch.ones(4, 3, 5), []]},
        ValueError,
        "weights, layer 1: expected at least one expert, got an empty list",
    ),
    "weights has layers of different counts": (
        {"weights": matrices((4, 3, 5), (3, 3, 3)), "biases": None},
        ValueError,
        "weights, layer 1: expected 4 experts, as layer 0 of weights has, got 3",
    ),
    "weights of different widths": (
        {"weights": matrices((3, 5), (4, 5)), "biases": None, "gates": torch.ones(1, 2, 5)},
        ValueError,
        r"level 0, unit 0: expected experts of one output width, got widths \[3, 4\]",
    ),
    "a layer that does not follow": (
        {"weights": matrices((4, 6, 5), (4, 3, 7)), "biases": None},
        ValueError,
        r"experts\.0\.1\.weight: expected \[3, 6\], got \[3, 7\]",
    ),
    "weights of no width": (
        {"weights": torch.ones(4, 0, 5)},
        ValueError,
        "expert 0, linear map 0, width: expected an integer of at least 1, got 0",
    ),
    "biases are too few": (
        {"biases": torch.ones(3, 3)},
        ValueError,
        "biases, layer 0: expected 4 experts, as layer 0 of weights has, got 3",
    ),
    "biases have too many layers": (
        {"biases": matrices((4, 3), (4, 3))},
        ValueError,
        "biases: expected 1 layers, as weights has, got 2",
    ),
    "biases are too wide": (
        {"biases": torch.ones(4, 6)},
        ValueError,
        r"experts\.0\.0\.bias: expected \[3\], got \[6\]",
    ),
    "biases hold None": (
        {"biases": [None, *matrices((3,), (3,), (3,))]},
        TypeError,
        r"biases, expert 0: expected a tensor \[H\], got None",
    ),
    "biases is a number": (
        {"biases": 0.0},
        TypeError,
        r"biases: expected \[E, H\] or a list of E tensors \[H\], .*, got float",
    ),
    "no units": ({"gates": None}, ValueError, "gates, static: expected at least one unit, got None and None"),
    "gates is empty": ({"gates": []}, ValueError, r"gates, static: expected at least one unit, got \[\] and None"),
    "gates is a matrix": (
        {"gates": torch.ones(4, 5)},
        ValueError,
        r"gates: expected stacked \[U, n, K\], or one item a unit, got a tensor \[4, 5\]",
    ),
    "gates is a string": ({"gates": "softmax"}, TypeError, r"gates: expected None, stacked G \[U, n, K\], .*, got str"),
    "gates holds a vector": (
        {"gates": matrices((4, 5), (4,))},
        ValueError,
        r"gates, unit 1: expected \[n, K\], got a tensor \[4\]",
    ),
    "gates holds a number": (
        {"gates": [torch.ones(4, 5), 1]},
        TypeError,
        r"gates, unit 1: expected None, G \[n, K\] or \(G, c \[n\]\), got int",
    ),
    "gates holds a triple": (
        {"gates": [matrices((4, 5), (4,), (4,))]},
        TypeError,
        r"gates, unit 0: expected None, G \[n, K\] or .*, got list",
    ),
    "a pair without a map": (
        {"gates": [(None, torch.ones(4))]},
        TypeError,
        r"gates, unit 0: expected a tensor \[n, K\], got None",
    ),
    "a gate's bias is a number": (
        {"gates": [(torch.ones(4, 5), 0.0)]},
        TypeError,
        r"gates, unit 0, bias: expected a tensor \[n\], got float",
    ),
    "a gate's bias is too long": (
        {"gates": [matrices((4, 5), (5,))]},
        ValueError,
        r"gates\.0\.bias: expected \[4\], got \[5\]",
    ),
    "a stacked bias has a unit too many": (
        {"gates": matrices((2, 4, 5), (3, 4))},
        ValueError,
        "gates, bias: expected 2 units, as G has, got 3",
    ),
    "a stacked bias is a vector": (
        {"gates": matrices((2, 4, 5), (2,))},
        ValueError,
        r"gates, bias: expected \[U, n\], got a tensor \[2\]",
    ),
    "a gate has rows too few": (
        {"gates": torch.ones(2, 3, 5)},
        ValueError,
        "gates, unit 0: expected 4 rows, one for each expert it sees, got 3",
    ),
    "a gate is too wide": (
        {"gates": torch.ones(2, 4, 6)},
        ValueError,
        r"levels\.0\.gates\.0\.weight: expected \[4, 5\], got \[4, 6\]",
    ),
    "sees has a unit too few": ({"sees": [(0, 1, 2, 3)]}, ValueError, "sees: expected 2 items, one a unit, got 1"),
    "sees is a number": ({"sees": 3}, TypeError, "sees: expected one tuple of experts a unit, got int"),
    "sees is flat": ({"sees": [0, 1]}, TypeError, "sees, unit 0: expected a tuple of integers, got int"),
    "sees holds a number": (
        {"sees": [(0, 1, 2, 3), (0, 1.0, 2, 3)]},
        TypeError,
        "sees, unit 1: expected integers, got float in it",
    ),
    "sees holds a truth": (
        {"sees": [(0, True, 2, 3), None]},
        TypeError,
        "sees, unit 0: expected integers, got bool in it",
    ),
    "sees is a mask": (
        {"sees": [torch.ones(4), None]},
        TypeError,
        r"sees, unit 0: expected a tuple of integers, got a tensor \[4\]",
    ),
    "sees an expert that is not there": (
        {"sees": [(0, 1, 2, 4), None]},
        ValueError,
        r"level 0, unit 0, sees: expected one of 4 experts \(0 to 3\), got 4",
    ),
    "sees an expert twice": (
        {"sees": [(0, 1, 2, 2), None]},
        ValueError,
        r"level 0, unit 0, sees: expected a tuple of indices, none twice, got \(0, 1, 2, 2\)",
    ),
    "sees without a gate": (
        {"gates": [torch.ones(4, 5), None], "sees": [None, (0,)]},
        ValueError,
        "sees, unit 1: expected None, because .*no gate, got",
    ),
    "static has a column too few": (
        {"static": torch.ones(2, 3)},
        ValueError,
        r"static: expected \[U, 4\], one column an expert, got a tensor \[2, 3\]",
    ),
    "static has a unit too many": (
        {"static": torch.ones(3, 4)},
        ValueError,
        "static: expected 2 units, as gates has, got 3",
    ),
    "static is empty": ({"static": []}, ValueError, "static: expected 2 units, as gates has, got 0"),
    "static is a number": (
        {"static": 1.0},
        TypeError,
        r"static: expected None, \[U, E\], or a list of one item a unit, got float",
    ),
    "static holds a tensor": (
        {"static": [torch.ones(2), None]},
        TypeError,
        r"static, unit 0: expected None or a pair \(experts, weights\), got a tensor \[2\]",
    ),
    "static holds a triple": (
        {"static": [(0, 1, 2), None]},
        TypeError,
        r"static, unit 0: expected None or a pair .*, got tuple",
    ),
    "static's experts are a number": (
        {"static": [(0, [1.0]), None]},
        TypeError,
        "static, unit 0, experts: expected a tuple of integers, got int",
    ),
    "static has a weight too few": (
        {"static": [((0, 1), [1.0]), None]},
        ValueError,
        "static, unit 0: expected 2 weights, one for each .*, got 1",
    ),
    "static has a learned weight too few": (
        {"static": [((0, 1), torch.ones(1)), None]},
        ValueError,
        "static, unit 0: expected 2 weights, .*, got 1",
    ),
    "static's weights are a matrix": (
        {"static": [((0, 1), torch.ones(1, 2)), None]},
        ValueError,
        r"static, unit 0: expected \[2\], got a tensor \[1, 2\]",
    ),
    "static's weights are a number": (
        {"static": [((0,), 1.0), None]},
        TypeError,
        "static, unit 0: expected a tensor or a list of floats, got float",
    ),
    "static's weights are text": (
        {"static": [((0,), ["1.0"]), None]},
        TypeError,
        "static, unit 0: expected one tensor or floats, got str",
    ),
    "static's weights are tensors": (
        {"static": [((0,), matrices(())), None]},
        TypeError,
        r"static, unit 0: expected one tensor or floats, got a tensor \[\]",
    ),
    "static of an expert that is not there": (
        {"static": [((7,), [1.0]), None]},
        ValueError,
        r"unit 0, static weights: expected one of 4 experts .*, got 7",
    ),
    "level is a dictionary": ({"level": {"slots": (0, 1)}}, TypeError, "level: expected a LevelShape, got dict"),
    "a slot too few": (
        {"level": LevelShape(slots=(0, 0, 0))},
        ValueError,
        "level.slots: expected 4 slots, one an expert, got 3",
    ),
    "a slot that is not there": (
        {"level": LevelShape(slots=(0, 0, 0, 1))},
        ValueError,
        r"level 0, expert 3, sources: expected one of 1 slots .*, got 1",
    ),
    "experts that do not deal out": (
        {"x": torch.ones(2, 3, 5)},
        ValueError,
        "level.slots: expected the slot of each expert, because 4 experts .* 3 slots",
    ),
    "a selector too many": (
        {"level": LevelShape(selectors=[Source("slot")] * 3)},
        ValueError,
        "level.selectors: expected 2 selectors, one a unit, got 3",
    ),
    "no selectors": (
        {"level": LevelShape(selectors=())},
        ValueError,
        "level.selectors: expected 2 selectors, one a unit, got 0",
    ),
    "a selector that is not there": (
        {"level": LevelShape(selectors=[Source("slot"), Source("expert", 4)])},
        ValueError,
        r"level 0, unit 1, selector: expected one of 4 experts \(0 to 3\), got 4",
    ),
    "a selector without a gate": (
        {"gates": [torch.ones(4, 5), None], "level": LevelShape(selectors=[None, Source("slot")])},
        ValueError,
        r"level.selectors, unit 1: expected None, because the unit has no gate, got Source\(kind='slot'",
    ),
    "more gates than slots": (
        {"x": torch.ones(2, 2, 5), "gates": torch.ones(3, 4, 5)},
        ValueError,
        "level.selectors, unit 2: expected a Source, because x has no slot 2 but 2 slots, got None",
    ),
    "an unknown activation": (
        {"level": LevelShape(activation="swish")},
        ValueError,
        "activation: expected one of identity, .*, got 'swish'",
    ),
    "an unknown backend": ({"backend": "gpu"}, ValueError, "backend: expected auto, .*, got 'gpu'"),
    "a tensor elsewhere": (
        {"biases": torch.ones(4, 3, device="meta")},
        ValueError,
        r"experts\.0\.0\.bias: expected a tensor on cpu, .*, got one on meta",
    ),
}


@pytest.mark.parametrize("function", [fusion_level, mixing_weights])
@pytest.mark.parametrize("fault", BAD)
def test_bad_input_says_what_where_expected_and_got(fault, function):
    changes, kind, message = BAD[fault]
    with pytest.raises(kind, match=message):
        function(**good(**changes))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"slots": "01"}, TypeError, "level.slots: expected a tuple of integers, got str"),
        ({"slots": (0, None)}, TypeError, "level.slots: expected integers, got None in it"),
        ({"selectors": "root"}, TypeError, "level.selectors: expected a tuple of Source, got str"),
        ({"selectors": ("root", "root")}, TypeError, "level.selectors, unit 0: expected a Source or None, got 'root'"),
        (
            {"selectors": (None, Source("input"))},
            ValueError,
            "level.selectors, unit 1: expected one of slot, expert, got 'input'",
        ),
        (
            {"selectors": (Source("slot", [0]),)},
            TypeError,
            r"level.selectors, unit 0: expected an integer as index, got \[0\]",
        ),
        ({"activation": None}, TypeError, "level.activation: expected a name or an Activation, got None"),
    ],
)
def test_bad_wiring_says_what_where_expected_and_got(fields, kind, message):
    with pytest.raises(kind, match=message):
        LevelShape(**fields)


def test_good_arguments_are_good():
    """The table above changes one thing each in arguments that work, a truth in `sees` even after
    its equal."""
    assert fusion_level(**good()).shape == (2, 2, 3)
    assert mixing_weights(**good(sees=[(0, 1, 2, 3), None])).shape == (2, 2, 4)
    with pytest.raises(TypeError):
        fusion_level(**good(sees=[(0, True, 2, 3), None]))


def test_wiring_turns_lists_into_tuples():
    assert LevelShape(slots=[0, 1], selectors=[Source("slot")]) == LevelShape(slots=(0, 1), selectors=(Source("slot"),))
