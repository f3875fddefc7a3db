"""The scores of an evaluation that are more than sums over its rows."""

import numpy as np


def label_scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """``f1_micro`` and ``f1_macro`` of labels (rows, labels), 0 or 1: 2 · both / (true + predicted), or 0 for 0 / 0."""
    wanted, found = true.astype(bool), predicted.astype(bool)
    both, either = (wanted & found).sum(0), wanted.sum(0) + found.sum(0)
    f1 = 2 * both / np.maximum(either, 1)
    return {"f1_micro": float(2 * both.sum() / max(either.sum(), 1)), "f1_macro": float(f1.mean())}


def number_scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """``rmse``, ``mae``, ``r2``, ``pearson`` and ``spearman`` of numbers (rows,), fp64.

    The last three are left out where they are 0 / 0: of true numbers that are all the same, and the correlations also
    of predicted ones.
    """
    error = predicted - true
    found = {"rmse": float(np.sqrt(np.mean(error**2))), "mae": float(np.mean(np.abs(error)))}
    if not np.isfinite(error).all() or np.ptp(true) == 0:
        return found
    found["r2"] = float(1 - np.sum(error**2) / np.sum((true - true.mean()) ** 2))
    if np.ptp(predicted) == 0:
        return found
    ranks = _ranks(true), _ranks(predicted)
    return found | {
        "pearson": float(np.corrcoef(true, predicted)[0, 1]),
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value in their order; of equal ones the mean of their places."""
    _, number, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[number]
