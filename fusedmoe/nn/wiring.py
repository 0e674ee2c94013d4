"""Read a layer's wiring off its structure: its table, and its parameters in the operator's order.

One row per layer class. Each reads only attributes and submodules that the public AdaTT library's
layer has too, takes widths, biases and activations from the modules as they are, and raises
`Unfusable` for anything that its table could not express. Slots, sees and selectors come from a
function of `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

from torch import nn

from fusedmoe import families
from fusedmoe.activation import IDENTITY, Activation
from fusedmoe.drafts import draft_of, share_input, table_of, unit_tasks
from fusedmoe.nn.counts import Unfusable, require_counts
from fusedmoe.parts import Draft, Expert, Gate, Level, Linear, Op
from fusedmoe.table import Table

Network = TypeVar("Network", bound=Draft)


class Wiring(NamedTuple):
    """A table, and the module's `state_dict` keys in the order of `table.parameters`."""

    table: Table
    keys: tuple[str, ...]


class DraftWiring(NamedTuple):
    """A wiring whose table is not checked yet."""

    draft: Draft
    keys: tuple[str, ...]


class Stack(NamedTuple):
    """An MLP: its input width, its ops, and their parameters' keys in the operator's order."""

    width: int
    ops: tuple[Op, ...]
    keys: tuple[str, ...]

    @property
    def widths(self) -> list[int]:
        """The widths of its linear maps."""
        return [op.width for op in self.ops if isinstance(op, Linear)]


ACTIVATIONS: dict[type, Callable[[Any], Activation | None]] = {
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


@dataclass(frozen=True)
class Layout:
    """Where a layer class keeps the parts of a family's network.

    Called with a module it returns that one's `Wiring`.

    Args:
        family: a function of `families.py`, called with the input width, the experts' widths,
            `num_tasks` and `arguments`.
        arguments: the module's attributes that it takes besides.
        experts: `experts` and `bottoms` are lists, the former of levels; `bottom_projection` is one
            MLP.
        gates, statics: the submodules that hold them; empty for none.
        arrange: what makes the arguments of the attributes.

    Raises: Unfusable, naming the place, at a call with a module that this table could not express.
    """

    family: Callable[..., Table]
    arguments: tuple[str, ...] = ()
    experts: str = "experts"
    gates: str = ""
    statics: str = ""
    arrange: Callable[..., Sequence] = lambda *attributes: attributes

    @property
    def __name__(self) -> str:
        return self.family.__name__

    def __call__(self, module: nn.Module) -> Wiring:
        return _checked(module, self.draft(module))

    def draft(self, module: nn.Module) -> DraftWiring:
        """Return the wiring of a module before its table is checked."""
        arguments = self.arrange(*_read(module, *self.arguments))
        _check_children(module, *filter(None, (self.experts, self.gates, self.statics)))
        levels = _items(getattr(module, self.gates), self.gates) if self.gates else []
        gates = [_each(level, path, _softmax_of) for path, level in levels]
        statics = _statics(getattr(module, self.statics), self.statics) if self.statics else []
        experts = EXPERTS[self.experts](getattr(module, self.experts), self.experts)
        return _wire(module, self.family, experts, arguments, gates, statics)


def _with_shared_count(counts: Sequence[int], static_weights: bool) -> tuple:
    """Arrange the arguments of `families.adatt`: the shared unit's count is the last of a list."""
    return counts[:-1], *counts[-1:], static_weights


OWN_AND_SHARED = ("num_task_experts", "num_shared_experts")
STATIC = "self_exp_res_connect"

single_task = Layout(families.single_task, experts="bottoms")
shared_bottom = Layout(families.shared_bottom, experts="bottom_projection")
asymmetric_sharing = Layout(families.asymmetric_sharing, ("borrows", "combine"), experts="bottoms")
customized_sharing = Layout(families.customized_sharing, experts="bottoms")
omoe = Layout(families.omoe, ("num_experts",), gates="gates")
mmoe = Layout(families.mmoe, ("num_experts",), gates="gates")
ml_mmoe = Layout(families.ml_mmoe, ("num_experts",), gates="gates")
cgc = Layout(families.cgc, OWN_AND_SHARED, gates="gate_weights")
ple = Layout(families.ple, OWN_AND_SHARED, gates="gate_weights")
adatt_sp = Layout(families.adatt_sp, ("num_task_experts", STATIC), gates="gate_weights", statics="self_exp_weights")
adatt = replace(adatt_sp, family=families.adatt, arguments=("num_expert_list", STATIC), arrange=_with_shared_count)
cross_stitch = Layout(families.cross_stitch, statics="stitchs")

# By the `mtl_model` of a CentralTaskArch.
BACKBONES: dict[str, Layout] = {
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

    Raises: Unfusable, naming the place, for a module that this table could not express.
    """
    _check_children(module, "mtl_arch", "task_modules")
    (name,) = _read(module, "mtl_model")
    if name not in BACKBONES:
        raise Unfusable(f"mtl_model: expected one of {', '.join(BACKBONES)}, got {name!r}")
    try:
        backbone = BACKBONES[name].draft(module.get_submodule("mtl_arch"))
    except Unfusable as error:
        raise Unfusable(f"mtl_arch: {error}") from None
    towers = _each(module.get_submodule("task_modules"), "task_modules", _mlp)
    draft = share_input(backbone.draft)
    tasks = draft.tasks or unit_tasks(draft.levels[-1])
    if len(tasks) != len(towers):
        raise Unfusable(f"task_modules: expected one tower for each of {len(tasks)} tasks, got {len(towers)}")
    pairs = zip(tasks, towers, strict=True)
    draft = replace(draft, tasks=tuple(replace(task, tower=tower.ops) for task, tower in pairs))
    # The towers' parameters stand before the static tensors.
    last = len(backbone.keys) - len(draft.shared)
    keys = [f"mtl_arch.{key}" for key in backbone.keys]
    of_towers = (key for tower in towers for key in tower.keys)
    return _checked(module, DraftWiring(draft, (*keys[:last], *of_towers, *keys[last:])))


def _wire(
    module: nn.Module,
    family: Callable[..., Table],
    experts: Sequence[Sequence[Stack]],
    arguments: Sequence = (),
    gates: Sequence[Sequence[Stack]] = (),
    statics: Sequence[str] = (),
) -> DraftWiring:
    """Put the layers found into the family's draft, and list the keys in the operator's order.

    Args:
        family: called with the input width, the experts' widths, the number of tasks and
            `arguments`.
        experts, gates: found per level; no gates for a family without any.
        statics: the keys of the static tensors.
    """
    widths = [level[0].widths for level in experts]
    (tasks,) = _read(module, "num_tasks")
    require_counts(family, tasks, arguments, len(experts[0]), max(map(len, gates), default=0))
    draft = _accepted(draft_of(family), experts[0][0].width, widths, tasks, *arguments)
    gates = gates or [()] * len(draft.levels)
    wanted = [(len(level.experts), sum(unit.gate is not None for unit in level.units)) for level in draft.levels]
    found = [(len(level), len(gates[i]) if i < len(gates) else 0) for i, level in enumerate(experts)]
    if found != wanted or len(gates) != len(wanted):
        raise Unfusable(f"(experts, gates) per level: expected {wanted}, got {found}")
    if len(statics) != len(draft.shared):
        raise Unfusable(f"static weights: expected {len(draft.shared)} tensors, got {len(statics)}")
    levels = tuple(_level(level, experts[i], gates[i]) for i, level in enumerate(draft.levels))
    keys = [key for i in range(len(levels)) for stack in (*experts[i], *gates[i]) for key in stack.keys]
    return DraftWiring(replace(draft, levels=levels), (*keys, *statics))


def _level(level: Level, experts: Sequence[Stack], gates: Sequence[Stack]) -> Level:
    """The level with the layers found in place of the family's."""
    units = tuple(
        replace(unit, gate=_gate(unit.gate, gates[u])) if isinstance(unit.gate, Gate) else unit
        for u, unit in enumerate(level.units)
    )
    return Level(
        tuple(Expert(expert.sources, stack.ops) for expert, stack in zip(level.experts, experts, strict=True)), units
    )


def _gate(gate: Gate, found: Stack) -> Gate:
    *hidden, last = found.ops
    return replace(gate, hidden=tuple(hidden), bias=cast(Linear, last).bias)


def _checked(module: nn.Module, found: DraftWiring) -> Wiring:
    """Return the wiring if its draft is a table whose parameters are just those of the module."""
    wiring = Wiring(_accepted(table_of, found.draft), found.keys)
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


def _accepted(function: Callable[..., Network], *arguments) -> Network:
    """Call a function that returns a table or a draft; what it refuses is unfusable."""
    try:
        return function(*arguments)
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


def _experts(module: nn.Module, where: str) -> list[list[Stack]]:
    """The experts `{where}.{level}.{expert}`, at least one on each level."""
    result = [_each(level, path, _mlp) for path, level in _items(module, where)]
    if not result or not all(result):
        raise Unfusable(f"{where}: expected at least one expert on each level, got {[len(level) for level in result]}")
    return result


def _bottoms(module: nn.Module, where: str) -> list[list[Stack]]:
    """The experts `{where}.{expert}` of a family of one level, at least one."""
    result = _each(module, where, _mlp)
    if not result:
        raise Unfusable(f"{where}: expected at least one, got none")
    return [result]


EXPERTS: dict[str, Callable[[nn.Module, str], list[list[Stack]]]] = {
    "experts": _experts,
    "bottoms": _bottoms,
    "bottom_projection": lambda module, where: [[_mlp(module, where)]],
}


def _statics(module: nn.Module, where: str) -> list[str]:
    """The keys of the static tensors: a `ParameterList`, or a list of `Linear` without bias."""
    if isinstance(module, nn.ParameterList):
        return [f"{where}.{name}" for name in module._parameters]
    stitches = _items(module, where)
    for path, stitch in stitches:
        if type(stitch) is not nn.Linear or stitch.bias is not None:
            raise Unfusable(f"{path}: expected an nn.Linear without bias, got {_name(stitch)}")
    return [f"{path}.weight" for path, _ in stitches]


def _softmax_of(gate: nn.Module, where: str) -> Stack:
    """The layers of a gate: hidden ones, a linear map, a softmax over the last dimension."""
    steps = _steps(gate, where)
    # Dimension 1 of [B, E] is the last.
    if not steps or type(steps[-1][1]) is not nn.Softmax or steps[-1][1].dim not in (1, -1):
        raise Unfusable(f"{where}: expected an nn.Sequential that ends with nn.Softmax(dim=-1), got {_name(gate)}")
    stack = _stack(steps[:-1])
    if not stack.ops or not isinstance(stack.ops[-1], Linear):
        got = _name(steps[-2][1]) if steps[:-1] else "nothing"
        raise Unfusable(f"{where}: expected an nn.Linear before the softmax, got {got}")
    return stack


def _mlp(module: nn.Module, where: str) -> Stack:
    """The layers of an MLP module, at least one."""
    stack = _stack(_steps(module, where))
    if not stack.ops:
        raise Unfusable(f"{where}: expected at least one nn.Linear, got none")
    return stack


def _stack(steps: Sequence[tuple[str, nn.Module]]) -> Stack:
    """The ops of linear maps, each with or without an activation after it."""
    ops: list[Op] = []
    keys: list[str] = []
    width = 0
    for path, step in steps:
        if type(step) is nn.Linear:
            width = width or step.in_features
            ops.append(Linear(step.out_features, step.bias is not None))
            keys += [f"{path}.weight", *([f"{path}.bias"] if step.bias is not None else [])]
            continue
        kind = ACTIVATIONS[type(step)](step) if type(step) in ACTIVATIONS else None
        if kind is None:
            raise Unfusable(f"{path}: expected nn.Linear or an activation that the operator has, got {_name(step)}")
        if kind == IDENTITY:
            continue
        if not ops or not isinstance(ops[-1], Linear):
            got = "none since the activation before it"
            raise Unfusable(f"{path}: expected an nn.Linear before {_name(step)}, got {got}")
        ops.append(kind)
    return Stack(width, tuple(ops), tuple(keys))


def _steps(module: nn.Module, where: str) -> list[tuple[str, nn.Module]]:
    """(path, module) of what runs in turn in Sequentials and in MLPs (a child `mlp_net`)."""
    if type(module) is not nn.Sequential and list(module._modules) != ["mlp_net"]:
        return [(where, module)]
    # Not named_children(): it leaves out the second use of a shared activation module.
    return [
        step
        for name, child in module._modules.items()
        for step in _steps(cast(nn.Module, child), f"{where}.{name}" if where else name)
    ]


def _read(module: nn.Module, *names: str) -> list:
    """The attributes of these names. Raises: Unfusable for one that is missing."""
    for name in names:
        if not hasattr(module, name):
            raise Unfusable(f"{type(module).__name__}: expected an attribute {name}, got none")
    return [getattr(module, name) for name in names]


def _check_children(module: nn.Module, *names: str) -> None:
    """Raise Unfusable unless the module has exactly these submodules and no tensors of its own."""
    if set(module._modules) != set(names):
        expected, got = ", ".join(names), ", ".join(module._modules) or "none"
        raise Unfusable(f"{type(module).__name__}: expected the submodules {expected}, got {got}")
    own = [*module._parameters, *module._buffers]
    if own:
        raise Unfusable(f"{type(module).__name__}: expected no parameter or buffer of its own, got {own[0]}")


def _name(module: nn.Module) -> str:
    """The type of a module, and what it was made with where that says something."""
    details = module.extra_repr()
    return f"{type(module).__name__}({details})" if details else type(module).__name__
