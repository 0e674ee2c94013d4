"""Cases, inputs and the measure of error that `tests/` and `bench/` share.

Nobody types a tolerance. Each follows from one rule:

    error(ours, truth) <= 2 x error(plain torch in that dtype, truth) + 8 x roundoff x max |truth|

The error is the largest absolute difference. The truth is autograd of the reference in float64.
"""

from fusedmoe.testing.measure import (
    KINKED,
    NEIGHBOURS,
    Case,
    Network,
    Problem,
    assert_close,
    assert_parity,
    bound,
    eager,
    error,
    evaluate,
    expectation,
    faults_of,
    moved,
    neighbour,
    problem,
    randomise,
    rows_off_kinks,
    softmax_by_pairs,
)
from fusedmoe.testing.tables import ACTIVATION, QUICK, build, cases, every_feature, ragged, smoothed, with_empty_gate

__all__ = [
    "ACTIVATION",
    "KINKED",
    "NEIGHBOURS",
    "QUICK",
    "Case",
    "Network",
    "Problem",
    "assert_close",
    "assert_parity",
    "bound",
    "build",
    "cases",
    "eager",
    "error",
    "evaluate",
    "every_feature",
    "expectation",
    "faults_of",
    "moved",
    "neighbour",
    "problem",
    "ragged",
    "randomise",
    "rows_off_kinks",
    "smoothed",
    "softmax_by_pairs",
    "with_empty_gate",
]
