"""Which attributes the forward of a module's class reads: the names in its bytecode."""

from __future__ import annotations

from types import CodeType

from torch import nn

# Attributes that no table depends on: modes, and the choice of backend and memory.
FREE = {"training", "inplace", "backend", "recompute"}
# `interceptions` tells of a forward set on a submodule; that of the module itself is set by `fuse`.
SET_BY_US = {"forward", "_binding"}


def names_read(owner: nn.Module) -> list[str]:
    """Return the names of attributes, buffers and class attributes that the forward reads."""
    held = owner.__dict__.keys() | owner._buffers.keys() | {name for base in _bases(type(owner)) for name in vars(base)}
    return sorted(_names_in_forward(type(owner)) & held - FREE - SET_BY_US)


def value_of(owner: nn.Module, name: str) -> object:
    """Return the attribute, buffer or class attribute of this name, or None."""
    if name in owner.__dict__:
        return owner.__dict__[name]
    if name in owner._buffers:
        return owner._buffers[name]
    return next((vars(base)[name] for base in _bases(type(owner)) if name in vars(base)), None)


def _bases(cls: type) -> tuple[type, ...]:
    """Return a class and its bases, without `nn.Module`'s own."""
    return cls.__mro__[: cls.__mro__.index(nn.Module)]


def _names_in_forward(cls: type) -> set[str]:
    """Return the names in the forwards of a class and its bases, and in the methods they name."""
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
