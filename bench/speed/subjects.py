"""The layers that are timed: a family and its sizes, built as a user writes it, and the rows that
it is called on.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedmoe import testing
from fusedmoe.adapters.adatt_library import LAYERS
from fusedmoe.nn.wiring import Wiring
from fusedmoe.reference import layers
from fusedmoe.table import Table

# How PyTorch code calls the layer of a family.
CLASSES = {
    "single_task": layers.SingleTask,
    "shared_bottom": layers.SharedBottom,
    "omoe": layers.OMoE,
    "mmoe": layers.MMoE,
    "ml_mmoe": layers.MLMMoE,
    "cgc": layers.CGC,
    "ple": layers.PLE,
    "adatt_sp": layers.AdaTTSp,
    "adatt": layers.AdaTT,
    "cross_stitch": layers.CrossStitch,
    "asymmetric_sharing": layers.AsymmetricSharing,
    "customized_sharing": layers.CustomizedSharing,
}
ONE_LEVEL = ("expert_arch", "hidden_dims")
_ROWS = {layer.family: layer for layer in LAYERS}


class Sizes(NamedTuple):
    """A layer to time, by its family and what the family's constructor takes.

    `experts` has a list of layer widths per level; `per_task` and `shared` count the experts of a
    level that tasks own or share, `total` those of a family whose tasks own none.
    """

    family: str
    tasks: int
    input: int
    experts: tuple[tuple[int, ...], ...]
    per_task: int = 2
    shared: int = 1
    total: int = 8


class Layer(NamedTuple):
    """A built layer: the module, its wiring, and the slots that its callers expand x to (0: it
    takes x [B, D]).
    """

    module: nn.Module
    wiring: Wiring
    slots: int

    @property
    def table(self) -> Table:
        return self.wiring.table

    @property
    def params(self) -> list[Tensor]:
        """The parameters in the operator's order."""
        return [self.module.get_parameter(key) for key in self.wiring.keys]


TWO_LEVELS = ((256,), (128,))
SUBJECTS = {
    "AdaTT T3m2": Sizes("adatt_sp", 3, 256, TWO_LEVELS),
    "PLE T3m2s1": Sizes("ple", 3, 256, TWO_LEVELS),
    "MMoE T3e8": Sizes("mmoe", 3, 256, ((256, 128),)),
    "AdaTT T8m2": Sizes("adatt_sp", 8, 256, TWO_LEVELS),
    "AdaTT 512-256-128": Sizes("adatt_sp", 3, 256, ((512,), (256,), (128,))),
    "general AdaTT T3m2s1": Sizes("adatt", 3, 256, TWO_LEVELS),
    "PLE T5m1s2": Sizes("ple", 5, 256, TWO_LEVELS, per_task=1, shared=2),
    "ML-MMoE T3e8": Sizes("ml_mmoe", 3, 256, TWO_LEVELS),
    "Cross-Stitch T3": Sizes("cross_stitch", 3, 256, TWO_LEVELS),
}
# The layers that the floors of the CPU backend single out; the others have one floor together.
MAIN = ("AdaTT T3m2", "PLE T3m2s1", "MMoE T3e8")


def arguments_of(sizes: Sizes) -> dict[str, object]:
    """Return the arguments of the family's constructor.

    Raises: ValueError for a family that does not exist, or several levels for one that has one.
    """
    if sizes.family not in CLASSES:
        raise ValueError(f"family: expected one of {', '.join(CLASSES)}, got {sizes.family!r}")
    names = inspect.signature(CLASSES[sizes.family]).parameters
    widths = [list(level) for level in sizes.experts]
    if len(widths) > 1 and any(name in names for name in ONE_LEVEL):
        got = ",".join("-".join(map(str, level)) for level in widths)
        raise ValueError(
            f"experts: expected the layers of one level for {sizes.family}, joined by hyphens"
            f" ({got.replace(',', '-')}), got {got}"
        )
    neighbours = [list(dict.fromkeys((t, (t + 1) % sizes.tasks))) for t in range(sizes.tasks)]
    offered = {"input_dim": sizes.input, "num_tasks": sizes.tasks, "num_experts": sizes.total, "borrows": neighbours}
    offered |= {
        "num_task_experts": sizes.per_task,
        "num_shared_experts": sizes.shared,
        "gate_archs": [[] for _ in widths],
        "gate_arch": [],
    }
    offered |= {"expert_out_dims": widths, "expert_archs": widths, **dict.fromkeys(ONE_LEVEL, widths[0])}
    return {name: value for name, value in offered.items() if name in names}


def build(sizes: Sizes, dtype: torch.dtype = torch.float32) -> Layer:
    """Return the layer with random parameters, the same for the same sizes in every process.

    Raises: ValueError, naming the argument, what was expected and what came.
    """
    module = CLASSES[sizes.family](**arguments_of(sizes))
    testing.randomise(module.parameters(), seed=0)
    module = module.to(dtype)
    row = _ROWS[sizes.family]
    wiring = row.wiring(module)
    return Layer(module, wiring, wiring.table.inputs[0].slots if row.rank == 3 else 0)


class Called(nn.Module):
    """x [B, D] -> the layer, called as `CentralTaskArch` calls it: x expanded to its slots, without
    a copy.
    """

    def __init__(self, layer: nn.Module, slots: int) -> None:
        super().__init__()
        self.layer, self.slots = layer, slots

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(1).expand(-1, self.slots, -1) if self.slots else x)


class Work(NamedTuple):
    """Inputs of one call: x [B, D], and the upstream gradient, contiguous [B, T, H], as a loss over
    towers hands it down.
    """

    x: Tensor
    d_out: Tensor


def rows_for(layer: Layer, batch: int) -> Work:
    """Draw rows that are off every ReLU's kink in float32, so that parity does not depend on the
    order of summation.
    """
    generator = torch.Generator().manual_seed(1)
    dtype, table = layer.params[0].dtype, layer.table
    # In bfloat16 nearly every row is near a kink; its gradients are compared in the norm.
    spare = torch.randn(2 * batch + 20, table.inputs[0].width, generator=generator).to(dtype)
    off = testing.rows_off_kinks(
        spare.float().unsqueeze(1).expand(-1, table.inputs[0].slots, -1), [p.float() for p in layer.params], table
    )
    return Work(spare[off][:batch].clone(), torch.randn(batch, *table.output, generator=generator).to(dtype))
