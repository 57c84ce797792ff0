"""Figures for people: three digits, and no more decimals than mean something."""

from __future__ import annotations


def count(n: int) -> str:
    """Format a count in four characters or so."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}" if n < 999.5 * size else f"{n / size:,.0f}{unit}"
    return str(n)


def figure(value: float, decimals: int = 2) -> str:
    """Format a figure in three digits or four, and at most so many decimals: "0.73", "22.1", "571", "3.09M"."""
    if abs(value) >= 9999.5:
        return ("-" if value < 0 else "") + count(round(abs(value)))
    fits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    decimals = min(fits, decimals)
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"


def interval(mean: float, half_width: float | None) -> str:
    """Format a mean with its interval, in the mean's precision: "378 ±50"."""
    decimals = 0 if abs(mean) >= 99.95 else 1
    text = figure(mean, decimals)
    if half_width is None:
        return text
    return f"{text} ±{figure(half_width) if half_width >= 9999.5 else f'{half_width:,.{decimals}f}'}"
