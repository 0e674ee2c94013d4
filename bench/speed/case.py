"""One case: a layer, a mode, a batch size, a dtype and a number of threads, with its arms, those
that cannot run, and what it computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusedmoe.speed import parity
from fusedmoe.speed.arms import Arm, Session, Setting, kinds_of
from fusedmoe.speed.grids import Cell
from fusedmoe.speed.measuring import pinned
from fusedmoe.speed.restructured import Restructured
from fusedmoe.speed.runtimes import Absent

OURS = ("fused", "fused, frozen")


class Case:
    """A cell of the grid with its arms by name, the precision and the network of each, and the
    reason for each that is absent.
    """

    def __init__(self, cell: Cell, session: Session, say: Callable[[str], None] = lambda what: None) -> None:
        """Build the arms. Args: say: told what is being built."""
        # Otherwise the second batch size would be compiled for any size, and later cases would meet
        # the limit of recompilations.
        torch.compiler.reset()
        session.workers.forget()
        self.cell, self.setting = cell, Setting(cell, session)
        self.arms: dict[str, Arm] = {}
        self.models: dict[str, str] = {}
        self.precisions: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        before = torch.get_num_threads()
        torch.set_num_threads(cell.threads)
        for kind, precision in kinds_of(cell):
            say(f"building {kind.name}")
            self.models[kind.name], self.precisions[kind.name] = kind.model, precision
            try:
                if kind.costs and not cell.compiled:
                    raise Absent("left out of this grid: it must be compiled for up to a minute; `--grid all` has it")
                self.arms[kind.name] = kind.make(self.setting, kind.model)
            except Absent as error:
                self.absent[kind.name] = str(error)
        torch.set_num_threads(before)

    @property
    def flops(self) -> int:
        """Floating-point operations of one call.

        A backward counts twice its forward (d_x and dW for each linear map).
        """
        return self.cell.batch * self.setting.layer.table.flops * (1 if self.cell.mode == "inference" else 3)

    @property
    def bytes(self) -> int:
        """Bytes that one call cannot avoid: x, parameters and output once each.

        In a training step d_out and the gradients in place of the output.
        """
        table, work = self.setting.layer.table, self.setting.work
        params = sum(param.numel() for param in self.setting.layer.params)
        inputs, output = work.x.numel() + params, self.cell.batch * table.output[0] * table.output[1]
        return self.setting.dtype.itemsize * ((inputs if self.cell.mode == "inference" else 2 * inputs) + output)

    def check(self) -> None:
        """Hold every arm against float64; a rival that is wrong becomes absent, with the reason.

        Raises: AssertionError if one of ours, or the restructured network, is not as near as the
            rule of `fusedmoe.testing` allows.
        """
        layer, setting = self.setting.layer, self.setting
        with pinned(self.cell.threads):
            expected = parity.expectation(self.cell.sizes, self.cell.batch, setting.dtype)
            given = parity.problem_of(layer, setting.work)
            if "fused" in self.arms:
                parity.check("fused", parity.network_of(layer, setting.fused().layer), given, expected)
            if "restructured" in self.arms:
                parity.check(
                    "restructured",
                    parity.rewritten(Restructured(layer.table, given.params).to(setting.dtype)),
                    given,
                    expected,
                )
            results = {name: (arm.result(), self.precisions[name]) for name, arm in self.arms.items()}
            plain = {precision: setting.plain(getattr(torch, precision)) for precision in set(self.precisions.values())}
        for name, reason in parity.wrong_results(self.cell, results, plain, expected).items():
            if name in OURS:
                raise AssertionError(f"{self.cell.name}, {name}: {reason}")
            del self.arms[name]
            self.absent[name] = reason
