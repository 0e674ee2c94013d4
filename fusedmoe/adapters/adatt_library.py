"""The layers of the public AdaTT library, and copies of them under any name.

They are known by their submodules, and proved by the probe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from fusedmoe.adapters.forward import Match, one_per_task, whole
from fusedmoe.nn import wiring
from fusedmoe.nn.wiring import Unfusable, Wiring


class Layer(NamedTuple):
    """A layer: its submodules (`marks`), the rank of its input, and how it returns its output."""

    family: str
    marks: frozenset[str]
    wiring: Callable[[nn.Module], Wiring]
    rank: int
    returns: Callable[[Tensor], object] = whole


TEACH = "fusedmoe.register_adapter can teach its wiring"

GATED = frozenset({"experts", "gate_weights"})
ROOT_GATED = frozenset({"experts", "gates"})
BOTTOMS = frozenset({"bottoms"})

# Families that share marks stand together, the more special one first: a report names it.
LAYERS = (
    Layer("central", frozenset({"mtl_arch", "task_modules"}), wiring.central, 2, one_per_task),
    Layer("adatt_sp", GATED, wiring.adatt_sp, 3),
    Layer("adatt", GATED, wiring.adatt, 3),
    Layer("cgc", GATED, wiring.cgc, 2),
    Layer("ple", GATED, wiring.ple, 3),
    Layer("mmoe", ROOT_GATED, wiring.mmoe, 2),
    Layer("omoe", ROOT_GATED, wiring.omoe, 2),
    Layer("ml_mmoe", ROOT_GATED, wiring.ml_mmoe, 2),
    Layer("cross_stitch", frozenset({"experts", "stitchs"}), wiring.cross_stitch, 3),
    Layer("shared_bottom", frozenset({"bottom_projection"}), wiring.shared_bottom, 2),
    Layer("asymmetric_sharing", BOTTOMS, wiring.asymmetric_sharing, 2),
    Layer("single_task", BOTTOMS, wiring.single_task, 2),
    Layer("customized_sharing", BOTTOMS, wiring.customized_sharing, 2),
)


def candidates(module: nn.Module) -> list[Layer]:
    """Return the layers whose marks are all among the submodules of `module`."""
    return [layer for layer in LAYERS if layer.marks <= module._modules.keys()]


def match(module: nn.Module, layer: Layer) -> Match:
    """Return what `module` computes if it is this layer.

    Raises: Unfusable, with the reason, if it is not laid out as one.
    """
    try:
        return Match(layer.family, layer.wiring(module), layer.rank, layer.returns)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Same names, another structure: a flat list of experts instead of one for each level, say.
        raise Unfusable(f"laid out otherwise ({type(error).__name__}: {error})") from error


def require_no_experts(module: nn.Module) -> None:
    """Raise Unfusable for a near miss: a module with a list of experts and nothing else known."""
    for name, child in module._modules.items():
        if "expert" in name.lower() and isinstance(child, nn.ModuleList):
            marks = {mark for layer in LAYERS if "experts" in layer.marks for mark in layer.marks}
            known = ", ".join(sorted(marks - {"experts"}))
            raise Unfusable(f"it has {name}, but beside it none of {known}; {TEACH}")
