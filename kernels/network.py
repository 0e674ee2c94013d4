"""A network's forward and backward on a GPU: tensors in, tensors out, whoever launches
(`launchers.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from fusedmoe.kernels.bound import Key, backward_of, forward_of, key_of
from fusedmoe.kernels.launchers import launcher
from fusedmoe.kernels.tiles import Tiles
from fusedmoe.table import Table


class Saved(NamedTuple):
    """What the forward leaves for the backward: the softmax of every unit [rows, B] in float32 and
    the segments' buffers [B x buffer_width] in one tensor of bytes (`bound.saved_bytes`), and the tiles that
    say which row is whose, None: the shipped ones; and the seed of its dropout, or None.
    """

    memory: Tensor
    tiles: Tiles | None = None
    seed: Tensor | None = None


def forward(
    x: Tensor,
    params: Sequence[Tensor],
    table: Table,
    mixing: bool,
    training: bool,
    tiles: Tiles | None = None,
    *,
    backend: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Saved]:
    """Run the network: `fusion_network`'s mathematics.

    Args:
        x: [B, S, D], its last dimension contiguous.
        params: one per `table.parameters`, of x's dtype.
        table: the network.
        mixing: return the mixing weights.
        training: keep what `backward` needs; without it hidden layers stay on the chip where a
            level has one segment of them.
        tiles: None: the shipped ones.
        backend: whose kernels.
        seed: int64 [1], of dropout; None: nothing is dropped.

    Returns: out [B, *table.output], weights [B, table.mixing] or None, and what `backward` takes.
    """
    bound = forward_of(key_of(x, table, training, tiles, backend))
    out, weights, memory = launcher(backend).forward(bound, x, params, mixing, seed)
    return out, weights, Saved(memory, bound.tiles, seed)


def backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    x: Tensor,
    params: Sequence[Tensor],
    saved: Saved,
    table: Table,
    tiles: Tiles | None = None,
    *,
    backend: str,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return d_x [B, S, D], and one gradient a parameter: None for those on which no output
    depends, for the others views of one tensor.

    Args:
        d_out: [B, *table.output].
        d_weights: [B, table.mixing], or None.
        x, params, table: as `forward` had them.
        saved: what it returned.
        tiles: of the backward, whatever those of the forward were; None: the shipped ones.
        backend: whose kernels.
    """
    key = _backward_key(x, saved, table, tiles, backend)
    d_x, *found = _backward(d_out, d_weights, x, params, saved, key, apart=True)
    return d_x, with_dead(found, table)


def with_dead(gradients: Iterable[Tensor], table: Table) -> list[Tensor | None]:
    """Return one gradient a parameter, of those of the live ones: None where no output depends on
    it."""
    live = iter(gradients)
    return [next(live) if p.live else None for p in table.graph.parameters]


def flat_backward(
    d_out: Tensor,
    d_weights: Tensor | None,
    x: Tensor,
    params: Sequence[Tensor],
    saved: Saved,
    table: Table,
    tiles: Tiles | None = None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return d_x, and the gradients of the live parameters, one after another. The arguments are
    those of `backward`."""
    key = _backward_key(x, saved, table, tiles, backend)
    d_x, flat = _backward(d_out, d_weights, x, params, saved, key, apart=False)
    return d_x, flat


def _backward_key(x: Tensor, saved: Saved, table: Table, tiles: Tiles | None, backend: str) -> Key:
    # The gradients of slots differ, also where the slots do not.
    return key_of(x, table, True, tiles, backend)._replace(apart=True, before=saved.tiles)


def _backward(
    d_out: Tensor, d_weights: Tensor | None, x: Tensor, params: Sequence[Tensor], saved: Saved, key: Key, apart: bool
) -> list[Tensor]:
    # Those of a call that returned no mixing weights are [B, 0].
    d_weights = d_weights if d_weights is not None and d_weights.numel() else None
    run = launcher(key.backend).backward
    return run(backward_of(key), d_out, d_weights, x, params, saved.memory, saved.seed, apart)
