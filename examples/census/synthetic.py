"""Two regression tasks whose relatedness is a number.

    w[1] = c u1,   w[2] = c (rho u1 + sqrt(1 - rho^2) u2)
    y[k] = w[k].x + sum over i of sin(alpha[i] w[k].x + beta[i]) + noise

u1 and u2 are orthogonal unit vectors of R^d, x ~ N(0, I), and the noise has variance 0.01.

Source: MMoE, equations 2 to 4; c = 1, ten sines with alpha, beta ~ N(0, 1), and d = 512 are PLE's
    choice.
"""

from __future__ import annotations

import numpy as np
import torch

from fusedmoe.demo.dataset import Dataset, Part, split_rows

ROWS = 60_000
WIDTH = 512
SINES = 10
SCALE = 1.0
NOISE_VARIANCE = 0.01
CORRELATION = 0.5


def directions(width: int, correlation: float, generator: np.random.Generator) -> np.ndarray:
    """Return w [2, width] of length `SCALE`, whose cosine is `correlation`."""
    basis, _ = np.linalg.qr(generator.standard_normal((width, 2)))
    u1, u2 = basis.T
    return SCALE * np.stack([u1, correlation * u1 + np.sqrt(1 - correlation**2) * u2])


def load(seed: int, rows: int = ROWS, width: int = WIDTH, correlation: float = CORRELATION) -> Dataset:
    """Draw the two tasks and split their rows, all by `seed`.

    Targets are divided by their deviation over the train part.
    """
    generator = np.random.default_rng(seed)
    weights = directions(width, correlation, generator)
    alpha, beta = generator.standard_normal((2, SINES))
    x = generator.standard_normal((rows, width)).astype(np.float32)
    along = x @ weights.T  # [N, 2]
    y = (
        along
        + np.sin(along[:, :, None] * alpha + beta).sum(axis=2)
        + np.sqrt(NOISE_VARIANCE) * generator.standard_normal(along.shape)
    )
    parts = split_rows(rows, seed)
    y = (y / y[parts[0]].std(axis=0)).astype(np.float32)
    fields = np.zeros((rows, 0), np.int64)
    train, validation, test = (Part(*(torch.from_numpy(array[part]) for array in (fields, x, y))) for part in parts)
    return Dataset("synthetic", ("task 1", "task 2"), False, (), train, validation, test)
