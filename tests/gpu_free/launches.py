"""What the network's launches compile: stand-ins for the jitted kernels that
`kernels/triton/step.py` launches, and Triton's own specialization.

Must run where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from triton._C.libtriton import native_specialize_impl
from triton.compiler import make_backend

from fusedmoe.kernels import device, network
from fusedmoe.kernels.triton import step
from fusedmoe.table import Table

from .compiled import target_of

KERNELS = (
    *("forward_kernel", "backward_rows_kernel", "gradients_kernel", "add_chunks"),
    *("rowwise_forward", "rowwise_backward"),
)


class Variant(NamedTuple):
    """A kernel as one launch compiles it, with the types of `compile_for`. Equal variants share a
    compiled kernel."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int


def arguments_of(
    kernel, values: Sequence[object], named: dict[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    """What a launch passes, and its constants, both in the kernel's order; its options are those of
    `compile_for`.

    Raises: TypeError where the launch does not give each argument.
    """
    named = {name: value for name, value in named.items() if name not in step.OPTIONS and name not in step.REGISTERS}
    given = {**dict(zip(kernel.arg_names, values, strict=False)), **named}
    if given.keys() != set(kernel.arg_names):
        raise TypeError(
            f"{kernel.__name__}: expected the arguments {', '.join(kernel.arg_names)}, got {', '.join(given)}"
        )
    fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    passed = {name: given[name] for name in kernel.arg_names if name not in fixed}
    return passed, {name: given[name] for name in kernel.arg_names if name in fixed}


@contextmanager
def standing_in(stand_in: Callable[[object], object]) -> Iterator[dict[str, object]]:
    """Let `step` launch stand_in(kernel) in place of each kernel; yields these by name."""
    jitted = {name: getattr(step, name) for name in KERNELS}
    standing = {name: stand_in(kernel) for name, kernel in jitted.items()}
    try:
        for name, kernel in standing.items():
            setattr(step, name, kernel)
        yield standing
    finally:
        for name, kernel in jitted.items():
            setattr(step, name, kernel)


class _Recorder:
    """Notes which variant a launch would compile, and runs nothing."""

    def __init__(self, arch: str, found: dict[Variant, None], kernel):
        self.backend, self.found, self.kernel = type(make_backend(target_of(arch))), found, kernel

    def __getitem__(self, grid: tuple[int, ...]):
        return self.launch

    def launch(self, *values: object, num_warps: int, **named: object) -> None:
        passed, constants = arguments_of(self.kernel, values, named)
        parameters = {parameter.name: parameter for parameter in self.kernel.params}
        signature = {}
        for name, value in passed.items():
            one = parameters[name]
            kind, hints = native_specialize_impl(
                self.backend, value, one.is_const, not one.do_not_specialize, not one.do_not_specialize_on_alignment
            )
            if kind == "constexpr":
                constants[name] = value
            else:
                signature[name] = f"{kind}:{hints}" if hints else kind
        self.found[Variant(self.kernel.__name__, tuple(signature.items()), tuple(constants.items()), num_warps)] = None


def variants(table: Table, dtype: torch.dtype, rows: int, training: bool, arch: str = "sm_90") -> list[Variant]:
    """Return what a call compiles: the forward, and in training the backward. Tensors have no
    memory, so any number of rows is quick."""
    found: dict[Variant, None] = {}
    params = [torch.empty(p.shape, dtype=dtype, device="meta") for p in table.parameters]
    x = torch.empty(rows, table.inputs[0].slots, table.inputs[0].width, dtype=dtype, device="meta")
    with patch.object(device, "architecture", lambda _: arch), standing_in(partial(_Recorder, arch, found)):
        # Only what trains drops anything.
        seed = torch.empty(1, dtype=torch.int64, device="meta") if training else None
        out, _, saved = network.forward(x, params, table, False, training, backend="triton", seed=seed)
        if training:
            network.backward(torch.empty_like(out), None, x, params, saved, table, backend="triton")
    return list(found)


def kernel_of(variant: Variant):
    """The jitted kernel of a variant."""
    return next(kernel for name in KERNELS if (kernel := getattr(step, name)).__name__ == variant.kernel)
