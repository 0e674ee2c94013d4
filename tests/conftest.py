"""Under TRITON_INTERPRET=1 the tests run against Triton's interpreter, with its bfloat16 mended,
and with FUSEDMOE_CUDA_ON_CPU against the CUDA kernels on an emulated device; both with NaN in
memory that nobody wrote.
"""

import pytest
import torch

from fusedmoe.backends import INTERPRETED
from fusedmoe.testing import QUICK

from .cuda_on_cpu import extension

EMULATED = extension.KIND is not None
if EMULATED:
    # Before the tests ask which backends there are.
    extension.register(extension.KIND)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what the interpreter and the emulator take long for."""
    if not (INTERPRETED or EMULATED):
        return
    for item in items:
        arguments = getattr(item, "callspec", None)
        name = arguments and arguments.params.get("name")
        if item.path.parent.name == "tests" and isinstance(name, str) and name not in QUICK:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=INTERPRETED or EMULATED, scope="session")
def poison():
    before = torch.are_deterministic_algorithms_enabled()
    # It makes torch fill every `empty` with NaN.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=INTERPRETED, scope="session")
def interpreter():
    from .gpu_free.interpreter import mended

    with mended():
        yield
