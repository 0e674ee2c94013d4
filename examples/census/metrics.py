"""How good predictions are: area under the ROC curve, and explained variance."""

from __future__ import annotations

import numpy as np


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the chance that a positive row scores above a negative one, ties counting half.

        AUC = (sum of the positives' ranks - P (P + 1) / 2) / (P N)

    Tied scores share the mean of their ranks.

    Args:
        scores: [rows], finite.
        labels: [rows], 0 or 1.
    Raises: ValueError for scores that are not finite, or labels of one kind only.
    """
    positive = np.asarray(labels) > 0.5
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        raise ValueError(f"labels: expected both positives and negatives, got {positives} and {negatives}")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores: expected finite numbers, got {int((~np.isfinite(scores)).sum())} that are not")
    _, group, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    return float((rank[group][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def explained_variance(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Return R^2 = 1 - sum (y - prediction)^2 / sum (y - mean y)^2.

    Raises: ValueError for targets that are all alike.
    """
    spread = float(((targets - targets.mean()) ** 2).sum())
    if spread == 0:
        raise ValueError("targets: expected numbers that differ, got one value only")
    return 1.0 - float(((targets - predictions) ** 2).sum()) / spread
