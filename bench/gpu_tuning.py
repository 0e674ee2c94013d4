"""Part f of `make gpu`: what FUSEDMOE_AUTOTUNE=1 finds beside the shipped tiles of three networks,
and what it gains."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gpu_arms import Cell, Subject, medians, proven
from gpu_cases import Case, Skipped, few

from fusedmoe.kernels.triton import tuning
from fusedmoe.speed.calls import MODES
from fusedmoe.speed.subjects import MAIN

ROWS, DTYPE, BACKEND = 4096, "bfloat16", "triton"


@contextmanager
def asked(folder: str) -> Iterator[None]:
    """A block whose first calls tune, and keep what they find in a folder. The library reads the
    variable once a process."""
    os.environ |= {"FUSEDMOE_AUTOTUNE": "1", "FUSEDMOE_CACHE_DIR": folder}
    tuning.enabled.cache_clear()
    try:
        yield
    finally:
        os.environ["FUSEDMOE_AUTOTUNE"] = "0"
        tuning.enabled.cache_clear()


def tune(cell: Cell) -> dict:
    """Time the shipped tiles, let the first call choose, and time what it chose."""
    call = Subject(cell).ours(BACKEND)
    shipped = medians({"ours": call})["ours"]["device_ms"]
    with tempfile.TemporaryDirectory() as folder:
        with asked(folder):
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
            tuned = medians({"ours": call})["ours"]["device_ms"]
        files = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("tiles-*.json"))]
    chosen = {
        chosen["key"]["work"]: {"tiles": chosen["tiles"], "milliseconds": chosen["milliseconds"]} for chosen in files
    }
    return {
        "cell": cell._asdict(),
        "shipped_ms": shipped,
        "tuned_ms": tuned,
        "tuning_seconds": seconds,
        "chosen": chosen,
    }


def cases(book: dict) -> list[Case]:
    """Raises: Skipped where Triton's kernels did not pass the self-test: the others have no tiles
    to choose."""
    if BACKEND not in proven(book, (DTYPE,))[DTYPE]:
        raise Skipped(f"backend {BACKEND} did not pass the self-test, or is not here")
    cells = [Cell(layer, mode, ROWS, DTYPE) for mode in MODES for layer in MAIN]
    return [Case(cell.key, partial(tune, cell)) for cell in (cells[:1] if few() else cells)]
