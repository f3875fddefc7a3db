"""Intervals of 95 %: over seeds by Student's t, over texts by the bootstrap, and over both."""

import base64
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLED = 10_000


class Interval(NamedTuple):
    """A mean and half the width of its interval; infinite for one value."""

    mean: float
    half: float


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of n values, and t(0.975, n − 1) standard errors of it."""
    count = len(values)
    if count < 2:
        return Interval(float(np.mean(values)), float("inf"))
    return Interval(
        float(np.mean(values)), float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    )


def over_texts(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The interval of the difference of two accuracies on the same texts, right (seeds, N) of each.

    What a text contributes is the difference of how often it is right over seeds; texts are drawn with replacement.
    """
    difference = ours.mean(0) - theirs.mean(0)
    # A sum over drawn texts depends only on how often each value was drawn: a multinomial over the few values.
    values, counts = np.unique(difference, return_counts=True)
    total = len(difference)
    drawn = np.random.default_rng(0).multinomial(total, counts / total, RESAMPLED) @ values / total
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def over_both(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """The difference of two accuracies, right (seeds, N) of each, if other seeds and other texts had been drawn.

    Both variances of the mean, added; Student's t with the degrees of freedom of the sum (Satterthwaite 1946).
    """
    difference = ours.astype(float) - theirs
    terms = [(len(of), np.var(of, ddof=1) / len(of)) for of in (difference.mean(1), difference.mean(0))]
    total = sum(variance for _, variance in terms)
    if not total:
        return Interval(float(difference.mean()), 0.0)
    freedom = total**2 / sum(variance**2 / (count - 1) for count, variance in terms)
    return Interval(float(difference.mean()), float(stats.t.ppf(0.975, freedom) * np.sqrt(total)))


def packed(right: np.ndarray) -> str:
    """Which texts are right, (N,) bool, as the CSV's column."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(right: str, count: int) -> np.ndarray:
    """Which of ``count`` texts are right, (N,) bool, from the CSV's column.

    Raises:
        ValueError: the column is of another number of texts.
    """
    found = np.frombuffer(base64.b64decode(right), np.uint8)
    if len(found) != -(-count // 8):  # numpy would fill up with zeros: with wrong answers
        raise ValueError(f"right: expected {-(-count // 8)} bytes for {count} texts, got {len(found)}")
    return np.unpackbits(found, count=count).astype(bool)
