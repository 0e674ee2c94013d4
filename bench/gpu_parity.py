"""Part b of `make gpu`: the self-test of every backend, parity of the quick cases, and the tests of
streams, graphs and tuned tiles on the device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from gpu_arms import DEVICE, present
from gpu_cases import Case, few

from fusedmoe.kernels import self_test
from fusedmoe.op import fusion_network
from fusedmoe.testing import QUICK, evaluate, expectation, faults_of, problem, smoothed
from fusedmoe.testing import cases as all_cases

ROOT = Path(__file__).parent.parent
DTYPES = ("bfloat16", "float32")
# So many tensors of a case are named with their errors, the worst first.
SHOWN = 5


def run_self_test(backend: str, dtype: str) -> dict:
    """What `self_test.check` does at a first use, with every figure: the largest error over the
    allowed one. Raises: AssertionError beyond 1."""
    found = {}
    for number, table in enumerate(self_test.tables()):
        for rows in self_test.ROWS:
            found[f"table {number}, {rows} rows"] = self_test.worst(DEVICE, getattr(torch, dtype), table, rows, backend)
    wrong = {name: ratio for name, ratio in found.items() if not ratio <= 1}
    if wrong:
        raise AssertionError(
            f"expected errors of at most 1 x the one allowed, got "
            f"{', '.join(f'{ratio:.3g} ({name})' for name, ratio in wrong.items())}"
        )
    return {"worst": max(found.values()), "ratios": found}


def parity(name: str, dtype: str, backend: str) -> dict:
    """Output, mixing weights and all gradients of a case.

    Raises: AssertionError that names the tensors and their errors.
    """
    case, precision = all_cases()[name], getattr(torch, dtype)
    # In 16 bits without kinks: nearly every row has a pre-activation within rounding of one.
    given = problem(case if precision == torch.float32 else case._replace(table=smoothed(case.table)), precision)
    there = given._replace(
        x=given.x.to(DEVICE),
        params=tuple(p.to(DEVICE) for p in given.params),
        d_out=given.d_out.to(DEVICE),
        d_weights=tuple(d.to(DEVICE) for d in given.d_weights),
    )
    found = evaluate(partial(fusion_network, backend=backend, return_mixing_weights=True), there)
    expected = expectation(given)
    wrong = faults_of({key: None if value is None else value.cpu() for key, value in found.items()}, expected)
    if wrong:
        worst = "; ".join(text for _, text in sorted(wrong, reverse=True)[:SHOWN])
        raise AssertionError(f"{len(wrong)} of {len(expected)} differ: {worst}")
    return {"values": len(expected)}


def device_tests() -> dict:
    """tests/gpu beside parity: bits from run to run, streams, graphs, tuned tiles.

    Raises: AssertionError that names what fails.
    """
    # -P: the folder of this tree, where `fusedmoe` lacks its kernels, must not come before the
    # library that was built.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:benchmark", "--tb=short", "-rfEs"]
    command += ["tests/gpu", "--deselect", "tests/gpu/test_parity.py::test_parity"]
    # pytest cuts its summary to the terminal's width.
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "1000"})
    print(said.stdout, said.stderr, flush=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", said.stdout, re.MULTILINE)
    if said.returncode:
        raise AssertionError(
            f"pytest ended with status {said.returncode}: " + "; ".join(f"{name}: {why}" for name, why in failed)
        )
    return {"said": said.stdout.strip().splitlines()[-1]}


def cases(book: dict) -> list[Case]:
    """bfloat16 first: it is what people train in. A backend's self-test stands in front of its
    cases."""
    os.environ["FUSEDMOE_SELF_TEST"] = "0"
    names = QUICK[:2] if few() else QUICK
    found = []
    for dtype in DTYPES:
        found += [
            Case(f"self-test, {dtype}, {backend}", partial(run_self_test, backend, dtype)) for backend in present()
        ]
        found += [
            Case(f"{name}, {dtype}, {backend}", partial(parity, name, dtype, backend))
            for name in names
            for backend in present()
        ]
    return [*found, Case("tests/gpu", device_tests)]
