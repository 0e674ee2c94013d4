"""Whether a tensor's numbers have memory.

Shape and dtype do not tell, and a kernel that reads a tensor without memory ends the process.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require_memory(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless all numbers of an ordinary tensor lie inside its storage.

    `check_memory` of csrc/checks.h does the same.

    They do not where the storage was freed, as FSDP frees a gathered parameter. `name`: what the
    message calls it.
    """
    # What is traced or batched has no storage of its own.
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or not tensor.numel():
        return
    functorch = torch._C._functorch
    if (
        functorch.peek_interpreter_stack() is not None
        or functorch.is_legacy_batchedtensor(tensor)
        or tensor._is_zerotensor()
    ):
        return
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needed, held = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if held < needed:
        raise ValueError(f"{name}: expected a storage of {needed} bytes or more, got one of {held}; was it freed?")
