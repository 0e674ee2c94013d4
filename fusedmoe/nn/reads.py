"""What the forward of a module's class reads off the module: the names in its bytecode that the module or its class has."""

from __future__ import annotations

from types import CodeType

from torch import nn

# What a forward may read without the table having to change: modes, and the choice of backend and memory.
FREE = {"training", "inplace", "backend", "recompute"}
# A forward set on an instance has a message of its own; that of the module itself is what `fuse` sets.
SET_BY_US = {"forward", "_binding"}


def names_read(owner: nn.Module) -> list[str]:
    """Return the names that the forward of the owner's class reads off it: attributes, buffers, and what stands in the class."""
    held = owner.__dict__.keys() | owner._buffers.keys() | {name for base in _bases(type(owner)) for name in vars(base)}
    return sorted(_names_in_forward(type(owner)) & held - FREE - SET_BY_US)


def value_of(owner: nn.Module, name: str) -> object:
    """Return the attribute or buffer of the owner, or else what stands in its class; None if there is none."""
    if name in owner.__dict__:
        return owner.__dict__[name]
    if name in owner._buffers:
        return owner._buffers[name]
    return next((vars(base)[name] for base in _bases(type(owner)) if name in vars(base)), None)


def _bases(cls: type) -> tuple[type, ...]:
    """Return a class and its bases, without `nn.Module`'s own."""
    return cls.__mro__[: cls.__mro__.index(nn.Module)]


def _names_in_forward(cls: type) -> set[str]:
    """Return the attribute names in the forwards of a class and its bases, and in the methods that those name."""
    bases = _bases(cls)
    found: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        for base in bases:
            attribute = vars(base).get(name)
            function = getattr(attribute, "fget", None) or getattr(attribute, "__func__", attribute)
            code = getattr(function, "__code__", None)
            unseen = _names_in(code) - found if code else set()
            found |= unseen
            waiting += unseen
    return found


def _names_in(code: CodeType) -> set[str]:
    """Return the names in a function and in the comprehensions inside it."""
    return set(code.co_names).union(*(_names_in(const) for const in code.co_consts if isinstance(const, CodeType)))
