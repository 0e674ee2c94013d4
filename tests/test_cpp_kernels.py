"""The kernels' own C++ test, tests/cpp: against plain loops on guarded memory, without Python or
PyTorch, under every ISA.

Each kind takes a minute or two, so `make test` leaves them to `make test-cpp-all` and to .ci/run;
tests/test_parity.py has the same kernels through PyTorch.
"""

import pytest

from .cpp import run


@pytest.mark.slow
@pytest.mark.parametrize("kind", run.KINDS)
def test_kernels(kind):
    if reason := run.missing(kind):
        pytest.skip(reason)
    said = list(run.run(kind))
    assert said and all(line.endswith(" cases checked") for line in said)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind: expected one of plain, sanitized, neon, got 'fast'"):
        run.missing("fast")
