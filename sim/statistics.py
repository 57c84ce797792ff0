"""Statistics of a handful of replications, and how sure they are.

Replications of two policies share their random streams, so they are compared pair by pair: the arrivals, the
jitter and most of the noise cancel. Compared are log ratios, for "twice as slow" means the same at any load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from mooncache.errors import UsageError

NORMAL = 1.9  # a little less than Student's t at 95 % ever is


class Mean(NamedTuple):
    """A mean over replications; the interval is `mean` plus and minus `half_width`."""

    mean: float
    half_width: float | None  # None: one replication says nothing about its own spread


class Ratio(NamedTuple):
    """A geometric mean of paired ratios, with its interval."""

    ratio: float
    low: float | None  # None: a single pair
    high: float | None


def mean_interval(samples: Sequence[float], confidence: float = 0.95) -> Mean:
    """Return the mean and its Student-t half width, `t(n - 1) * s / sqrt(n)`. Source: Student, Biometrika 6, 1908.

    Raises: UsageError if `samples` is empty.
    """
    mean, error = _mean_and_error(samples)
    if error is None:
        return Mean(mean, None)
    return Mean(mean, float(stdtrit(len(samples) - 1, (1 + confidence) / 2)) * error)


def samples_needed(samples: Sequence[float], half_width: float, confidence: float = 0.95) -> int:
    """Return how many samples that vary like these give an interval of this half width; at least those there are.

    Raises: UsageError for less than two samples, or a half width of 0.
    """
    _, error = _mean_and_error(samples)
    if error is None or half_width <= 0:
        raise UsageError(f"expected two samples or more and a half width above 0, came {samples} and {half_width}")
    n, deviation = len(samples), error * math.sqrt(len(samples))
    while float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n) > half_width:
        n = max(n + 1, math.ceil((NORMAL * deviation / half_width) ** 2))  # Student's t is wider, so not beyond the end
    return n


def paired_ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Return how many times as large `a` is as `b`, from the mean of `log(a[i] / b[i])` and its interval.

    Raises: UsageError unless both have the same number of samples, at least one, all above zero.
    """
    mean, half_width = mean_interval(_log_ratios(a, b), confidence)
    if half_width is None:
        return Ratio(math.exp(mean), None, None)
    return Ratio(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))


def paired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the chance of such a mean log ratio, or one further from zero, if both were alike (paired t test).

    1.0 for a single pair, which can show nothing.
    Raises: UsageError as `paired_ratio` does.
    """
    logs = _log_ratios(a, b)
    mean, error = _mean_and_error(logs)
    if error is None or mean == 0:
        return 1.0
    return 2 * float(stdtr(len(logs) - 1, -abs(mean) / error)) if error else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for having made so many comparisons, in the order given; compare each with 0.05.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scand. J. of Statistics 6, 1979.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def percentile(samples: Sequence[float] | npt.NDArray[np.int64 | np.float64], percent: float) -> float:
    """Return the smallest sample that at least `percent` % of the samples do not exceed (nearest rank).

    Always a value that was observed, never one between two. `percent` runs from 0 (least) to 100 (largest).
    Source: Hyndman and Fan, Sample Quantiles in Statistical Packages, 1996, definition 1.
    Raises: UsageError if `samples` is empty or `percent` out of range.
    """
    if not len(samples) or not 0 <= percent <= 100:
        raise UsageError(f"expected samples and 0 to 100 percent, came {len(samples)} and {percent} percent")
    return float(np.percentile(np.asarray(samples), percent, method="inverted_cdf"))


def _mean_and_error(samples: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error; None for the error of one sample."""
    if not len(samples):
        raise UsageError("expected at least one sample, came none")
    mean = float(np.mean(samples))
    return mean, float(np.std(samples, ddof=1)) / math.sqrt(len(samples)) if len(samples) > 1 else None


def _log_ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    if not 0 < len(a) == len(b) or not all(0 < sample < math.inf for sample in (*a, *b)):
        raise UsageError(f"expected two equally long rows of numbers above zero, came {list(a)} and {list(b)}")
    return [math.log(x / y) for x, y in zip(a, b, strict=True)]
