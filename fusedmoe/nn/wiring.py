"""Read a layer's wiring off its structure: its table, and its parameters in the operator's order.

One function per layer class. Each reads only attributes and submodules that the public AdaTT
library's layer has too, takes widths, biases and activations from the modules as they are, and
raises `Unfusable` for anything that its table could not express. The counts come from a function of
`families.py`, so a wiring says nothing about slots, sees or selectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from fusedmoe import families
from fusedmoe.activation import IDENTITY, Activation
from fusedmoe.nn.counts import Unfusable, require_counts
from fusedmoe.table import Expert, Gate, Layer, Level, Table, Task


class Wiring(NamedTuple):
    """A table, and the module's `state_dict` keys in the order of `table.parameters`."""

    table: Table
    keys: tuple[str, ...]


class Stack(NamedTuple):
    """An MLP: its input width, its layers, and their parameters' keys in the operator's order."""

    width: int
    layers: tuple[Layer, ...]
    keys: tuple[str, ...]


ACTIVATIONS: dict[type, Callable[[nn.Module], Activation | None]] = {
    nn.Identity: lambda module: IDENTITY,
    nn.ReLU: lambda module: Activation("relu"),
    nn.Sigmoid: lambda module: Activation("sigmoid"),
    nn.Tanh: lambda module: Activation("tanh"),
    nn.SiLU: lambda module: Activation("silu"),
    nn.GELU: lambda module: Activation({"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]),
    nn.LeakyReLU: lambda module: Activation("leaky_relu", module.negative_slope),
    nn.ELU: lambda module: Activation("elu", module.alpha),
    # Another beta or threshold is another function.
    nn.Softplus: lambda module: Activation("softplus") if (module.beta, module.threshold) == (1, 20) else None,
}


def shared_bottom(module: nn.Module) -> Wiring:
    """Wire one bottom that is handed to every task.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    _check_children(module, "bottom_projection")
    return _wire(module, families.shared_bottom, [[_mlp(module.bottom_projection, "bottom_projection")]])


def single_task(module: nn.Module) -> Wiring:
    """Wire a bottom per task.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _wire(module, families.single_task, _bottoms(module))


def asymmetric_sharing(module: nn.Module) -> Wiring:
    """Wire a bottom per task, of which each task combines those it borrows.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _wire(module, families.asymmetric_sharing, _bottoms(module), _read(module, "borrows", "combine"))


def customized_sharing(module: nn.Module) -> Wiring:
    """Wire a bottom per task and a shared one.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _wire(module, families.customized_sharing, _bottoms(module))


def ml_mmoe(module: nn.Module) -> Wiring:
    """Wire levels of experts under gates on the root input; the gates may have hidden layers.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _gated(module, families.ml_mmoe, _read(module, "num_experts"), "gates")


def mmoe(module: nn.Module) -> Wiring:
    """Wire one level of experts under one gate per task.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _gated(module, families.mmoe, _read(module, "num_experts"), "gates")


def omoe(module: nn.Module) -> Wiring:
    """Wire one level of experts under one gate.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _gated(module, families.omoe, _read(module, "num_experts"), "gates")


def ple(module: nn.Module) -> Wiring:
    """Wire own and shared experts, levels of them.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _gated(module, families.ple, _read(module, "num_task_experts", "num_shared_experts"), "gate_weights")


def cgc(module: nn.Module) -> Wiring:
    """Wire own and shared experts, one level on a shared input.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _gated(module, families.cgc, _read(module, "num_task_experts", "num_shared_experts"), "gate_weights")


def adatt_sp(module: nn.Module) -> Wiring:
    """Wire AdaTT without shared experts.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    return _gated(module, families.adatt_sp, _read(module, "num_task_experts", "self_exp_res_connect"), "gate_weights", "self_exp_weights")


def adatt(module: nn.Module) -> Wiring:
    """Wire AdaTT with shared experts.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    counts, static_weights = _read(module, "num_expert_list", "self_exp_res_connect")
    return _gated(module, families.adatt, (counts[:-1], *counts[-1:], static_weights), "gate_weights", "self_exp_weights")


def cross_stitch(module: nn.Module) -> Wiring:
    """Wire an expert per task and learned mixing of them.

    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    _check_children(module, "experts", "stitchs")
    stitchs = _items(module.stitchs, "stitchs")
    for path, stitch in stitchs:
        if type(stitch) is not nn.Linear or stitch.bias is not None:
            raise Unfusable(f"{path}: expected an nn.Linear without bias, got {_name(stitch)}")
    return _wire(module, families.cross_stitch, _experts(module), statics=[f"{path}.weight" for path, _ in stitchs])


# By the `mtl_model` of a CentralTaskArch.
BACKBONES: dict[str, Callable[[nn.Module], Wiring]] = {
    "att_sp": adatt_sp,
    "att_g": adatt,
    "ple": ple,
    "cross_st": cross_stitch,
    "mmoe": ml_mmoe,
    "share_bottom": shared_bottom,
    "single_task": single_task,
    "omoe": omoe,
    "cgc": cgc,
    "asymmetric": asymmetric_sharing,
    "customized": customized_sharing,
}


def central(module: nn.Module) -> Wiring:
    """Wire a backbone `mtl_arch` under the towers `task_modules`.

    x [B, D] is passed once, the output is [B, T, 1].
    Returns: the table and the module's keys.
    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    _check_children(module, "mtl_arch", "task_modules")
    (name,) = _read(module, "mtl_model")
    if name not in BACKBONES:
        raise Unfusable(f"mtl_model: expected one of {', '.join(BACKBONES)}, got {name!r}")
    try:
        backbone = BACKBONES[name](module.mtl_arch)
    except Unfusable as error:
        raise Unfusable(f"mtl_arch: {error}") from None
    towers = _each(module.task_modules, "task_modules", _mlp)
    table = families.share_input(backbone.table)
    tasks = table.tasks or tuple(Task((u,)) for u in range(len(table.levels[-1].units)))
    if len(tasks) != len(towers):
        raise Unfusable(f"task_modules: expected one tower for each of {len(tasks)} tasks, got {len(towers)}")
    table = _table(replace, table, tasks=tuple(replace(task, tower=tower.layers) for task, tower in zip(tasks, towers, strict=True)))
    # The towers' parameters stand before the static tensors.
    last = len(backbone.keys) - len(table.statics)
    keys = [f"mtl_arch.{key}" for key in backbone.keys]
    return _checked(module, Wiring(table, (*keys[:last], *(key for tower in towers for key in tower.keys), *keys[last:])))


def _gated(module: nn.Module, family: Callable[..., Table], arguments: Sequence, gates: str, static: str = "") -> Wiring:
    """Wire a family whose submodules stand in lists.

    These are the experts `experts.{level}.{expert}`, the gates `{gates}.{level}.{unit}` and the
    static tensors `{static}.{i}`.
    """
    _check_children(module, "experts", gates, *([static] if static else []))
    found = [_each(level, path, _softmax_of) for path, level in _items(getattr(module, gates), gates)]
    tensors = [f"{static}.{name}" for name in getattr(module, static)._parameters] if static else []
    return _wire(module, family, _experts(module), arguments, found, tensors)


def _wire(
    module: nn.Module,
    family: Callable[..., Table],
    experts: Sequence[Sequence[Stack]],
    arguments: Sequence = (),
    gates: Sequence[Sequence[Stack]] = (),
    statics: Sequence[str] = (),
) -> Wiring:
    """Put the layers found into the family's table, and list the keys in the operator's order.

    Args:
        family: called with the input width, the experts' widths, the number of tasks and
            `arguments`.
        experts, gates: found per level; no gates for a family without any.
        statics: the keys of the static tensors.
    """
    widths = [[layer.width for layer in level[0].layers] for level in experts]
    (tasks,) = _read(module, "num_tasks")
    require_counts(family, tasks, arguments, len(experts[0]), max(map(len, gates), default=0))
    table = _table(family, experts[0][0].width, widths, tasks, *arguments)
    gates = gates or [()] * len(table.levels)
    wanted = [(len(level.experts), sum(unit.gate is not None for unit in level.units)) for level in table.levels]
    found = [(len(level), len(gates[i]) if i < len(gates) else 0) for i, level in enumerate(experts)]
    if found != wanted or len(gates) != len(wanted):
        raise Unfusable(f"(experts, gates) per level: expected {wanted}, got {found}")
    if len(statics) != len(table.statics):
        raise Unfusable(f"static weights: expected {len(table.statics)} tensors, got {len(statics)}")
    levels = tuple(_level(level, experts[i], gates[i]) for i, level in enumerate(table.levels))
    keys = [key for i in range(len(levels)) for stack in (*experts[i], *gates[i]) for key in stack.keys]
    return _checked(module, Wiring(_table(replace, table, levels=levels), (*keys, *statics)))


def _level(level: Level, experts: Sequence[Stack], gates: Sequence[Stack]) -> Level:
    """The level with the layers found in place of the family's."""
    units = tuple(replace(unit, gate=_gate(unit.gate, gates[u])) if unit.gate else unit for u, unit in enumerate(level.units))
    return Level(tuple(Expert(expert.slot, stack.layers) for expert, stack in zip(level.experts, experts, strict=True)), units)


def _gate(gate: Gate, found: Stack) -> Gate:
    return replace(gate, hidden=found.layers[:-1], bias=found.layers[-1].bias)


def _checked(module: nn.Module, wiring: Wiring) -> Wiring:
    """Return the wiring if the module has exactly these keys, in the shapes of the table."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for key, expected in zip(wiring.keys, wiring.table.parameters, strict=True):
        if key not in parameters:
            raise Unfusable(f"{key}: expected a parameter {list(expected.shape)}, got none")
        if tuple(parameters[key].shape) != expected.shape:
            raise Unfusable(f"{key}: expected the shape {list(expected.shape)}, got {list(parameters[key].shape)}")
    for key in [*parameters, *(key for key, _ in module.named_buffers())]:
        if key not in wiring.keys:
            raise Unfusable(f"{key}: expected no parameter or buffer besides the table's, got one")
    return wiring


def _table(function: Callable[..., Table], *arguments, **more) -> Table:
    """Call a function that returns a table; what it refuses is unfusable."""
    try:
        return function(*arguments, **more)
    except (TypeError, ValueError) as error:
        raise Unfusable(str(error)) from None


def _items(modules: nn.Module, where: str) -> list[tuple[str, nn.Module]]:
    """(path, module) of the items of an `nn.ModuleList`."""
    if not isinstance(modules, nn.ModuleList):
        raise Unfusable(f"{where}: expected an nn.ModuleList, got {_name(modules)}")
    return [(f"{where}.{name}", module) for name, module in modules._modules.items()]


def _each(modules: nn.Module, where: str, read: Callable[[nn.Module, str], Stack]) -> list[Stack]:
    """What `read` finds in each item of an `nn.ModuleList`."""
    return [read(module, path) for path, module in _items(modules, where)]


def _experts(module: nn.Module) -> list[list[Stack]]:
    """The experts `experts.{level}.{expert}`, at least one on each level."""
    result = [_each(level, path, _mlp) for path, level in _items(module.experts, "experts")]
    if not result or not all(result):
        raise Unfusable(f"experts: expected at least one expert on each level, got {[len(level) for level in result]}")
    return result


def _bottoms(module: nn.Module) -> list[list[Stack]]:
    """The experts `bottoms.{expert}` of a family of one level."""
    _check_children(module, "bottoms")
    result = _each(module.bottoms, "bottoms", _mlp)
    if not result:
        raise Unfusable("bottoms: expected at least one, got none")
    return [result]


def _softmax_of(gate: nn.Module, where: str) -> Stack:
    """The layers of a gate: hidden ones, a linear map, a softmax over the last dimension."""
    steps = _steps(gate, where)
    # Dimension 1 of [B, E] is the last.
    if not steps or type(steps[-1][1]) is not nn.Softmax or steps[-1][1].dim not in (1, -1):
        raise Unfusable(f"{where}: expected an nn.Sequential that ends with nn.Softmax(dim=-1), got {_name(gate)}")
    stack = _stack(steps[:-1])
    if not stack.layers or stack.layers[-1].activation != IDENTITY:
        raise Unfusable(f"{where}: expected an nn.Linear before the softmax, got {_name(steps[-2][1]) if steps[:-1] else 'nothing'}")
    return stack


def _mlp(module: nn.Module, where: str) -> Stack:
    """The layers of an MLP module, at least one."""
    stack = _stack(_steps(module, where))
    if not stack.layers:
        raise Unfusable(f"{where}: expected at least one nn.Linear, got none")
    return stack


def _stack(steps: Sequence[tuple[str, nn.Module]]) -> Stack:
    """The layers of linear maps, each with or without an activation after it."""
    layers: list[Layer] = []
    keys: list[str] = []
    width = 0
    bare = False
    for path, step in steps:
        if type(step) is nn.Linear:
            width = width or step.in_features
            layers.append(Layer(step.out_features, IDENTITY, step.bias is not None))
            keys += [f"{path}.weight", *([f"{path}.bias"] if step.bias is not None else [])]
            bare = True
            continue
        kind = ACTIVATIONS[type(step)](step) if type(step) in ACTIVATIONS else None
        if kind is None:
            raise Unfusable(f"{path}: expected nn.Linear or an activation that the operator has, got {_name(step)}")
        if kind == IDENTITY:
            continue
        if not bare:
            raise Unfusable(f"{path}: expected an nn.Linear before {_name(step)}, got none since the activation before it")
        layers[-1] = replace(layers[-1], activation=kind)
        bare = False
    return Stack(width, tuple(layers), tuple(keys))


def _steps(module: nn.Module, where: str) -> list[tuple[str, nn.Module]]:
    """(path, module) of what runs in turn in Sequentials and in MLPs (a child `mlp_net`)."""
    if type(module) is not nn.Sequential and list(module._modules) != ["mlp_net"]:
        return [(where, module)]
    # Not named_children(): it leaves out the second use of a shared activation module.
    return [step for name, child in module._modules.items() for step in _steps(child, f"{where}.{name}" if where else name)]


def _read(module: nn.Module, *names: str) -> list:
    """The attributes of these names. Raises: Unfusable for one that is missing."""
    for name in names:
        if not hasattr(module, name):
            raise Unfusable(f"{type(module).__name__}: expected an attribute {name}, got none")
    return [getattr(module, name) for name in names]


def _check_children(module: nn.Module, *names: str) -> None:
    """Raise Unfusable unless the module has exactly these submodules and no tensors of its own."""
    if set(module._modules) != set(names):
        raise Unfusable(f"{type(module).__name__}: expected the submodules {', '.join(names)}, got {', '.join(module._modules) or 'none'}")
    own = [*module._parameters, *module._buffers]
    if own:
        raise Unfusable(f"{type(module).__name__}: expected no parameter or buffer of its own, got {own[0]}")


def _name(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"
