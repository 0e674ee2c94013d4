"""Part c of `make gpu`: times of the main layers against eager, CUDA graphs, `torch.compile` and
the restructured network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from gpu_arms import Cell, Subject, graph_of, measured, proven
from gpu_cases import Case, few

from fusedmoe.speed.calls import MODES, Call
from fusedmoe.speed.subjects import MAIN

# The sizes in the order of interest, and of cost: those behind the first share its kernels; what is
# cut off is what stands last.
ROWS = (4096, 64, 65536, 16384, 1024)
DTYPES = ("bfloat16", "float32")
COMPILED = {"torch.compile": {}, "torch.compile, max-autotune": {"mode": "max-autotune-no-cudagraphs"}}
# Of a rehearsal: a forward of one launch, a training step of many rows, and a compiled arm.
FEW = (
    "AdaTT T3m2, inference, 64 rows, bfloat16",
    "AdaTT T3m2, training step, 4096 rows, bfloat16",
    "MMoE T3e8, inference, 4096 rows, bfloat16, torch.compile",
)
Arms = Iterator[tuple[str, Callable[[], Call]]]


def plain_arms(subject: Subject, backends: list[str]) -> Arms:
    """Everything that needs no compiler of PyTorch's. Graphs come last: a capture that fails may
    leave the device's generator unusable."""
    calls = {"eager": subject.eager, "restructured": subject.restructured}
    calls |= {backend: partial(subject.ours, backend) for backend in backends}
    yield from calls.items()
    for name, make in calls.items():
        yield f"{name}, CUDA graph", lambda make=make: graph_of(make())


def compiled_arms(subject: Subject, backends: list[str], compiler: str) -> Arms:
    """A compiled arm, and its CUDA graph, between eager and ours: what they took is in the cell's
    other cases, and here again for the same clocks."""
    yield "eager", subject.eager
    for backend in backends:
        yield backend, partial(subject.ours, backend)
    compiled = None

    def make() -> Call:
        nonlocal compiled
        compiled = subject.compiled(**COMPILED[compiler])
        return compiled

    yield compiler, make
    if compiled is not None:
        yield f"{compiler}, CUDA graph", lambda: graph_of(compiled)


def time_cell(cell: Cell, arms: Callable[[Subject], Arms]) -> dict:
    """Check and time the arms of a cell."""
    subject = Subject(cell)
    return {"cell": cell._asdict(), "arms": measured(arms(subject), *subject.expected())}


def tiers() -> list[tuple[str, str, tuple[int, ...]]]:
    """(compiler, or "plain", dtype, rows) in the order of interest."""
    compile_default, compile_most = COMPILED
    return [
        ("plain", "bfloat16", ROWS),
        (compile_default, "bfloat16", ROWS[:2]),
        ("plain", "float32", ROWS[:2]),
        (compile_most, "bfloat16", ROWS[:1]),
        ("plain", "float32", ROWS[2:]),
        (compile_default, "float32", ROWS[:2]),
        (compile_default, "bfloat16", ROWS[2:]),
        (compile_most, "bfloat16", ROWS[1:]),
        (compile_default, "float32", ROWS[2:]),
        (compile_most, "float32", ROWS),
    ]


def cases(book: dict) -> list[Case]:
    """Raises: Skipped where no backend passed the self-test."""
    right = proven(book, DTYPES)
    found = []
    for compiler, dtype, sizes in tiers():
        for rows in sizes:
            for mode in MODES:
                for layer in MAIN:
                    cell = Cell(layer, mode, rows, dtype)
                    if compiler == "plain":
                        found.append(
                            Case(cell.key, partial(time_cell, cell, partial(plain_arms, backends=right[dtype])))
                        )
                    else:
                        arms = partial(compiled_arms, backends=right[dtype], compiler=compiler)
                        found.append(Case(f"{cell.key}, {compiler}", partial(time_cell, cell, arms)))
    return [case for case in found if case.key in FEW] if few() else found
