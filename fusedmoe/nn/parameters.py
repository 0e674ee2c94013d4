"""Where the parameters of a module are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedmoe.nn.wiring import Unfusable, Wiring


class Parameters:
    """The parameters of a module in the operator's order, looked up anew at every call.

    Args:
        module: its `state_dict` keys are read, nothing is written to it.
        wiring: the table and, in the order of `table.parameters`, the keys.

    `places` are, in that order, the `_parameters` dicts that hold them and their names there. So
    parameters that are replaced or changed in place are seen, and neither a tensor nor the module
    is kept.

    Raises: Unfusable, naming the key, for one that is missing or has another shape.
    """

    def __init__(self, module: nn.Module, wiring: Wiring):
        self.keys = tuple(wiring.keys)
        self.places = [_place(module, key) for key in self.keys]
        if len(self.keys) != len(wiring.table.parameters):
            count = len(wiring.table.parameters)
            raise Unfusable(f"its table has {count} parameters, but {len(self.keys)} keys were given")
        for key, parameter, tensor in zip(self.keys, wiring.table.parameters, self.tensors(), strict=True):
            if tuple(tensor.shape) != parameter.shape:
                raise Unfusable(f"{key}: expected shape {list(parameter.shape)}, got {list(tensor.shape)}")

    def tensors(self) -> list[Tensor]:
        """Return them as they are at this moment.

        Raises: KeyError if one is no longer a parameter of its submodule.
        """
        return [holder[name] for holder, name in self.places]

    def changed(self, module: nn.Module) -> str | None:
        """Return which is no longer a parameter of its submodule, or None."""
        for key, (holder, name) in zip(self.keys, self.places, strict=True):
            if not isinstance(holder.get(name), Tensor):
                return f"{key}: expected a parameter, got none (parametrized, pruned or deleted?)"
        return None


def _place(module: nn.Module, key: str) -> tuple[dict[str, Any], str]:
    """Return the `_parameters` dict that holds `key`, and its name there."""
    path, _, name = key.rpartition(".")
    try:
        holder = module.get_submodule(path)._parameters
    except AttributeError:
        raise Unfusable(f"{key}: expected a parameter, got no submodule {path!r}") from None
    if not isinstance(holder.get(name), Tensor):
        raise Unfusable(f"{key}: expected a parameter, got {'None' if name in holder else 'no such name'}")
    return holder, name
