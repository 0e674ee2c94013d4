"""What a copy of a module takes beside its table's parameters: the probe copies small ones only."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

import torch
from torch import Tensor, nn

from fusedmoe.nn.guards import HOOKS
from fusedmoe.nn.wiring import Unfusable

# A mask, positions, a few lists of names. The probe looks at every object after each call.
MOST_BYTES, MOST_OBJECTS = 1 << 24, 100_000
# What `copy.deepcopy` hands on as it is.
VALUES = (type(None), bool, int, float, complex, str, bytes, range)
SHARED = (*VALUES, type, property, FunctionType, BuiltinFunctionType, CodeType, ModuleType)


def require_small(module: nn.Module, keys: Sequence[str]) -> None:
    """Raise Unfusable, with place and bytes, if a copy takes much beside the parameters `keys`."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    seen = {id(parameters[key]) for key in keys if key in parameters} | {id(inner) for inner in module.modules()}
    sizes: dict[str, int] = {}
    count = 0
    for name, value in _attributes(module):
        for size in _sizes(value, seen):
            sizes[name] = sizes.get(name, 0) + size
            count += 1
            if sum(sizes.values()) > MOST_BYTES:
                most = max(sizes, key=lambda place: sizes[place])
                expected = f"{most}: expected at most {MOST_BYTES:,} bytes in all beside the parameters of its table"
                raise Unfusable(f"{expected}, got {sizes[most]:,} or more there, which the probe would copy")
            if count > MOST_OBJECTS:
                expected = f"{name}: expected at most {MOST_OBJECTS:,} objects beside the parameters of its table"
                raise Unfusable(f"{expected}, got more, which the probe would copy")


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield every parameter, buffer and other attribute in a tree by name; hooks are not copied."""
    for path, inner in module.named_modules():
        for key, value in inner.__dict__.items():
            if key in ("_parameters", "_buffers"):
                yield from ((f"{path}.{name}" if path else name, tensor) for name, tensor in value.items())
            elif key != "_modules" and key not in HOOKS:
                yield (f"{path}.{key}" if path else key), value


def _sizes(value, seen: set[int]) -> Iterator[int]:
    """Yield the bytes of an object and of all that it refers to; nothing for those seen before."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, SHARED) or id(item) in seen:
            continue
        seen.add(id(item))
        # Before anything is listed that is in it.
        yield _size(item)
        waiting += gc.get_referents(item)


def _size(item) -> int:
    if isinstance(item, Tensor):
        dense = item.layout == torch.strided and item.device.type != "meta"
        return (
            item.untyped_storage().nbytes()
            if dense and type(item) in (Tensor, nn.Parameter, nn.Buffer)
            else item.numel() * item.element_size()
        )
    # An array may be a view of memory that is not its own.
    held = getattr(item, "nbytes", 0) if type(item).__module__.partition(".")[0] == "numpy" else 0
    return max(held, sys.getsizeof(item, 0))
