"""The cases of `python -m fusedmoe bench` under pytest-benchmark, for its options and comparisons:
`pytest bench --grid quick`."""

import pytest

from fusedmoe.speed.case import Case
from fusedmoe.speed.measuring import ROUNDS, pinned, repeats_of
from fusedmoe.speed.results import run


def test_layer(benchmark, session, cell):
    case = Case(cell, session)
    if "fused" not in case.arms:
        pytest.skip(case.absent["fused"])
    record = run(case)
    benchmark.group = f"{cell.layer}, {cell.mode}"
    benchmark.extra_info.update(record)
    # The plugin's own statistics are of the fused arm alone, after the arms have been timed in
    # turn.
    call = case.arms["fused"].call
    with pinned(cell.threads):
        benchmark.pedantic(call, rounds=ROUNDS, iterations=repeats_of(call))
