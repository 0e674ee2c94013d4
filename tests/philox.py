"""Philox4x32-10 in numpy, and the dropout that the operator makes of it: what the kernels' own are
held against."""

import numpy as np
import torch
from torch import Tensor

MASK = np.uint64(0xFFFFFFFF)


def philox(counter: list[np.ndarray], key: int) -> list[np.ndarray]:
    """Four words for each of some counters of four words, uint64 arrays. Source: Salmon et al. 2011, section 3.3."""
    a, b, c, d = (np.asarray(word, np.uint64) & MASK for word in counter)
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (
            second >> np.uint64(32) ^ b ^ np.uint64(low),
            second & MASK,
            first >> np.uint64(32) ^ d ^ np.uint64(high),
            first & MASK,
        )
        low, high = low + 0x9E3779B9 & 0xFFFFFFFF, high + 0xBB67AE85 & 0xFFFFFFFF
    return [a, b, c, d]


def kept(seed: int, rows: int, columns: int, stream: int, p: float) -> Tensor:
    """Which elements of a stage's output a dropout keeps, [rows, columns]."""
    row, column = np.meshgrid(np.arange(rows, dtype=np.uint64), np.arange(columns, dtype=np.uint64), indexing="ij")
    words = np.stack(philox([row, column // 4, np.full_like(row, stream), row >> np.uint64(32)], seed), -1)
    word = np.take_along_axis(words, (column % 4).astype(np.int64)[..., None], -1)[..., 0]
    return torch.from_numpy(word >= np.uint64(int(p * 2**32)))


def dropped(h: Tensor, seed: int, stream: int, p: float) -> Tensor:
    """What is kept of h [B, width], times 1 / (1 - p)."""
    return torch.where(kept(seed, *h.shape, stream, p), h * (1.0 / (1.0 - p)), 0.0)
