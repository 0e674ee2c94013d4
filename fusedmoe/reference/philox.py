"""Dropout's mask from a generator that counts: the same bits on every backend, however a batch is split.

Philox4x32-10 turns a counter of four words and a key of two into four random words. The key is the
call's seed (low word, high word). The counter of an element in row b and column k of dropout number
s is (low word of b, k // 4, s, high word of b), and the element takes word k % 4. It is kept where
that word is at least floor(p 2^32), and then divided by 1 - p.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator, int64 [1] on a device, below 2^62."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64, device=device)


def factors(seed: Tensor, like: Tensor, p: float, stream: int) -> Tensor:
    """What dropout multiplies each element of `like` [B, K] with: 0, or 1 / (1 - p)."""
    rows, columns = (torch.arange(n, dtype=torch.int64, device=like.device) for n in like.shape)
    kept = words(seed, rows[:, None], columns, stream) >= threshold(p)
    # In float32 at least: in float16 a p near 1 would make it infinite.
    one = torch.ones((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return torch.where(kept, one / (1.0 - p), one * 0)


def threshold(p: float) -> int:
    """The least word of an element that is kept."""
    return int(p * 2**32)


def words(seed: Tensor, rows: Tensor, columns: Tensor, stream: int) -> Tensor:
    """The random word of each (row, column), as int64."""
    counter = [rows & WORD, columns // 4, torch.full_like(columns, stream), (rows >> 32) & WORD]
    counter = list(torch.broadcast_tensors(*counter))
    key = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = (_multiplied(m, counter[i]) for m, i in zip(MULTIPLIERS, (0, 2), strict=True))
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(word + step) & WORD for word, step in zip(key, STEPS, strict=True)]
    return torch.stack(counter, -1).gather(-1, (columns % 4).expand_as(counter[0])[..., None])[..., 0]


def _multiplied(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product. Its bits are right where int64 overflows."""
    product = word * multiplier
    return (product >> 32) & WORD, product & WORD
