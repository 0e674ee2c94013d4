"""Properties that hold for every table, over random ones."""

from dataclasses import replace

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from fusedmoe.op import fusion_network
from fusedmoe.parts import Level, Unit
from fusedmoe.table import Table
from fusedmoe.testing import Problem, assert_close, evaluate, expectation

from .random_tables import start, tables

# The same tables on every run: a suite that is red once in a hundred runs teaches people to run it
# again.
SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)


def fused(x: Tensor, params, table: Table):
    return fusion_network(x, params, table, backend="cpu", return_mixing_weights=True)


def by_name(given: Problem) -> dict[str, Tensor]:
    return {p.name: tensor for p, tensor in zip(given.table.parameters, given.params, strict=True)}


@SETTINGS
@given(tables(), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 70))
def test_parity_of_any_table(table, dtype, rows):
    given = start(table, rows, dtype)
    assert_close(evaluate(fused, given), expectation(given))


@SETTINGS
@given(tables(), st.randoms(use_true_random=False))
def test_permuting_the_experts_changes_nothing(table, random):
    """Expert `order[e]` of the permuted table is expert e; sums run in another order, so equal up
    to rounding."""
    levels, renamed, orders = [], {}, []
    for number, level in enumerate(table.levels):
        order = random.sample(range(len(level.experts)), len(level.experts))
        orders.append(order)
        levels.append(
            Level(
                tuple(level.experts[order.index(i)] for i in range(len(order))),
                tuple(renumbered(unit, order) for unit in level.units),
            )
        )
        renamed |= {f"levels.{number}.experts.{e}.": f"levels.{number}.experts.{i}." for e, i in enumerate(order)}
    permuted = replace(table, levels=tuple(levels))
    given = start(table)

    def target(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in renamed.items() if name.startswith(old)), name)

    values = {target(name): tensor for name, tensor in by_name(given).items()}
    back = [torch.tensor(order) for order in orders]
    d_weights = tuple(
        torch.empty_like(d).index_copy_(2, order, d) for d, order in zip(given.d_weights, back, strict=True)
    )
    ours = evaluate(
        fused, Problem(permuted, given.x, tuple(values[p.name] for p in permuted.parameters), given.d_out, d_weights)
    )
    wanted = expectation(given)
    result = {name: ours["d_" + target(name[2:])] if name.startswith("d_levels") else ours[name] for name in wanted}
    result |= {f"weights.{i}": ours[f"weights.{i}"][:, :, order] for i, order in enumerate(back)}
    assert_close(result, wanted)


def renumbered(unit: Unit, order: list[int]) -> Unit:
    """The unit with expert e called `order[e]`."""
    gate, static = unit.gate, unit.static
    if gate:
        ((source,),) = gate.selectors
        source = replace(source, index=order[source.index]) if source.kind == "expert" else source
        gate = replace(gate, selectors=((source,),), sees=tuple(order[e] for e in gate.sees))
    return Unit(gate, static and replace(static, experts=tuple(order[e] for e in static.experts)))


@SETTINGS
@given(tables(), st.floats(-3, 3))
def test_shifting_the_bias_of_a_gate_changes_nothing(table, shift):
    given = start(table)
    # On a coarse grid the shift is exact; a rounded one would be another problem.
    shift = round(shift * 4) / 4
    chosen = [".gates." in name and ".hidden." not in name and name.endswith("bias") for name in by_name(given)]
    coarse = tuple((t * 1024).round() / 1024 if bias else t for t, bias in zip(given.params, chosen, strict=True))
    given = given._replace(params=coarse)
    shifted = given._replace(params=tuple(t + shift if bias else t for t, bias in zip(coarse, chosen, strict=True)))
    # The same truth, but larger logits, whose rounding errors are larger.
    allowed = expectation(shifted)
    assert_close(
        evaluate(fused, shifted), {name: (truth, allowed[name][1]) for name, (truth, _) in expectation(given).items()}
    )


@SETTINGS
@given(tables(), st.floats(-2, 2))
def test_the_output_of_a_level_is_linear_in_its_static_weights(table, factor):
    given = start(replace(table, levels=table.levels[:1], tasks=()))
    learned = given.params[-1]

    def at(v: Tensor) -> Tensor:
        return fused(given.x, (*given.params[:-1], v), given.table)[0]

    none, some, scaled = at(torch.zeros_like(learned)), at(learned), at(factor * learned)
    expected = (1 - factor) * none + factor * some
    # Three outputs, each with the rounding error that plain torch may have.
    allowed = (2 + 2 * abs(factor)) * expectation(given)["out"][1] + expectation(
        given._replace(params=(*given.params[:-1], factor * learned))
    )["out"][1]
    assert float((scaled - expected).abs().max()) <= allowed


@SETTINGS
@given(tables(), st.data())
def test_a_blind_unit_sends_no_gradient_unless_the_expert_is_its_selector(table, data):
    table = replace(table, levels=table.levels[:1], tasks=())
    given = start(table)
    level = table.levels[0]
    u = data.draw(st.integers(0, len(level.units) - 1))
    d_out = torch.zeros_like(given.d_out)
    d_out[:, u] = given.d_out[:, u]
    zeros = tuple(map(torch.zeros_like, given.d_weights))
    grads = evaluate(fused, given._replace(d_out=d_out, d_weights=zeros))
    gate = level.units[u].gate
    sources = gate.selectors[0] if gate and gate.sees else ()
    selector = {source.index for source in sources if source.kind == "expert"}
    for e in set(range(len(level.experts))) - set(level.units[u].reads) - selector:
        for name, d in grads.items():
            assert d is None or not name.startswith(f"d_levels.0.experts.{e}.") or not d.any(), name


@SETTINGS
@given(tables(), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 70), st.data())
def test_a_split_batch_equals_the_whole_bit_for_bit(table, dtype, rows, data):
    """The bits of a row's output, mixing weights and d_x do not depend on the batch it comes in."""
    given = start(table, rows, dtype)
    cut = data.draw(st.integers(0, rows))
    whole = evaluate(fused, given)
    parts = [
        evaluate(
            fused,
            given._replace(x=given.x[part], d_out=given.d_out[part], d_weights=tuple(d[part] for d in given.d_weights)),
        )
        for part in (slice(0, cut), slice(cut, rows))
    ]
    for name in ("out", "d_x", *(f"weights.{i}" for i in range(len(table.levels)))):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name


@SETTINGS
@given(tables())
def test_seeing_one_expert_means_weight_one(table):
    given = start(table)
    _, weights = fused(given.x, given.params, table)
    for level, w in zip(table.graph.levels, weights, strict=True):
        for u, unit in enumerate(level.units):
            if unit.computed and unit.gate and len(unit.gate.sees) == 1 and unit.static is None:
                expected = torch.zeros(len(level.experts), dtype=w.dtype)
                expected[unit.gate.sees[0]] = 1.0
                assert torch.equal(w[:, u], expected.expand(len(w), -1))
