"""A network as a user would rewrite it in plain PyTorch for speed: the strongest rival that
`fusedmoe.speed` times.

The experts that read one input are one linear map with their outputs side by side, and so are their
gates; parameters are arranged once, at construction. The arithmetic is that of
`reference/operator.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedmoe.graph import NOTHING, Level, Static
from fusedmoe.outputs import for_tasks
from fusedmoe.reference.activation import apply
from fusedmoe.table import Table


def slots_of(level: Level) -> list[tuple[int, list[int]]]:
    """Return (slot, its experts) for every slot that an expert reads, in order of the slots."""
    slots = [expert.mlp.sources[0].index for expert in level.experts]
    return [(slot, [e for e, read in enumerate(slots) if read == slot]) for slot in sorted(set(slots))]


def runs_of(level: Level) -> list[list[tuple[int, list[int]]]]:
    """Split `slots_of` into runs of consecutive slots with one number of experts each: a run is one
    batched product.
    """
    runs = groupby(enumerate(slots_of(level)), key=lambda pair: (pair[1][0] - pair[0], len(pair[1][1])))
    return [[entry for _, entry in run] for _, run in runs]


def check(table: Table) -> None:
    """Raise ValueError for a table that has no such form: what this module cannot do is named."""
    if table.has_towers:
        raise ValueError("table.tasks: expected no towers, got some")
    for number, level in enumerate(table.graph.levels):
        shapes = {tuple((s.kind, s.width, s.activation, s.bias > NOTHING) for s in e.mlp.stages) for e in level.experts}
        if len(shapes) > 1 or not all(biased for shape in shapes for *_, biased in shape):
            raise ValueError(
                f"level {number}, experts: expected equal layers with a bias, got {len(shapes)} kinds of experts"
            )
        gates = [unit.gate for unit in level.units if unit.gate]
        maps = [gate.mlps[0] for gate in gates]
        kinds = {mlp.sources[0].kind for mlp in maps}
        if any(len(m.stages) > 1 or m.stages[0].bias == NOTHING or not m.width for m in maps) or "expert" in kinds:
            raise ValueError(
                f"level {number}, gates: expected one map with a bias, over at least one expert, of a slot or the root"
            )
        if len(kinds) > 1:
            raise ValueError(f"level {number}, gates: expected selectors of one kind, got slots and the root")


def static_row(static: Static | None, params: Sequence[Tensor], zeros: Tensor) -> Tensor:
    """Return `zeros` [E] with the static weights of a unit, if it has any.

    Differentiable in the parameters.
    """
    if static is None or not static.experts:
        return zeros
    values = (
        zeros.new_tensor(static.values)
        if static.parameter == NOTHING
        else params[static.parameter].flatten()[static.offset :][: len(static.experts)]
    )
    return zeros.index_copy(0, torch.tensor(static.experts), values)


def arrange(table: Table, params: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the parameters of `Restructured` by name, by differentiable operations on those of
    `table.parameters`.
    """
    named = {expect.name: tensor for expect, tensor in zip(table.parameters, params, strict=True)}
    result = {}
    for number, level in enumerate(table.graph.levels):
        at = f"stages.{number}"
        order = [e for _, experts in slots_of(level) for e in experts]

        def of(kind: str, layer: int, experts: Sequence[int], number: int = number) -> list[Tensor]:
            return [named[f"levels.{number}.experts.{e}.{layer}.{kind}"] for e in experts]

        if number == 0:
            result |= {f"{at}.weight": torch.cat(of("weight", 0, order)), f"{at}.bias": torch.cat(of("bias", 0, order))}
        for i, run in enumerate(runs_of(level) if number else []):
            result[f"{at}.weight_{i}"] = torch.stack([torch.cat(of("weight", 0, experts)).t() for _, experts in run])
            result[f"{at}.bias_{i}"] = torch.stack([torch.cat(of("bias", 0, experts)) for _, experts in run]).unsqueeze(
                1
            )
        for j in range(1, len(level.experts[0].mlp.stages)):
            result[f"{at}.deep_weight_{j}"] = torch.stack([w.t() for w in of("weight", j, order)])
            result[f"{at}.deep_bias_{j}"] = torch.stack(of("bias", j, order)).unsqueeze(1)
        result |= {f"{at}.{name}": tensor for name, tensor in arrange_mixing(level, number, order, named).items()}
        if any(unit.static for unit in level.units):
            result[f"{at}.static"] = torch.stack(
                [static_row(unit.static, params, params[0].new_zeros(len(order)))[order] for unit in level.units]
            )
    return result


def arrange_mixing(level: Level, number: int, order: list[int], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gates of a level with rows of zeros for the experts they do not see.

    None where no unit has a gate.
    """
    gated = [(u, unit.gate) for u, unit in enumerate(level.units) if unit.gate]
    if not gated:
        return {}
    weights, biases = [], []
    for u, gate in gated:
        weight, bias = named[f"levels.{number}.gates.{u}.weight"], named[f"levels.{number}.gates.{u}.bias"]
        seen = torch.tensor([order.index(e) for e in gate.sees])
        weights.append(weight.new_zeros(len(order), weight.shape[1]).index_copy(0, seen, weight))
        biases.append(bias.new_zeros(len(order)).index_copy(0, seen, bias))
    if gated[0][1].mlps[0].sources[0].kind == "input":
        return {"gate_weight": torch.cat(weights), "gate_bias": torch.cat(biases)}
    return {
        "gate_weight": torch.stack([weight.t() for weight in weights]),
        "gate_bias": torch.stack(biases).unsqueeze(1),
    }


class Stage(nn.Module):
    """One level: x [B, D] and, above the first level, its slots [S, B, K] -> [B, U, H]."""

    def __init__(self, level: Level, first: bool, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format)))
        self.first, self.layers, self.experts = first, level.experts[0].mlp.stages, len(level.experts)
        self.runs = [slice(run[0][0], run[-1][0] + 1) for run in runs_of(level)]
        order = [e for _, experts in slots_of(level) for e in experts]
        gated = [u for u, unit in enumerate(level.units) if unit.gate]
        gates = [level.units[u].gate for u in gated]
        self.has_static = any(unit.static for unit in level.units)
        self.units, self.gated = len(level.units), None if len(gated) == len(level.units) else gated
        sources = [gate.mlps[0].sources[0] for gate in gates]
        self.by_root = bool(sources) and sources[0].kind == "input"
        read = [source.index for source in sources]
        # A slice is a view; a list would copy, and add up in backward.
        self.read = slice(read[0], read[-1] + 1) if read and read == list(range(read[0], read[-1] + 1)) else read
        dtype = next(iter(tensors.values())).dtype
        mask = torch.tensor([[0.0 if e in gate.sees else -torch.inf for e in order] for gate in gates], dtype=dtype)
        self.register_buffer("mask", mask if gates and bool(mask.any()) else None)

    def forward(self, x: Tensor, slots: Tensor | None) -> Tensor:
        return torch.bmm(self.mixing(x, slots), self.outputs(x, slots))

    def outputs(self, x: Tensor, slots: Tensor | None) -> Tensor:
        """Return every expert's output [B, E, H]."""
        rows, experts = x.shape[0], self.experts
        act, width = self.layers[0].activation, self.layers[0].width
        if self.first:
            h = apply(act, F.linear(x, self.weight, self.bias)).view(rows, experts, width)
        else:
            parts = [
                torch.baddbmm(getattr(self, f"bias_{i}"), slots[run], getattr(self, f"weight_{i}"))
                for i, run in enumerate(self.runs)
            ]
            parts = [
                apply(act, part).view(part.shape[0], rows, -1, width).transpose(0, 1).flatten(1, 2) for part in parts
            ]
            h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        for j, layer in enumerate(self.layers[1:], 1):
            h = apply(
                layer.activation,
                torch.baddbmm(getattr(self, f"deep_bias_{j}"), h.transpose(0, 1), getattr(self, f"deep_weight_{j}")),
            ).transpose(0, 1)
        return h

    def mixing(self, x: Tensor, slots: Tensor | None) -> Tensor:
        """Return softmax of the gates plus static weights [B, U, E]."""
        if self.gated == []:
            return (
                self.static.expand(x.shape[0], -1, -1)
                if self.has_static
                else x.new_zeros(x.shape[0], self.units, self.experts)
            )
        if self.by_root:
            logits = F.linear(x, self.gate_weight, self.gate_bias).view(x.shape[0], -1, self.experts)
        else:
            logits = torch.baddbmm(self.gate_bias, slots[self.read], self.gate_weight).transpose(0, 1)
        weights = torch.softmax(logits if self.mask is None else logits + self.mask, dim=-1)
        if self.gated is not None:
            weights = weights.new_zeros(x.shape[0], self.units, self.experts).index_copy(
                1, torch.tensor(self.gated), weights
            )
        return weights + self.static if self.has_static else weights


class Restructured(nn.Module):
    """The network of a table on x [B, D], which every slot of its first level gets -> what
    `fusion_network` returns.

    Args:
        table: without towers; the experts of a level have equal layers, its gates one linear map
            each.
        params: the tensors of `table.parameters`, copied.
    Raises: ValueError for any other table.
    """

    def __init__(self, table: Table, params: Sequence[Tensor]) -> None:
        super().__init__()
        check(table)
        self.table = table
        tensors = arrange(table, params)
        own = [
            {name.rsplit(".", 1)[1]: t for name, t in tensors.items() if name.startswith(f"stages.{i}.")}
            for i in range(len(table.levels))
        ]
        self.stages = nn.ModuleList(Stage(level, i == 0, own[i]) for i, level in enumerate(table.graph.levels))

    def forward(self, x: Tensor) -> Tensor:
        out = None
        for stage in self.stages:
            out = stage(x, None if out is None else out.transpose(0, 1))
        return for_tasks(out, self.table)
