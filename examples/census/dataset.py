"""What a demonstration trains on: rows of fields and numbers, several targets a row, split once by
a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SHARES = (0.70, 0.15, 0.15)


@dataclass(frozen=True)
class Part:
    """Rows of a part: `fields` [N, F] int64, `numbers` [N, C] and `targets` [N, T] float32."""

    fields: torch.Tensor
    numbers: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, index: torch.Tensor | slice) -> Part:
        """Return the rows at `index`."""
        return Part(self.fields[index], self.numbers[index], self.targets[index])


@dataclass(frozen=True)
class Dataset:
    """Three parts and what a model must know of them.

    `field_sizes[f]` is the number of values of field f; `binary` says whether targets are 0 or 1
    (else real numbers).
    """

    name: str
    tasks: tuple[str, ...]
    binary: bool
    field_sizes: tuple[int, ...]
    train: Part
    validation: Part
    test: Part


def split_rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row numbers of the train, validation and test parts: 70, 15 and 15 percent of a
    permutation fixed by `seed`.
    """
    order = np.random.default_rng(seed).permutation(count)
    first = round(count * SHARES[0])
    second = first + round(count * SHARES[1])
    return order[:first], order[first:second], order[second:]


def standardise(numbers: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return `numbers` [N, C] with mean 0 and deviation 1 over the rows `train`.

    A constant column becomes 0.
    """
    centred = numbers - numbers[train].mean(axis=0)
    deviation = centred[train].std(axis=0)
    return centred / np.where(deviation == 0, 1, deviation)
