"""Other people's runtimes, as a worker process runs them: zentorch, ONNX Runtime, OpenVINO.

Each takes the network as its users would hand it over: zentorch a module of its own, the other two
an ONNX file of the reference layer or of the restructured network, with the batch size fixed, since
both compile for it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fusedmoe.speed.calls import MODES
from fusedmoe.speed.restructured import Restructured
from fusedmoe.speed.subjects import Called, Layer, Sizes, Work, build

BATCH_NAME = "batch"
# Where an export is traced: any number of rows but 0 and 1, which would be taken for constants.
TRACED_ROWS = 8


class Absent(Exception):
    """Says why an arm cannot run here."""


class Job(NamedTuple):
    """What a worker is to run: which network in which runtime, on which rows (float32 arrays), from
    which ONNX file if it takes one.
    """

    runtime: str
    model: str
    sizes: Sizes
    mode: str
    dtype: str
    threads: int
    x: np.ndarray
    d_out: np.ndarray
    onnx: str = ""


class Program(NamedTuple):
    """A call to time, and how to read the result of one: the output, or d_x of a training step.

    `held`: memory that the runtime reads without owning it.
    """

    call: Callable[[], object]
    result: Callable[[], Tensor]
    held: object = None


def network_of(layer: Layer, model: str) -> nn.Module:
    """Return x [B, D] -> the layer as it is ("reference"), or the restructured network with copies
    of its parameters.

    Raises: Absent for a table that the restructured form does not have.
    """
    if model == "reference":
        return Called(layer.module, layer.slots)
    try:
        return Restructured(layer.table, [param.detach() for param in layer.params])
    except ValueError as error:
        raise Absent(f"no restructured form: {error}") from None


def export(network: nn.Module, width: int, path: Path) -> None:
    """Write the network as an ONNX file with a free batch size.

    Raises: Absent, with the reason, if torch cannot.
    """
    example = torch.zeros(TRACED_ROWS, width, dtype=next(network.parameters()).dtype)
    # It reports every package that it could support and does not find.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = ({0: torch.export.Dim(BATCH_NAME)},)
            torch.onnx.export(network.eval(), (example,), dynamo=True, verbose=False, dynamic_shapes=shapes).save(
                str(path)
            )
    except Exception as error:
        raise Absent(f"torch.onnx.export: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return an exception as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def onnxruntime_program(job: Job) -> Program:
    """Run an ONNX file by ONNX Runtime's own CPU kernels, output and input bound once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name(BATCH_NAME, len(job.x))
    session = onnxruntime.InferenceSession(job.onnx, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, job.x)
    binding.bind_output(session.get_outputs()[0].name)

    def result() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0])

    return Program(lambda: session.run_with_iobinding(binding), result, job.x)


def openvino_program(job: Job) -> Program:
    """Run an ONNX file by OpenVINO, in the precision asked for: its default on some processors is
    bfloat16.
    """
    import openvino

    core = openvino.Core()
    hint = {"float32": "f32", "bfloat16": "bf16"}[job.dtype]
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if hint == "bf16" and "BF16" not in able:
        raise Absent(f"it has no bfloat16 on this processor, only {', '.join(able)}")
    model = core.read_model(job.onnx)
    model.reshape(list(job.x.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(model, "CPU", settings)
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if chosen != hint:
        raise Absent(f"expected the precision {hint}, got {chosen}")
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(job.x, shared_memory=True))

    def result() -> Tensor:
        request.infer(share_outputs=True)
        return torch.from_numpy(request.get_output_tensor().data.copy())

    return Program(lambda: request.infer(share_outputs=True), result, job.x)


def zentorch_program(job: Job) -> Program:
    """Compile a network of its own by zentorch's backend of torch.compile.

    The worker's environment switches its weight cache off.
    """
    import zentorch  # noqa: F401 - its import registers the backend

    dtype = getattr(torch, job.dtype)
    network = network_of(build(job.sizes, dtype), job.model).train(job.mode != "inference").to(dtype)
    work = Work(torch.from_numpy(job.x).to(dtype), torch.from_numpy(job.d_out).to(dtype))
    call = MODES[job.mode](torch.compile(network, backend="zentorch", dynamic=False), list(network.parameters()), work)
    return Program(call, lambda: call().detach().float())


PROGRAMS = {"onnxruntime": onnxruntime_program, "openvino": openvino_program, "zentorch": zentorch_program}
# What each needs besides itself to get the network.
NEEDS = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "zentorch": ("zentorch",),
}
