"""Figures for people: three digits, four at most, whatever their size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.figures import count, figure, interval


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (-0.001, "0.00"), (0.729, "0.73"), (22.14, "22.1"), (571.4, "571"), (1234.5, "1,234"),
     (9.999, "10.0"), (99.96, "100"), (9999.4, "9,999"), (9999.6, "10k"), (3086153.0, "3.09M"), (-12345.0, "-12.3k")],
)  # fmt: skip
def test_figures_have_three_digits_and_no_more_than_four(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [(3.64, 0.0, "3.6 ±0.0"), (378.1, 50.2, "378 ±50"), (0.0, None, "0.0"), (3086153.0, 2093.0, "3.09M ±2,093"),
     (12.0, 123_456.0, "12.0 ±123k")],
)  # fmt: skip
def test_an_interval_is_as_precise_as_its_mean(mean: float, half_width: float | None, text: str) -> None:
    assert interval(mean, half_width) == text


@given(st.floats(-1e15, 1e15), st.floats(0, 1e15), st.integers(0, 10**15))
def test_they_fit_into_their_columns(value: float, half_width: float, n: int) -> None:
    assert len(figure(abs(value))) <= 5 + (abs(value) > 9e14)
    assert len(interval(value, half_width)) <= 15
    assert len(count(n)) <= 5 + (n > 9e14)
