"""Means of tokens, with errors that know that tokens of one document are alike.

A ratio m = sum x / sum w over all tokens has, over C documents that are drawn independently, the variance

    C / (C - 1) * sum_c (sum_{i in c} x_i - m w_i)^2 / (sum w)^2

(the linearised variance of a ratio, "cluster-robust"). With w = 1 it is the mean over tokens. With fewer than two
documents nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
"""Of a bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """Of a ratio."""

    value: float | None
    """None where there is nothing to divide by."""
    error: float | None
    """One standard error; None with fewer than two clusters."""
    count: int
    """Of the terms."""
    clusters: int


def ratio(over: np.ndarray, under: np.ndarray, clusters: np.ndarray) -> Estimate:
    """sum(over) / sum(under) with its clustered error. All (n,)."""
    weight = float(under.sum())
    _, numbers = np.unique(clusters, return_inverse=True)
    count = int(numbers.max()) + 1 if len(numbers) else 0
    if not weight:
        return Estimate(None, None, len(over), count)
    value = float(over.sum()) / weight
    if count < 2:
        return Estimate(value, None, len(over), count)
    residuals = np.bincount(numbers, weights=over - value * under, minlength=count)
    variance = count / (count - 1) * float((residuals**2).sum()) / weight**2
    return Estimate(value, variance**0.5, len(over), count)


def mean(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The mean of values (n,)."""
    return ratio(values, np.ones(len(values)), clusters)


def bootstrap_ratio(over: Sequence[int], under: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of sum(over) / sum(under) when the pairs are drawn anew with replacement, DRAWS times."""
    drawn = np.random.default_rng(seed).integers(len(over), size=(DRAWS, len(over)))
    ratios = np.asarray(over)[drawn].sum(1) / np.asarray(under)[drawn].sum(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
