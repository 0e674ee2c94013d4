"""Bind a module's own parameters to a table: read them at every call, and notice when the module's inside has changed since.

A fused module computes from its table, not from the forwards of its submodules. So anything done to a submodule that its
forward would have obeyed (a hook, another submodule in its place, a parametrization, another slope) must stop the call.
"""

from __future__ import annotations

import copy
import operator
import threading
import warnings
import weakref
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fusedmoe.backends import EXTENSION as WATCH
from fusedmoe.nn.frozen import Frozen, require_serving
from fusedmoe.nn.parameters import Parameters
from fusedmoe.nn.wiring import Unfusable
from fusedmoe.op import fusion_network
from fusedmoe.outputs import per_task
from fusedmoe.table import Table

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
# What a forward may read without the table having to change: modes, and the choice of backend and memory.
FREE = {"training", "inplace", "backend", "recompute"}
# What PyTorch itself keeps in every module.
OWN = vars(nn.Module()).keys()
PLAIN = (bool, int, float, str, type(None))
CURE = "undo it, or build the module anew and load its state_dict"
# Held where a thread sets `frozen` to what depends on what it was.
_FREEZING = threading.Lock()


class _Setting(NamedTuple):
    """An attribute that the forward of `owner` reads; `path` is where `owner` stands. None is the bound module itself."""

    path: str
    owner: nn.Module | None
    name: str


class Binding:
    """The parameters of `module`, and the structure for which its table holds.

    Args:
        module: the layer, for which `require_plain` did not raise; nothing is written to it.
        table: what it computes.
        parameters: where its parameters are.
        cure: what a message about a later change inside the module tells the user to do.

    It holds references to what is in the module, never copies of tensors: parameters replaced or changed in place are seen at the
    next call. To the module itself it holds a weak one, so that it may be stored there and `del module` frees both at once;
    `deepcopy` and `pickle` carry both, bound to each other. In code that torch.compile made, hooks added afterwards are not
    looked for: that is so for any compiled module.
    """

    def __init__(self, module: nn.Module, table: Table, parameters: Parameters, cure: str = CURE):
        self._module = weakref.ref(module)
        self.cure = cure
        self.table = table
        self.parameters = parameters
        self._class = type(module)
        self._tables = {name: value for name, value in vars(module).items() if name in OWN}
        places = list(module.named_modules())
        self._inner = [inner for _, inner in places[1:]]
        self._hooks = [getattr(inner, kind) for inner in self._inner for kind in HOOKS]
        parents = [(path, parent) for path, parent in places if parent._modules]
        self._paths = [path for path, _ in parents]
        self._children = [parent._modules for _, parent in parents]
        self._bound_children = [dict(children) for children in self._children]
        read = [_Setting(path, owner if path else None, name) for path, owner in places for name in _attributes(owner)]
        self._settings = [setting for setting in read if _is_plain(self._value(setting))]
        # Lists may be edited in place: keep what they held.
        self._bound_settings = [copy.deepcopy(self._value(setting)) for setting in self._settings]
        rest = [setting for setting in read if setting not in self._settings]
        self._objects = [setting for setting in rest if setting.name in self._owner(setting).__dict__]
        self._bound_objects = [self._value(setting) for setting in self._objects]
        watched = [setting for setting in rest if isinstance(self._value(setting), Tensor)]
        # Never parameters: those are read anew at every call.
        self._tensors = [(setting, self._value(setting).detach().clone()) for setting in watched]
        self._seen = [_stamp(self._value(setting)) for setting, _ in self._tensors]
        self._methods = [setting for setting in rest if setting not in self._objects and setting.name not in self._owner(setting)._buffers]
        self._look_up()
        # Set by `freeze`; copies and pickles leave it behind, and so are not frozen.
        self.frozen: Frozen | None = None

    @property
    def module(self) -> nn.Module:
        """The module; a stand-in with the same inside once it is freed while something still holds its forward."""
        module = self._module()
        return self._stand_in() if module is None else module

    def binds(self, module: nn.Module) -> bool:
        """Whether `module` is the one: not a shallow copy of it, or another that was given its forward."""
        return self._module() is module

    def contains(self, module: nn.Module) -> bool:
        """Whether `module` is one inside the bound one, whose forward is not run."""
        return any(inner is module for inner in self._inner)

    def tensors(self) -> list[Tensor]:
        """Return the parameters as they are at this moment, in the order of `table.parameters`.

        Raises: RuntimeError if one of them is no longer a parameter of its submodule.
        """
        try:
            return self.parameters.tensors()
        except KeyError:
            raise RuntimeError(self._changed(self.change())) from None

    def check(self) -> None:
        """Raise RuntimeError, naming the place, unless the module's inside is as it was when it was bound."""
        change = self.change() if self._differs() else None
        if change:
            raise RuntimeError(self._changed(change))
        if self._tensors and not torch.compiler.is_compiling():
            self._check_tensors()

    def change(self) -> str | None:
        """Return what was changed inside the module since it was bound, in words; None if nothing was."""
        reason = next(obstacles(self.module), None)
        if reason:
            return reason
        for path, children, bound in zip(self._paths, self._children, self._bound_children, strict=True):
            if children != bound:
                return f"{path or 'its own submodules'}: expected the submodules it was fused with, got others ({', '.join(children) or 'none'})"
        for setting, bound in zip(self._settings, self._bound_settings, strict=True):
            if self._value(setting) != bound:
                return f"{_join(setting.path, setting.name)}: expected {bound!r}, as when it was fused, got {self._value(setting)!r}"
        for setting, bound in zip(self._objects, self._bound_objects, strict=True):
            if self._value(setting) is not bound and not isinstance(bound, Tensor):
                return f"{_join(setting.path, setting.name)}: expected the {type(bound).__name__} it was fused with, got {type(self._value(setting)).__name__}"
        for setting in self._methods:
            if setting.name in self._owner(setting).__dict__:
                return f"{_join(setting.path, setting.name)}: expected that of the class {type(self._owner(setting)).__name__}, got one set on the instance"
        for setting, bound in self._tensors:
            if not _holds(self._value(setting), bound):
                return f"{_join(setting.path, setting.name)}: expected the values of the tensor it was fused with, got others"
        return self.parameters.changed(self.module)

    def run(self, x: Tensor, backend: str = "auto", return_mixing_weights: bool = False, recompute: bool = False, tasks_apart: bool = False):
        """Return `fusion_network` over the module's parameters.

        Args:
            x: [B, D] or [B, S, D].
            backend: a name, or "auto".
            return_mixing_weights: also return the mixing weights of every level.
            recompute, tasks_apart: as `fusion_network` has them.

        Raises: RuntimeError if the module's inside was changed since it was bound; as `require_serving` if it is frozen.

        A frozen module runs from its packed parameters, and is thawed, with a warning, where they are no longer the module's. Code
        that torch.compile made reads the module's parameters themselves, under the same conditions; so do calls for the mixing
        weights, under none.
        """
        self.check()
        # Once: another thread may freeze or thaw the module meanwhile.
        frozen = self.frozen
        if frozen is not None and not return_mixing_weights:
            require_serving(self.module, x, self.tensors)
            out = self._run_frozen(frozen, x, backend)
            if out is not None:
                return per_task(out) if tasks_apart else out
        try:
            return fusion_network(x, self.tensors(), self.table, backend, return_mixing_weights, recompute, tasks_apart)
        except TypeError:
            # A parameter set to None is not looked for at every call: the operator refuses it.
            change = self.change()
            if change:
                raise RuntimeError(self._changed(change)) from None
            raise

    def freeze(self, backend: str) -> None:
        """Pack the module's parameters for serving with `backend`, or anew. Raises: RuntimeError as `fusedmoe.packed.pack`."""
        frozen = Frozen(self.parameters.places, self.table, backend)
        with _FREEZING:
            self.frozen = frozen

    def _run_frozen(self, frozen: Frozen, x: Tensor, backend: str) -> Tensor | None:
        """Return the output from packed parameters, or None where they cannot give it; thaw the module if they are outdated."""
        # Asked here: after a graph break torch.compile may begin with this very function.
        if torch.compiler.is_compiling():
            return None
        if backend == frozen.backend and frozen.holds():
            return frozen.run(x)
        with _FREEZING:
            # Of threads that find it outdated one thaws it and warns; what another has packed anew stays.
            thawed = self.frozen is frozen
            if thawed:
                self.frozen = None
        if change := self.change():
            raise RuntimeError(self._changed(change))
        if thawed:
            what = frozen.changed(self.parameters.keys, self.tensors()) if backend == frozen.backend else "its backend"
            warnings.warn(f"{type(self.module).__name__} is no longer frozen: {what} was changed; fusedmoe.freeze(model) packs it again", stacklevel=4)
        return None

    def _differs(self) -> bool:
        """The checks of `change` at the price of a few microseconds: this runs at every call."""
        if WATCH is not None and not torch.compiler.is_compiling():
            hooks, inner, children, bound = self._watched
            if WATCH.any_filled(hooks) or WATCH.any_contains(inner, "forward") or WATCH.any_differ(children, bound):
                return True
        elif self._differs_in_python():
            return True
        module = self.module
        if [getattr(module if owner is None else owner, name, None) for _, owner, name in self._settings] != self._bound_settings:
            return True
        if self._objects and not torch.compiler.is_compiling() and any(map(operator.is_not, map(self._value, self._objects), self._bound_objects)):
            return True
        return any(name in (module if owner is None else owner).__dict__ for _, owner, name in self._methods)

    def _differs_in_python(self) -> bool:
        """What `csrc/watch.cpp` tells of hooks, submodules and forwards, for torch.compile, which cannot trace that, and without the extension."""
        return any(self._hooks) or self._children != self._bound_children or any("forward" in own for own in self._own)

    def _check_tensors(self) -> None:
        """Compare values where a tensor was replaced or written to: by a copy, `load_state_dict` or `to`, which may leave them alone."""
        seen = [_stamp(self._value(setting)) for setting, _ in self._tensors]
        if seen != self._seen:
            change = self.change()
            if change:
                raise RuntimeError(self._changed(change))
            self._seen = seen
            self._bound_objects = [self._value(setting) for setting in self._objects]

    def _owner(self, setting: _Setting) -> nn.Module:
        return self.module if setting.owner is None else setting.owner

    def _value(self, setting: _Setting):
        return _value(self._owner(setting), setting.name)

    def _stand_in(self) -> nn.Module:
        """Put in the place of a module that is gone one with its parameters, its submodules and what its forward reads."""
        module = self._class.__new__(self._class)
        bound = [*zip(self._settings, self._bound_settings, strict=True), *zip(self._objects, self._bound_objects, strict=True)]
        read = {setting.name: value for setting, value in bound if setting.owner is None}
        vars(module).update(self._tables | read, training=any(inner.training for inner in self._inner))
        self._kept = module
        self._module = weakref.ref(module)
        return module

    def _look_up(self) -> None:
        """Find where attributes that hide those of a class would stand, and lay out what is looked at in every call."""
        self._own = tuple(owner.__dict__ for owner in self._inner)
        self._watched = (tuple(self._hooks), self._own, tuple(self._children), tuple(self._bound_children))

    def __getstate__(self) -> dict:
        # A copied or loaded module has a __dict__ of its own; every other dict here is carried over as the module's.
        left = ("_own", "_watched", "frozen", "_module", "_kept")
        return {"module": self.module, **{name: value for name, value in self.__dict__.items() if name not in left}}

    def __setstate__(self, state: dict) -> None:
        self._module = weakref.ref(state.pop("module"))
        self.__dict__.update(state)
        self.frozen = None
        self._look_up()

    def _changed(self, change: str) -> str:
        return f"{type(self.module).__name__} was changed inside after it was fused. {change}. Cure: {self.cure}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def require_plain(module: nn.Module) -> None:
    """Raise Unfusable, naming the place, if something inside `module` stands between its forward and its parameters."""
    for obstacle in obstacles(module):
        raise Unfusable(obstacle)


def obstacles(module: nn.Module) -> Iterator[str]:
    """Yield what stands inside `module` between its forward and its parameters; hooks on the module itself stay outside."""
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


def _value(owner: nn.Module, name: str):
    """Return the attribute or buffer of the owner, or else what stands in its class; None if there is none."""
    if name in owner.__dict__:
        return owner.__dict__[name]
    return owner._buffers[name] if name in owner._buffers else _on_class(owner, name)


def _on_class(owner: nn.Module, name: str):
    return next((vars(base)[name] for base in _bases(type(owner)) if name in vars(base)), None)


def _attributes(owner: nn.Module) -> list[str]:
    """Return the names that the forward of the owner's class reads off it: attributes, buffers, and what stands in the class."""
    held = owner.__dict__.keys() | owner._buffers.keys() | {name for base in _bases(type(owner)) for name in vars(base)}
    # A forward set on an instance has a message of its own; that of the module itself is what `fuse` sets. A binding is what this is.
    return sorted(_reads(type(owner)) & held - FREE - {"forward", "_binding"})


def _bases(cls: type) -> tuple[type, ...]:
    """Return a class and its bases, without `nn.Module`'s own."""
    return cls.__mro__[: cls.__mro__.index(nn.Module)]


def _stamp(value) -> tuple[int, int]:
    """Return what changes when a tensor is replaced or written to."""
    return id(value), value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _holds(value, bound: Tensor) -> bool:
    """Whether `value` is `bound`, rounded to the dtype that `value` has now."""
    return isinstance(value, Tensor) and torch.equal(bound.to(value), value)


def _is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, PLAIN)


def _reads(cls: type) -> set[str]:
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
            new = _names(code) - found if code else set()
            found |= new
            waiting += new
    return found


def _names(code: CodeType) -> set[str]:
    """Return the names in a function and in the comprehensions inside it."""
    return set(code.co_names).union(*(_names(const) for const in code.co_consts if isinstance(const, CodeType)))
