"""The process of one part of `make gpu`: its cases one after another, each told to the parent as it
begins and ends.

    python bench/gpu_cases.py MODULE LETTER JSON

A case that raises costs itself alone. One that leaves the device unusable ends the process, and the
parent starts another for the cases behind it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gpu_book import Book
from gpu_parts import LOST

# Whether a case left something in this process that the cases behind it must not meet.
spoilt = False


class Skipped(Exception):
    """Why a case, or all cases of a part, are left out."""


class Case(NamedTuple):
    """A case: its key in the JSON, and the call that returns what it found."""

    key: str
    call: Callable[[], dict]


def few() -> bool:
    """Whether a rehearsal asks for the first cases of each kind alone."""
    return os.environ.get("GPU_CASES") == "few"


def tell(descriptor: int, **event: object) -> None:
    """Hand a line to the parent, at once."""
    os.write(descriptor, json.dumps(event).encode() + b"\n")


def device_is_lost() -> bool:
    """Whether the device takes no more work: an error that its kernels met stays for the life of
    the process."""
    torch = sys.modules.get("torch")
    try:
        if torch:
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def outcome(case: Case) -> dict:
    """Run a case; return what it found, or the error."""
    try:
        return case.call()
    except Skipped as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def run(cases: Iterable[Case], done: set[str], descriptor: int) -> int:
    """Run the cases that are not done; return the exit status."""
    for case in cases:
        if case.key in done:
            continue
        tell(descriptor, begin=case.key)
        result = outcome(case)
        tell(descriptor, key=case.key, result=result)
        if spoilt or ("error" in result and device_is_lost()):
            return LOST
    return 0


def main() -> int:
    """Run the cases of one part."""
    module, letter, path = sys.argv[1:]
    descriptor, book = int(os.environ["GPU_EVENTS"]), Book(Path(path)).content
    try:
        cases = importlib.import_module(module).cases(book)
        return run(cases, set(book["parts"][letter]["results"]), descriptor)
    except Skipped as reason:
        tell(descriptor, skip=str(reason))
        return 0


if __name__ == "__main__":
    # Parts import this module by its name, and must meet the same classes.
    sys.modules["gpu_cases"] = sys.modules["__main__"]
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Compilers that PyTorch started may keep it waiting at its end, for minutes.
    os._exit(status)
