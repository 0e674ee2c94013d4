"""First link of the chain: the reference equals loops written from the papers, forward and (by
differences) backward."""

import itertools

import pytest
import torch

from fusedmoe import families
from fusedmoe.dtype import row
from fusedmoe.reference.operator import backward, forward
from fusedmoe.testing import ACTIVATION, Case, Problem, assert_close, build, cases, error, expectation, problem

from . import oracle

CASES = cases()
U = row(torch.float64).roundoff


def assert_rounding(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """Two float64 computations of one formula, apart by the rounding of chains of at most 64 sums and
    products of numbers that do not exceed the truth's or 1."""
    assert error(ours, truth) <= 64 * torch.finfo(torch.float64).eps * max(1.0, float(truth.abs().max()))


def loops(given: Problem) -> dict[str, torch.Tensor]:
    """Output and mixing weights of the oracle."""
    values = {p.name: tensor.tolist() for p, tensor in zip(given.table.parameters, given.params, strict=True)}
    rows = [oracle.network(given.table, values, [sample]) for sample in given.x.tolist()]
    out = torch.tensor([out for out, _ in rows], dtype=torch.float64)
    weights = [
        torch.tensor([w[level] for _, w in rows], dtype=torch.float64) for level in range(len(given.table.levels))
    ]
    for w, level in zip(weights, given.table.graph.levels, strict=True):
        # The operator leaves out the units on which no output depends.
        w[:, [u for u, unit in enumerate(level.units) if not unit.computed]] = 0.0
    return {"out": out, **{f"weights.{i}": w for i, w in enumerate(weights)}}


def allowed(given: Problem) -> dict[str, tuple[torch.Tensor, float]]:
    """What `loops` may return: the reference's units, before tasks concatenate them."""
    bounds = {name: largest for name, (_, largest) in expectation(given).items()}
    out, weights = forward(given.x, given.params, given.table)
    return {"out": (out, bounds["out"]), **{f"weights.{i}": (w, bounds[f"weights.{i}"]) for i, w in enumerate(weights)}}


@pytest.mark.parametrize("name", sorted(CASES))
def test_forward(name):
    given = problem(CASES[name])
    assert_close(loops(given), allowed(given))


@pytest.mark.parametrize("family", ["every_feature", *ACTIVATION])
def test_backward_by_differences(family):
    """d_x and every d_param equal central differences of the oracle, whose truncation error is
    measured with twice the step."""
    table = (
        CASES["every_feature"].table
        if family == "every_feature"
        else build(family, 2, [[2], [2]], 2, 2, activation="tanh")
    )
    given = problem(Case(table, 2))
    d_out = torch.randn(len(given.x), *table.output, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    d_x, d_params = backward(given.x, given.params, table, d_out, given.d_weights)
    pairs = [
        (given.x, d_x),
        *((p, torch.zeros_like(p) if d is None else d) for p, d in zip(given.params, d_params, strict=True)),
    ]

    def loss() -> float:
        values = loops(given)
        return float(
            (values["out"] * d_out).sum()
            + sum((values[f"weights.{i}"] * d).sum() for i, d in enumerate(given.d_weights))
        )

    for tensor, d in pairs:
        # Some elements of every tensor: all of them would take a minute.
        for place in list(itertools.islice(range(tensor.numel()), 0, None, 1 + tensor.numel() // 4)):
            near, far = (_slope(loss, tensor, place, step) for step in (1e-5, 2e-5))
            rounding = 8 * U * max(1.0, abs(loss())) / 1e-5
            assert abs(float(d.reshape(-1)[place]) - near) <= abs(far - near) + rounding


def _slope(loss, tensor: torch.Tensor, place: int, step: float) -> float:
    """The central difference of the loss by one element of a tensor."""
    flat = tensor.view(-1)
    kept = flat[place].item()
    ends = []
    for end in (kept + step, kept - step):
        flat[place] = end
        ends.append(loss())
    flat[place] = kept
    return (ends[0] - ends[1]) / (2 * step)


def maps(values: dict[str, list], where: str, activation: str | None = None):
    """The layers under a name, as the oracle's MLP takes them; without an activation the (W, b) of
    a gate."""
    if activation is None:
        return values[f"{where}.weight"], values[f"{where}.bias"]
    count = sum(name.startswith(f"{where}.") and name.endswith("weight") for name in values)
    return [(*maps(values, f"{where}.{j}"), activation, 0.0) for j in range(count)]


def stack(table, values, activation: str):
    """(experts, gates) per level."""
    return [
        (
            [maps(values, f"levels.{i}.experts.{e}", activation) for e in range(len(level.experts))],
            [maps(values, f"levels.{i}.gates.{u}") for u in range(len(level.units)) if level.units[u].gate],
        )
        for i, level in enumerate(table.levels)
    ]


def compare_rows(table, row_of):
    """Check the reference's output against `row_of(sample [S][D], values by name)`, the paper's
    equation for one row."""
    given = problem(Case(table, 4))
    values = {p.name: tensor.tolist() for p, tensor in zip(table.parameters, given.params, strict=True)}
    expected = torch.tensor([row_of(sample, values) for sample in given.x.tolist()], dtype=torch.float64)
    out, _ = forward(given.x, given.params, table)
    assert out.shape == expected.shape
    assert error(out, expected) <= expectation(given)["out"][1]


def test_mmoe_by_its_equations():
    table = families.mmoe(4, [[3, 2]], 3, num_experts=4)

    def row_of(sample, values):
        ((experts, gates),) = stack(table, values, "relu")
        return oracle.mmoe(sample[0], experts, gates)

    compare_rows(table, row_of)


@pytest.mark.parametrize("counts", [[2, 2, 2], [1, 3, 2], [2, 1, 0]])
def test_ple_by_its_equations(counts):
    table = families.ple(4, [[3], [2, 5]], 2, counts[:-1], counts[-1])
    compare_rows(table, lambda sample, values: oracle.ple(sample, stack(table, values, "relu"), counts))


def test_cgc_by_its_equations():
    table = families.cgc(4, [[3]], 2, [1, 2], 2)
    compare_rows(table, lambda sample, values: oracle.ple(sample * 3, stack(table, values, "relu"), [1, 2, 2]))


@pytest.mark.parametrize(("counts", "residual"), [([2, 2, 2], True), ([1, 1], True), ([2, 2], False), ([1, 3], True)])
def test_adatt_sp_by_its_equations(counts, residual):
    table = families.adatt_sp(4, [[3], [2]], len(counts), counts, static_weights=residual)

    def native(level, u, values):
        if not residual:
            return None
        if set(counts) == {1}:
            return [1.0]
        v = oracle._flat(values[f"shared.{level}"])
        return v[sum(counts[:u]) : sum(counts[: u + 1])]

    def row_of(sample, values):
        levels = stack(table, values, "relu")
        return oracle.adatt(
            sample,
            [
                (experts, gates, [native(i, u, values) for u in range(len(counts))])
                for i, (experts, gates) in enumerate(levels)
            ],
            counts,
        )

    compare_rows(table, row_of)


@pytest.mark.parametrize("counts", [[2, 2, 1], [1, 1, 1], [1, 3, 2]])
def test_adatt_by_its_equations(counts):
    table = families.adatt(4, [[3], [2]], len(counts) - 1, counts[:-1], counts[-1])

    def native(level, u, values):
        if set(counts) == {1}:
            return [1.0]
        return values[f"shared.{u}"][level]

    def row_of(sample, values):
        levels = stack(table, values, "relu")
        return oracle.adatt(
            sample,
            [
                (experts, gates, [native(i, u, values) for u in range(len(gates))])
                for i, (experts, gates) in enumerate(levels)
            ],
            counts,
        )

    compare_rows(table, row_of)


def test_cross_stitch_by_its_equations():
    table = families.cross_stitch(4, [[3, 5], [2]], 3)

    def row_of(sample, values):
        return oracle.cross_stitch(
            sample, [(experts, values[f"shared.{i}"]) for i, (experts, _) in enumerate(stack(table, values, "relu"))]
        )

    compare_rows(table, row_of)
