"""One level from tensors, in every form its arguments may have, against its equations in plain
torch; compilation."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fusedmoe import functional
from fusedmoe.activation import Activation
from fusedmoe.functional import LevelShape, fusion_level, mixing_weights
from fusedmoe.graph import Parameter
from fusedmoe.parts import Source
from fusedmoe.testing import Problem, assert_close, evaluate, expectation, randomise

ROWS = 9
SLOT, EXPERT = partial(Source, "slot"), partial(Source, "expert")


class Form(NamedTuple):
    """One way to write a level: what `fusion_level` is given, and what that means.

    `shapes` are the tensors by name, x among them. `call` turns them into arguments. `meaning`
    turns them into (slot, [(W, b), ...]) of each expert, and (gate, {expert: v}) of each unit,
    where a gate is None or (selector, G, c, sees).
    """

    shapes: dict[str, tuple[int, ...]]
    call: Callable[[dict], dict]
    meaning: Callable[[dict], tuple[list, list]]
    activation: Callable[[Tensor], Tensor] = nn.functional.silu


class Named(NamedTuple):
    """As much of a table as `evaluate` asks for: the names of the tensors."""

    parameters: tuple[Parameter, ...]


def plain(x: Tensor, experts: list, units: list, activation) -> tuple[Tensor, tuple[Tensor]]:
    """out [B, U, H] and w [B, U, E], by the level's equations."""
    x = x if x.dim() == 3 else x[:, None]
    y = []
    for slot, layers in experts:
        h = x[:, slot]
        for weight, bias in layers:
            h = activation(h @ weight.T if bias is None else h @ weight.T + bias)
        y.append(h)
    out, dense = [], []
    for gate, static in units:
        w = {}
        if gate is not None and gate[3]:
            selector, g, c, sees = gate
            q = {"slot": x, "root": x[:, :1], "expert": torch.stack(y, 1)}[selector.kind][:, selector.index]
            z = q @ g.T if c is None else q @ g.T + c
            w = dict(zip(sees, torch.softmax(z, -1).unbind(-1), strict=True))
        for e, v in static.items():
            w[e] = w[e] + v if e in w else v * x.new_ones(len(x))
        out.append(sum((w[e][:, None] * y[e] for e in w), torch.zeros_like(y[0])))
        dense.append(torch.stack([w.get(e, x.new_zeros(len(x))) for e in range(len(y))], -1))
    return torch.stack(out, 1), (torch.stack(dense, 1),)


def one_layer(t: dict, slots, bias: bool = True) -> list:
    """The meaning of stacked `w` and `b`."""
    return [(slot, [(t["w"][e], t["b"][e] if bias else None)]) for e, slot in enumerate(slots)]


FORMS = {
    "stacked, one slot, defaults": Form(
        {"x": (ROWS, 5), "w": (4, 3, 5), "b": (4, 3), "g": (2, 4, 5)},
        lambda t: {"weights": t["w"], "biases": t["b"], "gates": t["g"]},
        lambda t: (one_layer(t, [0] * 4), [((SLOT(), t["g"][u], None, range(4)), {}) for u in range(2)]),
        nn.functional.relu,
    ),
    "stacked, slots dealt out, static [U, E]": Form(
        {"x": (ROWS, 2, 5), "w": (4, 3, 5), "b": (4, 3), "g": (2, 4, 5), "c": (2, 4), "v": (2, 4)},
        lambda t: {
            "weights": t["w"],
            "biases": t["b"],
            "gates": (t["g"], t["c"]),
            "static": t["v"],
            "level": LevelShape(activation="SiLU"),
        },
        lambda t: (
            one_layer(t, [0, 0, 1, 1]),
            [((SLOT(u), t["g"][u], t["c"][u], range(4)), dict(enumerate(t["v"][u]))) for u in range(2)],
        ),
    ),
    "an axis of one slot": Form(
        {"x": (ROWS, 1, 5), "w": (2, 3, 5), "g": (3, 2, 5)},
        lambda t: {"weights": t["w"], "biases": None, "gates": (t["g"], None), "level": LevelShape(activation="silu")},
        lambda t: (one_layer(t, [0] * 2, bias=False), [((SLOT(), t["g"][u], None, range(2)), {}) for u in range(3)]),
    ),
    "separate weights, sees of different sizes, a unit without a gate, static fixed and learned": Form(
        {
            "x": (ROWS, 5),
            **{f"w{e}": (3, 5) for e in range(4)},
            **{f"b{e}": (3,) for e in range(4)},
            "g0": (2, 5),
            "g2": (4, 5),
            "c2": (4,),
            "v1": (2,),
        },
        lambda t: {
            "weights": [t[f"w{e}"] for e in range(4)],
            "biases": tuple(t[f"b{e}"] for e in range(4)),
            "gates": [t["g0"], None, (t["g2"], t["c2"])],
            "level": LevelShape(activation="tanh"),
            "sees": [[3, 1], None, None],
            "static": [((0, 1), (0.5, -2)), ([3, 0], t["v1"]), None],
        },
        lambda t: (
            [(0, [(t[f"w{e}"], t[f"b{e}"])]) for e in range(4)],
            [
                ((SLOT(), t["g0"], None, (3, 1)), {0: 0.5, 1: -2.0}),
                (None, {3: t["v1"][0], 0: t["v1"][1]}),
                ((SLOT(), t["g2"], t["c2"], range(4)), {}),
            ],
        ),
        torch.tanh,
    ),
    "two layers, stacked": Form(
        {"x": (ROWS, 5), "w1": (3, 6, 5), "b1": (3, 6), "w2": (3, 4, 6), "b2": (3, 4), "g": (2, 3, 5)},
        lambda t: {
            "weights": [t["w1"], t["w2"]],
            "biases": [t["b1"], t["b2"]],
            "gates": t["g"],
            "level": LevelShape(activation="silu"),
        },
        lambda t: (
            [(0, [(t["w1"][e], t["b1"][e]), (t["w2"][e], t["b2"][e])]) for e in range(3)],
            [((SLOT(), t["g"][u], None, range(3)), {}) for u in range(2)],
        ),
    ),
    "two layers, separate, hidden widths of their own": Form(
        {
            "x": (ROWS, 5),
            "w00": (6, 5),
            "w01": (4, 6),
            "b00": (6,),
            "b01": (4,),
            "w10": (7, 5),
            "w11": (4, 7),
            "b10": (7,),
            "b11": (4,),
            "g": (2, 5),
        },
        lambda t: {
            "weights": [[t["w00"], t["w10"]], [t["w01"], t["w11"]]],
            "biases": [[t["b00"], t["b10"]], [t["b01"], t["b11"]]],
            "gates": [t["g"]],
            "level": LevelShape(activation=Activation("leaky_relu", 0.2)),
        },
        lambda t: (
            [(0, [(t[f"w{e}0"], t[f"b{e}0"]), (t[f"w{e}1"], t[f"b{e}1"])]) for e in range(2)],
            [((SLOT(), t["g"], None, range(2)), {})],
        ),
        lambda z: nn.functional.leaky_relu(z, 0.2),
    ),
    "two layers, one stacked and one separate": Form(
        {"x": (ROWS, 5), "w1": (2, 6, 5), "b1": (2, 6), "w20": (4, 6), "w21": (4, 6), "b2": (2, 4), "g": (1, 2, 5)},
        lambda t: {
            "weights": (t["w1"], [t["w20"], t["w21"]]),
            "biases": [t["b1"], t["b2"]],
            "gates": t["g"],
            "level": LevelShape(activation="silu"),
        },
        lambda t: (
            [(0, [(t["w1"][e], t["b1"][e]), (t[f"w2{e}"], t["b2"][e])]) for e in range(2)],
            [((SLOT(), t["g"][0], None, range(2)), {})],
        ),
    ),
    "no gates, static [U, E]": Form(
        {"x": (ROWS, 3, 5), "w": (3, 4, 5), "b": (3, 4), "v": (3, 3)},
        lambda t: {
            "weights": t["w"],
            "biases": t["b"],
            "gates": None,
            "static": t["v"],
            "level": LevelShape(activation="silu"),
        },
        lambda t: (one_layer(t, range(3)), [(None, dict(enumerate(t["v"][u]))) for u in range(3)]),
    ),
    "no gates, static in pairs": Form(
        {"x": (ROWS, 3, 5), "w": (3, 4, 5), "b": (3, 4), "v": (2,)},
        lambda t: {
            "weights": t["w"],
            "biases": t["b"],
            "gates": None,
            "static": [((0,), [1]), None, (range(1, 3), t["v"])],
            "level": LevelShape(activation="silu"),
        },
        lambda t: (one_layer(t, range(3)), [(None, {0: 1.0}), (None, {}), (None, {1: t["v"][0], 2: t["v"][1]})]),
    ),
    "slots and selectors of every kind": Form(
        {
            "x": (ROWS, 3, 5),
            "w": (3, 4, 5),
            "b": (3, 4),
            "g0": (3, 5),
            "g1": (2, 5),
            "g2": (3, 4),
            "g3": (1, 5),
            "c3": (1,),
        },
        lambda t: {
            "weights": t["w"],
            "biases": t["b"],
            "gates": [t["g0"], t["g1"], t["g2"], (t["g3"], t["c3"])],
            "level": LevelShape(slots=[2, 0, 2], selectors=[SLOT(0), None, EXPERT(1), SLOT(2)], activation="silu"),
            "sees": [None, (2, 0), None, (1,)],
        },
        lambda t: (
            one_layer(t, [2, 0, 2]),
            [
                ((SLOT(0), t["g0"], None, range(3)), {}),
                ((SLOT(1), t["g1"], None, (2, 0)), {}),
                ((EXPERT(1), t["g2"], None, range(3)), {}),
                ((SLOT(2), t["g3"], t["c3"], (1,)), {}),
            ],
        ),
    ),
    "stacked gates that see pairs, and one that sees nothing": Form(
        {"x": (ROWS, 5), "w": (3, 4, 5), "b": (3, 4), "g": (2, 2, 5), "c": (2, 2), "none": (0, 5)},
        lambda t: {
            "weights": t["w"],
            "biases": t["b"],
            "gates": [*zip(t["g"], t["c"], strict=True), t["none"]],
            "sees": ((0, 2), (2, 1), ()),
            "level": LevelShape(activation="silu"),
        },
        lambda t: (
            one_layer(t, [0] * 3),
            [
                ((SLOT(), t["g"][0], t["c"][0], (0, 2)), {}),
                ((SLOT(), t["g"][1], t["c"][1], (2, 1)), {}),
                ((SLOT(), t["none"], None, ()), {}),
            ],
        ),
    ),
}


def networks(form: Form, backend: str):
    """The level by the library and by its equations, as `evaluate` takes networks."""
    names = [name for name in form.shapes if name != "x"]

    def ours(x, params, _):
        arguments = form.call(dict(zip(names, params, strict=True)))
        return fusion_level(x, **arguments, backend=backend), (mixing_weights(x, **arguments, backend=backend),)

    def by_equations(x, params, _):
        return plain(x, *form.meaning(dict(zip(names, params, strict=True))), form.activation)

    return ours, by_equations


def start(form: Form, by_equations, dtype: torch.dtype) -> Problem:
    """Random tensors of the form's shapes, and upstream gradients of output and mixing weights."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in form.shapes.items()}
    randomise(tensors.values(), 5)
    x = tensors.pop("x") * 2
    named = Named(tuple(Parameter(name, tuple(t.shape), True, True) for name, t in tensors.items()))
    out, weights = by_equations(x, tuple(tensors.values()), named)
    upstream = [torch.empty_like(t) for t in (out, *weights)]
    randomise(upstream, 6)
    return Problem(named, x, tuple(tensors.values()), upstream[0], tuple(upstream[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", FORMS)
def test_a_level_is_its_equations(name, backend, dtype):
    """Output, mixing weights and the gradient of every tensor as the caller holds it, stacked ones
    included."""
    ours, by_equations = networks(FORMS[name], backend)
    given = start(FORMS[name], by_equations, dtype)
    assert_close(evaluate(ours, given), expectation(given, by_equations))


class Mixture(nn.Module):
    """Two levels as a user builds them: stacked parameters below, a `ParameterList` above, where
    the `LevelShape` is made at each call."""

    def __init__(self):
        super().__init__()
        self.weights, self.biases = nn.Parameter(torch.empty(4, 6, 5)), nn.Parameter(torch.empty(4, 6))
        self.gates, self.offsets, self.static = (
            nn.Parameter(torch.empty(2, 4, 5)),
            nn.Parameter(torch.empty(2, 4)),
            nn.Parameter(torch.empty(2, 4)),
        )
        self.level = LevelShape(activation=Activation("leaky_relu", 0.2))
        self.upper = nn.ParameterList([torch.empty(3, 6), torch.empty(3, 6)])
        self.upper_gates = nn.ParameterList([torch.empty(2, 6), torch.empty(1, 3)])
        self.upper_static = nn.Parameter(torch.empty(1))
        self.fixed = [0.25, 2]
        randomise(self.parameters(), 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower = {
            "weights": self.weights,
            "biases": self.biases,
            "gates": (self.gates, self.offsets),
            "static": self.static,
            "level": self.level,
        }
        level = LevelShape(slots=[1, 0], selectors=[Source("slot"), Source("expert", 1), None], activation="tanh")
        static = [([0, 1], self.fixed), None, ((1,), self.upper_static)]
        # As a list first: torch.compile of 2.11 unpacks no ParameterList.
        gates = [*list(self.upper_gates), None]
        out = fusion_level(fusion_level(x, **lower), self.upper, None, gates, level, [None, [0], None], static)
        return out, mixing_weights(x, **lower)


def results(layer: Callable, module: Mixture, rows: int) -> list[Tensor]:
    """Output, mixing weights and every gradient."""
    x = torch.empty(rows, 2, 5)
    randomise([x], rows)
    x.requires_grad_()
    out, mixing = layer(x)
    return [out, mixing, *torch.autograd.grad(out.square().sum() + mixing.square().sum(), [x, *module.parameters()])]


def compiled(module: Mixture, dynamic: bool | None = None) -> tuple[Callable, list]:
    """The module compiled, forward and backward traced, and the graphs compiled so far. Cold:
    neither Dynamo nor we remember anything."""
    graphs = []

    def noted(graph, inputs, **options):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs, **options)

    torch._dynamo.reset()
    functional._build.cache_clear()
    return torch.compile(module, fullgraph=True, dynamic=dynamic, backend=noted), graphs


def assert_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(("dynamic", "compiled_at"), [(None, {11, 7}), (True, {11})])
def test_a_layer_compiles_cold_and_for_any_batch(dynamic, compiled_at):
    """Left to itself Dynamo compiles for the first size, and once more for all the others."""
    module = Mixture()
    layer, graphs = compiled(module, dynamic)
    seen = set()
    for rows in (11, 7, 33, 64):
        before = len(graphs)
        ours = results(layer, module, rows)
        assert_same(ours, results(module, module, rows))
        if len(graphs) > before:
            seen.add(rows)
    assert seen == compiled_at


def test_a_compiled_layer_sees_changes_of_its_wiring():
    """What the table was built from is guarded."""
    module = Mixture()
    layer, _ = compiled(module)
    before = results(layer, module, 7)
    changes = [
        ("level", LevelShape(activation=Activation("leaky_relu", 0.3))),
        ("level", LevelShape(slots=(1, 0, 1, 0))),
        ("level", LevelShape(selectors=(Source("slot", 1), Source("slot", 0)))),
        ("fixed", [0.5, 2]),
        ("fixed", [0.5, 3]),
    ]
    for name, value in changes:
        setattr(module, name, value)
        ours = results(layer, module, 7)
        assert_same(ours, results(module, module, 7))
        assert not torch.equal(ours[0], before[0]), (name, value)
        before = ours


def test_the_compiler_is_not_imported_before_it_is_needed():
    """`_table` is marked for Dynamo by hand, because marking it by its function costs an import of
    a second."""
    result = subprocess.run(
        [sys.executable, "-c", "import sys, fusedmoe; print('torch._dynamo' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["False"]
    assert (
        torch.compiler.assume_constant_result(lambda: None)._dynamo_marked_constant
        is functional._table._dynamo_marked_constant
        is True
    )
