"""Fused layers against plain PyTorch's ways, the arms in turn: the source of the speeds in README (`make bench`, then `make report`)."""

import pytest

from fusedmoe.speed import BATCHES, MODES, ROUNDS, SUBJECTS, Case, measure, repeats_of


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_layer(benchmark, peak, subject, mode, batch):
    case = Case(subject, batch, mode, compiled=True)
    case.check()
    arms = measure(case, ROUNDS)
    benchmark.group = f"{subject}, {mode}"
    benchmark.extra_info.update(subject=subject, mode=mode, batch=batch, flops=case.flops, arms={name: times._asdict() for name, times in arms.items()})
    benchmark.extra_info["share_of_peak"] = case.flops / arms["fused"].median / (1e9 * peak)
    # The plugin's own statistics are of the fused arm alone, after the arms have been timed in turn.
    benchmark.pedantic(case.arms["fused"], rounds=ROUNDS, iterations=repeats_of(case.arms["fused"]))
