"""The arms of a case: ours, and everything that a user could pick instead. One row of `KINDS` each.

Every arm computes the same network with the same weights on the same rows, and states the precision
it computes in: one that rounds float32 numbers to bfloat16 on its way is no rival of float32. What
cannot run here raises `Absent`, and the reason is reported.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fusedmoe
from fusedmoe.speed.calls import MODES, Call, medium_computes_in, under_medium
from fusedmoe.speed.grids import Cell
from fusedmoe.speed.measuring import repeats_of, seconds_of
from fusedmoe.speed.runtimes import Absent, Job, export, first_line, network_of
from fusedmoe.speed.subjects import Called, Layer, Work, build, rows_for
from fusedmoe.speed.worker import Remote, Workers

INFERENCE = ("inference",)
BOTH = tuple(MODES)
# Every pass of Inductor that turns equal linear maps into one batched product; torch leaves them
# off.
BATCH_LINEAR = {
    "pre_grad_fusion_options": {"batch_linear": {}, "batch_linear_lhs": {}},
    "post_grad_fusion_options": {"batch_linear_post_grad": {}},
}


class Local:
    """An arm that runs in this process."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def repeats(self) -> int:
        return repeats_of(self.call)

    def seconds(self, repeats: int) -> float:
        return seconds_of(self.call, repeats)

    def result(self) -> Tensor:
        """Return the output, or d_x of a training step, in float32."""
        return self.call().detach().float()


Arm = Local | Remote


class Session:
    """What the cases of one run share: the workers, the ONNX files, and the backend of the fused
    arms; a context that ends them.

    `runtimes`: whether the workers' runtimes are among the arms.
    """

    def __init__(self, backend: str = "auto", runtimes: bool = True) -> None:
        self.workers, self.backend, self.runtimes = Workers(), backend, runtimes
        self.folder: TemporaryDirectory | None = None
        self.files: dict[tuple, str | Absent] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.workers.close()
        if self.folder:
            self.folder.cleanup()

    def onnx(self, setting: Setting, model: str, dtype: torch.dtype) -> str:
        """Return the path of a network's ONNX file, exported when it is first asked for.

        Raises: Absent if that fails, every time.
        """
        key = (setting.cell.sizes, model, dtype)
        if key not in self.files:
            self.folder = self.folder or TemporaryDirectory()
            path = Path(self.folder.name) / f"{len(self.files)}.onnx"
            try:
                export(
                    network_of(build(setting.cell.sizes, dtype), model).to(dtype),
                    setting.layer.table.inputs[0].width,
                    path,
                )
                self.files[key] = str(path)
            except Absent as error:
                self.files[key] = error
        if isinstance(self.files[key], Absent):
            raise self.files[key]
        return self.files[key]


class Setting:
    """What the arms of a case are made from: the layer in the case's dtype and in float32 with the
    same numbers, and the rows.
    """

    def __init__(self, cell: Cell, session: Session) -> None:
        self.cell, self.session = cell, session
        self.dtype = getattr(torch, cell.dtype)
        self.layer = build(cell.sizes, self.dtype)
        self.layer.module.train(cell.mode != "inference")
        self.work = rows_for(self.layer, cell.batch)
        self.full = Layer(copy.deepcopy(self.layer.module).float(), self.layer.wiring, self.layer.slots)
        self.full_work = Work(self.work.x.float(), self.work.d_out.float())

    def call(self, network: nn.Module, forward: Callable[[Tensor], Tensor] | None = None, full: bool = False) -> Call:
        """Return one inference or training step of a network in the case's dtype, or in float32."""
        if forward is None:
            # Not its __call__: what expands x is the caller's code, and no module of its own.
            forward = network.forward if isinstance(network, Called) else network
        return MODES[self.cell.mode](forward, list(network.parameters()), self.full_work if full else self.work)

    def network(self, model: str, full: bool = False) -> nn.Module:
        """Return the network as a user writes it: "reference" or "restructured".

        Raises: Absent where there is no restructured form.
        """
        layer = self.full if full else self.layer
        return network_of(layer, model).train(self.cell.mode != "inference")

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the result of the layer as it is, computed in a dtype: its output, or d_x of a
        training step.
        """
        network = Called(copy.deepcopy(self.full.module).to(dtype), self.full.slots)
        work = Work(self.full_work.x.to(dtype), self.full_work.d_out.to(dtype))
        return MODES[self.cell.mode](network, list(network.parameters()), work)().detach().float()

    def fused(self) -> nn.Module:
        """Return a fused copy of the layer.

        Raises: Absent, with the backend's reason, if it declines.
        """
        module = copy.deepcopy(self.layer.module)
        try:
            report = fusedmoe.fuse(module, backend=self.session.backend)
        except RuntimeError as error:
            raise Absent(str(error)) from None
        if not report:
            raise Absent("; ".join(entry.reason for entry in report.declined) or "no layer was recognised")
        return Called(module, self.layer.slots)


def fused(setting: Setting, model: str) -> Arm:
    network = setting.fused()
    return Local(setting.call(network))


def frozen(setting: Setting, model: str) -> Arm:
    network = setting.fused()
    if not hasattr(fusedmoe, "freeze"):
        raise Absent(f"fusedmoe {fusedmoe.__version__} has no freeze yet")
    report = fusedmoe.freeze(network)
    if not report:
        raise Absent("; ".join(entry.reason for entry in report.declined))
    return Local(setting.call(network))


def plain(setting: Setting, model: str) -> Arm:
    return Local(setting.call(setting.network(model)))


def medium(setting: Setting, model: str) -> Arm:
    return Local(under_medium(setting.call(setting.network(model, full=True), full=True)))


def compiled(**options: object) -> Callable[[Setting, str], Arm]:
    """Return the maker of an arm that torch.compile makes with these options of Inductor."""

    def make(setting: Setting, model: str) -> Arm:
        network = setting.network(model)
        # The number of threads stands in the key of Inductor's cache on disk only as an option.
        forward = torch.compile(network, dynamic=False, options={**options, "cpp.threads": setting.cell.threads})
        arm = Local(setting.call(network, forward))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                arm.result()
        # Whatever a compiler raises is why its arm is absent.
        except Exception as error:
            raise Absent(first_line(error)) from None
        return arm

    return make


def runtime(name: str) -> Callable[[Setting, str], Arm]:
    """Return the maker of an arm that another runtime runs, in a process of its own."""

    def make(setting: Setting, model: str) -> Arm:
        cell, session = setting.cell, setting.session
        if not session.runtimes:
            raise Absent("left out on demand")
        session.workers.require(name)
        # ONNX Runtime takes the dtype from the file; OpenVINO lowers a float32 network by itself.
        dtype = setting.dtype if name == "onnxruntime" else torch.float32
        path = "" if name == "zentorch" else session.onnx(setting, model, dtype)
        work = setting.full_work
        job = Job(
            name, model, cell.sizes, cell.mode, cell.dtype, cell.threads, work.x.numpy(), work.d_out.numpy(), path
        )
        return session.workers.remote(job)

    return make


class Kind(NamedTuple):
    """An arm: its name, whose network it runs ("fused", "reference" or "restructured"), in which
    modes, how it is made, and what it costs.

    `precision`: "" for the case's dtype. `costs`: "compile" for what must be compiled for seconds
    first.
    """

    name: str
    model: str
    modes: tuple[str, ...]
    make: Callable[[Setting, str], Arm]
    precision: str = ""
    costs: str = ""


MEDIUM = "medium"
KINDS = (
    Kind("fused", "fused", BOTH, fused),
    Kind("fused, frozen", "fused", INFERENCE, frozen),
    Kind("eager", "reference", BOTH, plain),
    Kind("eager, medium", "reference", BOTH, medium, MEDIUM),
    Kind("torch.compile", "reference", BOTH, compiled(), costs="compile"),
    Kind("torch.compile, freezing", "reference", INFERENCE, compiled(freezing=True), costs="compile"),
    Kind("torch.compile, batch_linear", "reference", BOTH, compiled(**BATCH_LINEAR), costs="compile"),
    Kind("zentorch", "reference", BOTH, runtime("zentorch"), costs="compile"),
    Kind("ONNX Runtime", "reference", INFERENCE, runtime("onnxruntime")),
    Kind("OpenVINO", "reference", INFERENCE, runtime("openvino")),
    Kind("restructured", "restructured", BOTH, plain),
    Kind("restructured, medium", "restructured", BOTH, medium, MEDIUM),
    Kind("restructured, torch.compile", "restructured", BOTH, compiled(), costs="compile"),
    Kind("restructured, zentorch", "restructured", BOTH, runtime("zentorch"), costs="compile"),
    Kind("restructured, ONNX Runtime", "restructured", INFERENCE, runtime("onnxruntime")),
    Kind("restructured, OpenVINO", "restructured", INFERENCE, runtime("openvino")),
)


@cache
def precision_of_medium() -> str:
    """What a float32 product under "medium" computes in on this machine."""
    return medium_computes_in()


def kinds_of(cell: Cell) -> list[tuple[Kind, str]]:
    """Return (arm, the precision it computes in) for the arms that belong to a case.

    A bfloat16 case takes "medium" on float32 numbers for a rival where that computes in bfloat16.
    """
    found = []
    for kind in KINDS:
        precision = precision_of_medium() if kind.precision == MEDIUM else cell.dtype
        if cell.mode in kind.modes and (cell.dtype == "float32" or precision == cell.dtype):
            found.append((kind, precision))
    return found
