"""The rewritten network of the benchmark has the reference's outputs and gradients, for every
family, and refuses what it cannot do.
"""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from fusedmoe import testing
from fusedmoe.activation import Activation
from fusedmoe.drafts import share_input
from fusedmoe.families import FAMILIES
from fusedmoe.parts import Expert, Gate, Input, Level, Source, Static, Unit, from_slots, mlp
from fusedmoe.speed.restructured import Restructured, arrange, runs_of
from fusedmoe.table import Table


def expert(slot, *widths):
    return Expert(from_slots(slot), mlp(widths, Activation("tanh")))


def mixed() -> Table:
    """Experts in no order of slots, unequal numbers of them, a unit without a gate, gates of
    shuffled slots and experts, learned static weights.
    """
    lower = Level(
        (expert(2, 6, 5), expert(0, 6, 5), expert(2, 6, 5)),
        (
            Unit(Gate((from_slots(1),), (2, 0)), Static((1, 0), tensor=0, offset=1)),
            Unit(static=Static((2,), (0.5,))),
            Unit(Gate((from_slots(0),), (1,))),
        ),
    )
    upper = Level(
        (expert(2, 4, 3), expert(0, 4, 3), expert(2, 4, 3), expert(1, 4, 3)),
        (Unit(Gate((from_slots(2),), (3, 0, 1))), Unit(Gate((from_slots(0),), (1, 2, 3, 0)), Static((2,), tensor=0))),
    )
    return Table((Input(3, 4),), (lower, upper), shared=((3,),))


def tables() -> dict[str, Table]:
    return {**{name: testing.build(name, 7, [[6, 5], [4]], 3, 2) for name in FAMILIES}, "mixed": mixed()}


TABLES = tables()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_it_computes_what_the_reference_computes(name, dtype):
    table = TABLES[name]
    given = testing.problem(testing.Case(share_input(table), 23), dtype)._replace(d_weights=())
    network = Restructured(table, given.params).to(dtype)

    def rewritten(x, params, _):
        return functional_call(network, arrange(table, params), (x[:, 0],)), ()

    def plain(x, params, shared):
        return testing.eager(x, params, shared)[0], ()

    # The operator's parameters, arranged anew: what it holds gives the same numbers.
    torch.testing.assert_close(network(given.x[:, 0]), rewritten(given.x, given.params, table)[0], rtol=0, atol=0)
    ours, expected = testing.evaluate(rewritten, given), testing.expectation(given, plain)
    # No gradient reaches a dead parameter through the reference; here it may be a gradient of
    # zeros.
    dead = [key for key, (truth, _) in expected.items() if truth is None]
    assert all(ours.pop(key) is None or not ours.get(key, torch.zeros(1)).any() for key in dead)
    testing.assert_close(ours, {key: value for key, value in expected.items() if key not in dead})


def test_its_parameters_are_its_own_and_arranged_once():
    table = TABLES["ple"]
    params = testing.problem(testing.Case(table, 3), torch.float32).params
    network = Restructured(table, params)
    x = torch.ones(2, table.inputs[0].width)
    before = network(x)
    for param in params:
        param.zero_()
    assert torch.equal(network(x), before)
    assert dict(network.named_parameters()).keys() == arrange(table, params).keys()
    assert all(p.is_contiguous() and p.requires_grad for p in network.parameters())


def test_slots_of_equal_counts_are_one_product():
    """PLE's second level: three tasks with two experts each are one batch, the shared experts
    another.
    """
    table = testing.build("ple", 7, [[6], [4]], 3, 2)
    level = table.graph.levels[1]
    ragged = replace(level, experts=level.experts[:-1])
    assert [[(slot, len(experts)) for slot, experts in run] for run in runs_of(ragged)] == [
        [(0, 2), (1, 2), (2, 2)],
        [(3, 1)],
    ]
    assert len(runs_of(level)) == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda level: replace(level, experts=(expert(0, 9, 5), *level.experts[1:])),
            "level 0, experts: expected equal layers with a bias, got 2 kinds",
        ),
        (
            lambda level: replace(level, units=(Unit(Gate((from_slots(1),), ())), *level.units[1:])),
            "level 0, gates: expected one map",
        ),
        (
            lambda level: replace(level, units=(Unit(Gate(((Source("expert", 1),),), (0,))), *level.units[1:])),
            "level 0, gates: expected one map",
        ),
        (
            lambda level: replace(level, units=(Unit(Gate(((Source("input"),),), (0,))), *level.units[1:])),
            "level 1, gates: expected selectors of one kind",
        ),
    ],
)
def test_it_refuses_what_it_cannot_do(change, what):
    table = mixed()
    number = int(what.split(",")[0].removeprefix("level "))
    levels = [change(level) if i == number else level for i, level in enumerate(table.levels)]
    table = replace(table, levels=tuple(levels))
    with pytest.raises(ValueError, match=what):
        Restructured(table, [torch.zeros(p.shape) for p in table.parameters])


def test_it_refuses_towers():
    table = testing.build("mmoe", 4, [[3]], 2, 2, towers=(2, 1))
    with pytest.raises(ValueError, match=r"table.tasks: expected no towers"):
        Restructured(table, [torch.zeros(p.shape) for p in table.parameters])
