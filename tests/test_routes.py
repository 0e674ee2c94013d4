"""Routes of a call: pairs that are left out, selectors that are chosen; against loops, on every
backend that takes them; what is left out has no gradient, and its numbers do not matter."""

import copy
import pickle
import random
from functools import partial

import pytest
import torch

from fusedmoe import codec
from fusedmoe.op import fusion_network
from fusedmoe.parts import Expert, Gate, Input, Level, Linear, Source, Static, Task, Unit, from_slots
from fusedmoe.reference import operator as reference
from fusedmoe.route import Choice, Routed
from fusedmoe.table import Table
from fusedmoe.testing import assert_close, evaluate, expectation

from . import oracle
from .random_grammar import Grammar
from .random_tables import start
from .test_grammar import DRAWS, DTYPES, FUSED, GPU, on, same
from .test_oracle import assert_rounding

BACKENDS = FUSED


def drawn_route(table: Table, seed: int) -> tuple:
    """A route that leaves out about half of everything, and now and then nothing of a unit."""
    draw = random.Random(seed)

    def choice(unit: Unit) -> Choice | None:
        if unit.gate is None or not unit.gate.sees or draw.random() < 0.2:
            return None
        experts = tuple(draw.sample(unit.gate.sees, draw.randint(1, len(unit.gate.sees))))
        return Choice(experts, draw.randrange(max(1, len(getattr(unit.gate, "selectors", ())))))

    return tuple(tuple(choice(unit) for unit in level.units) for level in table.levels)


def supernet(levels: int = 2, networks: int = 3) -> Table:
    """MTNAS: every unit may read any sub-network, and select by the root or by any unit below."""
    built = []
    for number in range(levels):
        count = networks if number else 1
        experts = tuple(Expert(from_slots(e % count), (Linear(4),)) for e in range(networks))
        selectors = (((Source("input"),),) if number else ()) + tuple(from_slots(s) for s in range(count))
        units = tuple(Unit(Gate(selectors, tuple(range(networks)))) for _ in range(networks))
        built.append(Level(experts, units))
    tasks = tuple(Task(from_slots(t), (Linear(2),)) for t in range(networks))
    return Table((Input(1, 4),), tuple(built), tasks)


def of(seed: int) -> tuple[Table, tuple]:
    table = supernet() if seed % 4 == 3 else Grammar(seed).table()
    return table, drawn_route(table, seed)


def plain_route(route: tuple) -> list:
    return [[(choice.experts, choice.selector) if choice else None for choice in level] for level in route]


def outputs_by_loops(given, route) -> torch.Tensor:
    values = {p.name: tensor.tolist() for p, tensor in zip(given.table.parameters, given.params, strict=True)}
    rows = [oracle.network(given.table, values, [x], plain_route(route))[0] for x in given.x.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(40))
def test_a_route_is_the_loops_without_what_it_leaves_out(seed):
    table, route = of(seed)
    given = start(table, 4, torch.float64, seed)
    out, _ = reference.forward(given.x, given.params, Routed(table, route))
    assert_rounding(out, outputs_by_loops(given, route))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", DRAWS)
def test_outputs_and_gradients_of_a_route(seed, backend, dtype):
    table, route = of(seed)
    given = start(table, 19, dtype, seed)
    given = given._replace(table=Routed(table, route))
    ours = evaluate(on(backend), given)
    assert_close(ours, expectation(given))
    again = evaluate(partial(on(backend), recompute=True), given)
    assert [name for name in ours if not same(ours[name], again[name])] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_route_leaves_out_has_no_gradient_and_cannot_spoil_the_rest(backend):
    table = supernet(1)
    params = [torch.randn(p.shape, dtype=DTYPES[0]) for p in table.parameters]
    names = [p.name for p in table.parameters]
    left_out = {"levels.0.experts.1.0.weight", "levels.0.experts.1.0.bias"}
    route = ((Choice((0,)), Choice((0, 2)), Choice((2,))),)
    for name, parameter in zip(names, params, strict=True):
        parameter.fill_(float("nan")) if name in left_out else None
        parameter.requires_grad_()
    out = fusion_network(torch.randn(9, 4, dtype=DTYPES[0]), params, Routed(table, route), backend)
    out.sum().backward()
    assert {name for name, p in zip(names, params, strict=True) if p.grad is None} == left_out
    assert all(p.grad.isfinite().all() for p in params if p.grad is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_routes_before_their_backward(backend):
    table = supernet()
    given = start(table, 5, DTYPES[0])
    params = [p.requires_grad_() for p in given.params]
    routes = [drawn_route(table, seed) for seed in range(3 if GPU else 200)]

    def loss(route: tuple) -> torch.Tensor:
        return fusion_network(given.x, params, Routed(table, route), backend).sum()

    # More than are kept, and each is still its own.
    losses = [loss(route) for route in routes]
    for route, kept in zip(routes, losses, strict=True):
        found, again = (torch.autograd.grad(one, params, allow_unused=True) for one in (kept, loss(route)))
        assert all(same(a, b) for a, b in zip(found, again, strict=True))


def test_second_derivatives_of_a_route():
    table = supernet()
    given = start(table, 3, torch.float64)
    route = drawn_route(table, 5)
    inputs = [given.x.requires_grad_(), *(p.requires_grad_() for p in given.params)]
    for backend in ("cpu", "reference"):
        assert torch.autograd.gradgradcheck(
            lambda x, *params, backend=backend: fusion_network(x, params, Routed(table, route), backend), inputs
        )


def test_a_routed_table_by_its_text():
    table = supernet()
    routed = Routed(table, drawn_route(table, 1))
    for text in (routed.text, codec.handle(routed)):
        found = codec.decode(text)
        assert found.graph == routed.graph
        assert found.route_text == routed.route_text
    with pytest.raises(ValueError, match="expected the words of a route"):
        codec.decode(f"{table.text} route 1 2 3")
    with pytest.raises(ValueError, match="expected the words of a route of this table"):
        codec.decode(routed.text[:-1] + ("0" if routed.text[-1] != "0" else "3"))


WRONG = {
    "levels": ((None,), "route: expected 2 levels"),
    "units": (((None,), (None,) * 3), "route, level 0: expected 3 choices, one a unit"),
    "kind": ((((0,), None, None), (None,) * 3), r"route, level 0, unit 0: expected a Choice or None, got \(0,\)"),
    "none left": (((Choice(()), None, None), (None,) * 3), "route, level 0, unit 0, experts: expected a tuple of at"),
    "unseen": (
        ((None,) * 3, (None, Choice((3,)), None)),
        r"route, level 1, unit 1, experts: expected one of 3 experts \(0 to 2\), got 3",
    ),
    "selector": (
        ((Choice((0,), 1), None, None), (None,) * 3),
        r"route, level 0, unit 0, selector: expected one of 1 \(0 to 0\), got 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_route_is_refused_before_anything_is_computed(case):
    table = supernet()
    route, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        Routed(table, route)


def test_a_unit_without_a_gate_has_nothing_to_choose():
    level = Level((Expert(from_slots(0)),), (Unit(static=Static((0,), (1.0,))),))
    with pytest.raises(ValueError, match="level 0, unit 0: expected None, because the unit has no gate"):
        Routed(Table((Input(1, 4),), (level,)), ((Choice((0,)),),))


def test_a_route_is_compiled_whole():
    table = supernet()
    given = start(Routed(table, drawn_route(table, 2)), 5, torch.float32)
    compiled = torch.compile(
        lambda x, params: fusion_network(x, params, given.table, "cpu"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(given.x, given.params), fusion_network(given.x, given.params, given.table, "cpu"))


def test_a_routed_table_is_copied_and_pickled():
    table = supernet()
    routed = Routed(table, drawn_route(table, 4))
    for copied in (copy.deepcopy(routed), pickle.loads(pickle.dumps(routed))):
        assert copied.text == routed.text and copied.graph == routed.graph


def test_routes_of_one_table_are_told_apart():
    table = supernet()
    one, other = (Routed(table, drawn_route(table, seed)) for seed in (1, 2))
    assert one == Routed(table, drawn_route(table, 1)) and hash(one) == hash(Routed(table, drawn_route(table, 1)))
    assert one != other and one != table and len({one, other}) == 2 and repr(one) != repr(other)
    for wrong in (one, 5):
        with pytest.raises(TypeError, match=f"expected a fusedmoe.Table without a route, got {type(wrong).__name__}"):
            Routed(wrong, drawn_route(table, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selector_that_only_a_route_computes(backend):
    experts = tuple(Expert(from_slots(0), (Linear(4),)) for _ in range(2))
    gate = Gate((from_slots(0), (Source("expert", 1),)), (0,))
    table = Table((Input(1, 4),), (Level(experts, (Unit(gate),)),))
    for chosen in (table, Routed(table, ((Choice((0,), 1),),))):
        assert_close(evaluate(on(backend), given := start(chosen, 7, DTYPES[0])), expectation(given))


@pytest.mark.parametrize(
    "words", ["route 222 3 0 0 3 0 0 3 0 0", "route 333 3 0 3 0 1 2 3 0 0 3 0 0", "route 333 3 1 0 3 0 0 3 0 0"]
)
def test_words_that_are_no_route_are_refused_in_cpp(words):
    table = supernet(1)
    given = start(table, 3, torch.float32)
    text = f"{table.text} {words} {'3' * len(table.parameters)}"
    with pytest.raises((ValueError, RuntimeError), match="expected the words"):
        torch.ops.fusedmoe.network_cpu(given.x, given.params, text, 0, False, None)
