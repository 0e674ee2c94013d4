"""Guards: what must stay as it was inside a module for its table to hold.

A fused module computes from its table, not from the forwards of its submodules. So anything done to
a submodule that its forward would have obeyed (a hook, another submodule in its place, a
parametrization, another slope) must stop the call. Each kind of such a change has a class here.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fusedmoe.backends import EXTENSION
from fusedmoe.nn.reads import names_read, value_of

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
PLAIN = (bool, int, float, str, type(None))


class Guard(Protocol):
    """One kind of change. `module` is the guarded one: a guard does not keep it alive."""

    def changed(self, module: nn.Module) -> str | None:
        """Return the first change of this kind in words, with its place; None if there is none."""

    def differs(self, module: nn.Module) -> bool:
        """Whether `changed` has to be asked, at a price that every call can pay."""

    def differs_traced(self, module: nn.Module) -> bool:
        """The same as torch.compile can trace it; what it cannot is not looked for."""


class Guards:
    """The guards of a module, made of what is in it at this moment."""

    def __init__(self, module: nn.Module):
        tree = list(module.named_modules())
        self.inner = [inner for _, inner in tree[1:]]
        read = [Attribute(path, owner if path else None, name) for path, owner in tree for name in names_read(owner)]
        values = [(attribute, attribute.value(module)) for attribute in read]
        plain = [attribute for attribute, value in values if _is_plain(value)]
        tensors = [attribute for attribute, value in values if isinstance(value, Tensor)]
        rest = [attribute for attribute, value in values if not _is_plain(value)]
        objects = [attribute for attribute in rest if attribute.on_instance(module)]
        others = [attribute for attribute in rest if not attribute.on_instance(module)]
        methods = [attribute for attribute in others if attribute.name not in attribute.owner_in(module)._buffers]
        self.settings = Settings(plain, module)
        self.objects = Objects([attribute for attribute in objects if attribute not in tensors], module)
        self.tensors = Tensors(tensors, module)
        optional = (self.settings, self.objects, Methods(methods), self.tensors)
        used = (guard for guard in optional if guard.attributes)
        self.all: list[Guard] = [Interceptions(self.inner), Submodules(tree), *used]
        self._differs = tuple(guard.differs for guard in self.all)

    def changed(self, module: nn.Module) -> str | None:
        """Return the first change in words, with its place; None if nothing was changed."""
        for guard in self.all:
            change = guard.changed(module)
            if change:
                return change
        return None

    def differ(self, module: nn.Module) -> bool:
        """Whether `changed` has to be asked: this runs at every call."""
        if torch.compiler.is_compiling():
            return any(guard.differs_traced(module) for guard in self.all)
        for differs in self._differs:  # noqa: SIM110  # faster than any() of a generator
            if differs(module):
                return True
        return False

    def attributes(self) -> dict[str, object]:
        """Return what the forward reads of the module's own attributes."""
        return self.settings.own() | self.objects.own() | self.tensors.own()


def interceptions(module: nn.Module) -> Iterator[str]:
    """Yield what stands inside `module` between its forward and its parameters.

    Hooks on the module itself stay outside.
    """
    for path, inner in module.named_modules():
        if parametrize.is_parametrized(inner):
            yield f"{_join(path, next(iter(inner.parametrizations)))}: is parametrized"
        if inner is module:
            continue
        for kind, name in HOOKS.items():
            for hook in getattr(inner, kind).values():
                yield f"{path}: has a {name} ({getattr(hook, '__qualname__', type(hook).__name__)})"
        if "forward" in inner.__dict__:
            yield f"{path}: has a forward set on the instance ({type(inner.__dict__['forward']).__name__})"


class Interceptions:
    """Hooks on submodules, forwards set on them, and parametrizations.

    A parametrization is noticed at every call by the submodule it adds.
    """

    def __init__(self, inner: Sequence[nn.Module]):
        self.inner = inner
        self.hooks = tuple(getattr(module, kind) for module in inner for kind in HOOKS)
        self._look_up()

    def _look_up(self) -> None:
        self._instances = tuple(module.__dict__ for module in self.inner)

    def changed(self, module: nn.Module) -> str | None:
        return next(interceptions(module), None)

    def differs(self, module: nn.Module) -> bool:
        return any_filled(self.hooks) or any_contains(self._instances, "forward")

    def differs_traced(self, module: nn.Module) -> bool:
        return _any_filled(self.hooks) or _any_contains(self._instances, "forward")

    def __getstate__(self) -> dict:
        # A copied module has another __dict__; every other dict is carried over as the module's.
        return {name: value for name, value in self.__dict__.items() if name != "_instances"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._look_up()


class Contents:
    """Dicts of live modules, which must hold the objects that they held."""

    def __init__(self, dicts: Iterable[dict]):
        self.dicts = tuple(dicts)
        self.bound = tuple(map(dict, self.dicts))

    def differs(self, module: nn.Module | None = None) -> bool:
        return any_differ(self.dicts, self.bound)

    def differs_traced(self, module: nn.Module) -> bool:
        return _any_differ(self.dicts, self.bound)


class Submodules(Contents):
    """The submodules of every module that has some."""

    def __init__(self, tree: Sequence[tuple[str, nn.Module]]):
        parents = [(path, module._modules) for path, module in tree if module._modules]
        self.paths = [path for path, _ in parents]
        super().__init__(children for _, children in parents)

    def changed(self, module: nn.Module) -> str | None:
        for path, children, bound in zip(self.paths, self.dicts, self.bound, strict=True):
            if children != bound:
                found = ", ".join(children) or "none"
                return (
                    f"{path or 'its own submodules'}: expected the submodules it was fused with, got others ({found})"
                )
        return None


class Attribute(NamedTuple):
    """An attribute that the forward of the module `owner` at `path` reads.

    An owner None is the guarded module itself, which a guard does not keep alive.
    """

    path: str
    owner: nn.Module | None
    name: str

    @property
    def place(self) -> str:
        return _join(self.path, self.name)

    def owner_in(self, module: nn.Module) -> nn.Module:
        return module if self.owner is None else self.owner

    def value(self, module: nn.Module) -> object:
        return value_of(self.owner_in(module), self.name)

    def on_instance(self, module: nn.Module) -> bool:
        return self.name in self.owner_in(module).__dict__


class Settings:
    """Numbers, texts and containers of them, which must have equal values."""

    def __init__(self, attributes: Sequence[Attribute], module: nn.Module):
        self.attributes = attributes
        # Lists may be edited in place: keep what they held.
        self.bound = [copy.deepcopy(attribute.value(module)) for attribute in attributes]

    def changed(self, module: nn.Module) -> str | None:
        for attribute, bound in zip(self.attributes, self.bound, strict=True):
            value = attribute.value(module)
            if value != bound:
                return f"{attribute.place}: expected {bound!r}, as when it was fused, got {value!r}"
        return None

    def differs(self, module: nn.Module) -> bool:
        values = [getattr(module if owner is None else owner, name, None) for _, owner, name in self.attributes]
        return values != self.bound

    differs_traced = differs

    def own(self) -> dict[str, object]:
        return _of_module(self.attributes, self.bound)


class Objects:
    """Other objects on instances, functions say, which must be the same ones."""

    def __init__(self, attributes: Sequence[Attribute], module: nn.Module):
        self.attributes = attributes
        self.bound = [attribute.value(module) for attribute in attributes]

    def changed(self, module: nn.Module) -> str | None:
        for attribute, bound in zip(self.attributes, self.bound, strict=True):
            value = attribute.value(module)
            if value is not bound:
                expected, got = type(bound).__name__, type(value).__name__
                return f"{attribute.place}: expected the {expected} it was fused with, got {got}"
        return None

    def differs(self, module: nn.Module) -> bool:
        return any(map(operator.is_not, [attribute.value(module) for attribute in self.attributes], self.bound))

    def differs_traced(self, module: nn.Module) -> bool:
        return False

    def own(self) -> dict[str, object]:
        return _of_module(self.attributes, self.bound)


class Methods:
    """What stands in a class, which nothing on the instance must hide."""

    def __init__(self, attributes: Sequence[Attribute]):
        self.attributes = attributes

    def changed(self, module: nn.Module) -> str | None:
        for attribute in self.attributes:
            if attribute.on_instance(module):
                owner = type(attribute.owner_in(module)).__name__
                return f"{attribute.place}: expected that of the class {owner}, got one set on the instance"
        return None

    def differs(self, module: nn.Module) -> bool:
        for _, owner, name in self.attributes:  # noqa: SIM110  # faster, too
            if name in (module if owner is None else owner).__dict__:
                return True
        return False

    differs_traced = differs


class Tensors:
    """Tensors that are no parameters, which must hold equal values.

    A copy, `load_state_dict` or `to` replaces them or writes to them. Values are compared where the
    object or its version is another than at the last look.
    """

    def __init__(self, attributes: Sequence[Attribute], module: nn.Module):
        self.attributes = attributes
        # Buffers, and what stands in a class, come with the module's tables and its class.
        self.on_module = {attribute.name for attribute in attributes if attribute.name in module.__dict__}
        self.seen: list[Any] = [attribute.value(module) for attribute in attributes]
        self.versions = [_version(value) for value in self.seen]
        self.bound = [value.detach().clone() for value in self.seen]

    def changed(self, module: nn.Module) -> str | None:
        for attribute, bound in zip(self.attributes, self.bound, strict=True):
            if not _holds(attribute.value(module), bound):
                return f"{attribute.place}: expected the values of the tensor it was fused with, got others"
        return None

    def differs(self, module: nn.Module) -> bool:
        values = [attribute.value(module) for attribute in self.attributes]
        versions = [_version(value) for value in values]
        if versions == self.versions and not any(map(operator.is_not, values, self.seen)):
            return False
        if self.changed(module):
            return True
        self.seen, self.versions = values, versions
        return False

    def differs_traced(self, module: nn.Module) -> bool:
        return False

    def own(self) -> dict[str, object]:
        return {name: value for name, value in _of_module(self.attributes, self.seen).items() if name in self.on_module}


def _of_module(attributes: Sequence[Attribute], values: Sequence) -> dict[str, object]:
    """Return the values of those attributes that are the guarded module's own."""
    pairs = zip(attributes, values, strict=True)
    return {attribute.name: value for attribute, value in pairs if attribute.owner is None}


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _holds(value: object, bound: Tensor) -> bool:
    """Whether `value` is `bound`, rounded to the dtype that `value` has now."""
    return isinstance(value, Tensor) and torch.equal(bound.to(value), value)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# In Python for torch.compile, which cannot trace csrc/guards.cpp, and without the extension.


def _any_filled(dicts: Sequence[dict]) -> bool:
    return any(dicts)


def _any_contains(dicts: Sequence[dict], key: str) -> bool:
    return any(key in held for held in dicts)


def _any_differ(dicts: Sequence[dict], expected: Sequence[dict]) -> bool:
    return dicts != expected


any_filled, any_contains, any_differ = _any_filled, _any_contains, _any_differ
if EXTENSION is not None:
    any_filled, any_contains, any_differ = EXTENSION.any_filled, EXTENSION.any_contains, EXTENSION.any_differ
