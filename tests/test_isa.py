"""Every ISA of the build that this processor has: parity of every case, and a row's bits whatever
batch it comes in.

The choice is made once a process, so each ISA gets a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

from fusedmoe import _C, families
from fusedmoe.op import fusion_network
from fusedmoe.packed import pack, runner
from fusedmoe.testing import Case, assert_close, cases, evaluate, expectation, problem

HERE = [name for name, here in _C.isas() if here]


def fused(x, params, table):
    return fusion_network(x, params, table, backend="cpu", return_mixing_weights=True)


def check_parity() -> None:
    for case in cases().values():
        given = problem(case, torch.float32)
        assert_close(evaluate(fused, given), expectation(given))


def check_bits() -> None:
    """Rows of a batch of 300 against the same rows alone: few rows, blocks and their remainders,
    reductions of several chains."""
    for table in (
        families.adatt(37, [[29], [40, 33]], 3, 2, 1, activation="silu", towers=(8, 1)),
        families.mmoe(300, [[257, 390]], 3, 4),
    ):
        given = problem(Case(table, 300), torch.float32)
        whole = evaluate(fused, given)
        rows = len(given.x)
        for count in (1, 2, 3, 5, 8, 9, 16, 17, 33, 257):
            part = slice(rows - count, rows)
            alone = given._replace(
                x=given.x[part], d_out=given.d_out[part], d_weights=tuple(d[part] for d in given.d_weights)
            )
            with torch.no_grad():
                out, weights = fused(alone.x, alone.params, table)
                assert torch.equal(runner(table)(alone.x, pack(alone.params, table)), out), f"{count} rows, packed"
            values = {
                "out": out,
                **{f"weights.{i}": w for i, w in enumerate(weights)},
                "d_x": evaluate(fused, alone)["d_x"],
            }
            for name, value in values.items():
                assert torch.equal(value, whole[name][part]), f"{count} rows, {name}"


@pytest.mark.parametrize("isa", HERE)
def test_isa(isa):
    result = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "FUSEDMOE_ISA": isa}, capture_output=True, text=True
    )
    assert result.stdout == f"{isa} checked\n", result.stderr


@pytest.mark.parametrize("name", ["mmx", ""])
def test_unknown_isa_is_refused(name):
    script = (
        "import torch, fusedmoe\ntry:\n    fusedmoe.nn.MMoE(2, [2], [], 2, 2, "
        "backend='cpu')(torch.ones(1, 2))\nexcept RuntimeError as error:\n    print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "FUSEDMOE_ISA": name}, capture_output=True, text=True
    )
    names = ", ".join(name for name, _ in _C.isas())
    assert result.stdout == f"backend cpu: FUSEDMOE_ISA: expected one of {names}, got {name!r}\n", (
        result.stdout + result.stderr
    )


if __name__ == "__main__":
    check_parity()
    check_bits()
    print(_C.isa(), "checked")
