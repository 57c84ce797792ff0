"""Intervals, paired ratios, corrected p values and percentiles, against scipy.stats and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mooncache.errors import UsageError
from sim.statistics import Mean, Ratio, holm, mean_interval, paired_p_value, paired_ratio, percentile

POSITIVE = st.floats(1e-3, 1e3)
PAIRS = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=10)


def test_the_interval_of_five_is_students() -> None:
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx(Mean(3.0, 2.776 * math.sqrt(2.5 / 5)), rel=1e-3)


def test_one_sample_has_a_mean_and_no_interval() -> None:
    assert mean_interval([4.0]) == Mean(4.0, None)
    assert paired_ratio([4.0], [2.0]) == Ratio(2.0, None, None)
    assert paired_p_value([4.0], [2.0]) == 1.0


@given(samples=st.lists(POSITIVE, min_size=2, max_size=20), confidence=st.floats(0.5, 0.99))
def test_intervals_equal_scipys(samples: list[float], confidence: float) -> None:
    mean, half_width = mean_interval(samples, confidence)
    assert half_width is not None
    assert mean == pytest.approx(np.mean(samples))
    if half_width > 1e-9:
        low, high = stats.t.interval(confidence, len(samples) - 1, np.mean(samples), stats.sem(samples))
        assert (mean - half_width, mean + half_width) == pytest.approx((low, high))


@given(samples=st.lists(POSITIVE, min_size=1, max_size=10), factor=st.floats(0.1, 10))
def test_a_constant_factor_is_found_exactly_however_noisy_the_load(samples: list[float], factor: float) -> None:
    ratio, low, high = paired_ratio([factor * sample for sample in samples], samples)
    assert ratio == pytest.approx(factor)
    if low is not None:
        assert (low, high) == pytest.approx((factor, factor))


@given(pairs=PAIRS)
def test_swapping_the_sides_inverts_the_ratio(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    ratio, low, high = paired_ratio(a, b)
    swapped = paired_ratio(b, a)
    assert low is not None
    assert high is not None
    assert low <= ratio <= high
    assert swapped == pytest.approx((1 / ratio, 1 / high, 1 / low))
    assert paired_p_value(a, b) == pytest.approx(paired_p_value(b, a))


@given(pairs=PAIRS)
def test_the_p_value_is_that_of_the_paired_t_test_and_agrees_with_the_interval(
    pairs: list[tuple[float, float]],
) -> None:
    a, b = zip(*pairs, strict=True)
    logs = np.log(a) - np.log(b)
    if np.std(logs) > 1e-6:
        p = paired_p_value(a, b)
        _, low, high = paired_ratio(a, b)
        assert p == pytest.approx(stats.ttest_rel(np.log(a), np.log(b)).pvalue)
        assert low is not None
        assert high is not None
        if abs(p - 0.05) > 1e-9:
            assert (p > 0.05) == (low < 1 < high)


def test_identical_sides_do_not_differ_and_a_constant_factor_surely_does() -> None:
    assert paired_p_value([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]) == 1.0
    assert paired_p_value([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == 0.0


def test_holm_corrects_in_steps_and_keeps_the_order_given() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(p_values=st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, corrected in zip(p_values, adjusted, strict=True):
        assert p <= corrected <= min(1.0, len(p_values) * p) or corrected == max(
            other for q, other in zip(p_values, adjusted, strict=True) if q <= p
        )
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[index] for index in order] == sorted(adjusted)


@given(samples=st.lists(st.integers(-1000, 1000), min_size=1, max_size=50), percent=st.integers(0, 100))
def test_a_percentile_is_the_smallest_sample_that_covers_enough(samples: list[int], percent: int) -> None:
    covering = [s for s in samples if 100 * sum(other <= s for other in samples) >= percent * len(samples)]
    assert percentile(samples, percent) == min(covering)


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 50), (99, 99), (99.9, 100), (100, 100)])
def test_percentiles_of_one_to_a_hundred(percent: float, value: float) -> None:
    assert percentile(np.arange(1, 101), percent) == value


@pytest.mark.parametrize(
    ("a", "b"),
    [([], []), ([1.0], []), ([1.0, 2.0], [1.0]), ([0.0], [1.0]), ([1.0], [-1.0]), ([math.nan], [1.0])],
)
def test_samples_that_cannot_be_compared_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(UsageError, match="expected two equally long rows of numbers above zero"):
        paired_ratio(a, b)


def test_no_samples_and_impossible_percents_are_refused() -> None:
    with pytest.raises(UsageError, match="expected at least one sample"):
        mean_interval([])
    for samples, percent in (([], 50), ([1.0], 101), ([1.0], -1)):
        with pytest.raises(UsageError, match="expected samples and 0 to 100 percent"):
            percentile(samples, percent)
