"""Quantities: exact, with a unit, or refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncache.errors import UsageError
from sim.units import BIT_RATE, BYTES, DURATION, EVENT_RATE, FLOP_RATE, Dimension, format_duration, parse_tokens

ALL = (DURATION, BYTES, BIT_RATE, EVENT_RATE, FLOP_RATE)


@pytest.mark.parametrize(
    ("dimension", "text", "value"),
    [
        (DURATION, "10ps", 10),
        (DURATION, "90ns", 90_000),
        (DURATION, "1.5us", 1_500_000),
        (DURATION, "3ms", 3 * 10**9),
        (DURATION, "2s", 2 * 10**12),
        (DURATION, "0.1ns", 100),  # binary floating point would have 100.00000000000001
        (DURATION, "0s", 0),
        (BYTES, "512B", 512),
        (BYTES, "64KiB", 65536),
        (BYTES, "1MB", 10**6),
        (BYTES, "2 GiB", 2 << 30),
        (BIT_RATE, "400Gbps", 400 * 10**9),
        (BIT_RATE, "97.5Gbps", 97_500_000_000),
        (EVENT_RATE, "200M/s", 200 * 10**6),
        (EVENT_RATE, "2.6M/s", 2_600_000),
        (FLOP_RATE, "990T", 990 * 10**12),
    ],
)
def test_quantities_are_exact_integers_of_the_base_unit(dimension: Dimension, text: str, value: int) -> None:
    assert dimension.parse(text) == value


@pytest.mark.parametrize(
    ("dimension", "text", "value"),
    [
        (BIT_RATE, "200gbps", 200 * 10**9),
        (BIT_RATE, "200GBPS", 200 * 10**9),
        (BYTES, "64kib", 65536),
        (BYTES, "64KIB", 65536),
        (DURATION, "3MS", 3 * 10**9),
        (EVENT_RATE, "200m/s", 200 * 10**6),
        (FLOP_RATE, "990t", 990 * 10**12),
    ],
)
def test_units_may_be_in_small_or_in_capital_letters(dimension: Dimension, text: str, value: int) -> None:
    assert dimension.parse(text) == value


@pytest.mark.parametrize("text", ["64Kb", "1Mb", "1kB", "1mIb"])
def test_in_mixed_case_a_unit_is_taken_as_it_is_written(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size such as '64KiB'"):
        BYTES.parse(text)


@pytest.mark.parametrize(
    ("text", "tokens"), [("12500", 12500), ("8k", 8192), ("128K", 131_072), ("1M", 1 << 20), (8192, 8192)]
)
def test_tokens_are_written_as_context_lengths_are(text: object, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("value", ["12.5k", "8kk", "-8k", "k", "", None, 1.5])
def test_what_is_no_number_of_tokens_is_left_for_others_to_refuse(value: object) -> None:
    assert parse_tokens(value) == value


@pytest.mark.parametrize("dimension", ALL)
@pytest.mark.parametrize(
    "value",
    [5, 5.0, True, None, [], "", "5", "ns", "5 parsecs", "-5ns", "1e3ns", "5ns5", "٥ns", " 5ns", "5  ns"],
)
def test_what_is_no_quantity_is_refused_with_an_example(dimension: Dimension, value: object) -> None:
    with pytest.raises(UsageError, match=r"expected .* such as") as caught:
        dimension.parse(value)
    assert repr(dimension.example) in str(caught.value)


@pytest.mark.parametrize(
    ("dimension", "text", "reason"),
    [
        (DURATION, "0.5ps", "in whole picoseconds"),
        (EVENT_RATE, "3.4/s", "in whole events a second"),
        (BYTES, "0.3KiB", "in whole bytes"),
        (DURATION, "2000000s", "from 0 to"),
        (BYTES, "0B", "from 1 to"),
        (BIT_RATE, "0Gbps", "from 1 to"),
        (BYTES, "9999999999GiB", "to 9223372036854775807 bytes"),
    ],
)
def test_what_would_be_rounded_or_overflow_is_refused(dimension: Dimension, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        dimension.parse(text)


@pytest.mark.parametrize("dimension", [DURATION, BYTES, BIT_RATE, EVENT_RATE])
@given(value=st.integers(1, 86_400 * 10**12))
def test_spelling_and_parsing_are_inverse(dimension: Dimension, value: int) -> None:
    assert dimension.parse(dimension.spell(value)) == value


@given(value=st.decimals(0, 10_000, places=3))
def test_decimals_are_scaled_without_rounding(value: object) -> None:
    assert DURATION.parse(f"{value}ms") == Fraction(str(value)) * 10**9


@pytest.mark.parametrize(
    ("ps", "text"),
    [
        (0, "0 ps"),
        (10, "10.0 ps"),
        (10_240, "10.2 ns"),
        (1_500_000, "1.50 us"),
        (-240 * 10**9, "-240 ms"),
        (3_537 * 10**12, "3537 s"),
        (0.25, "0.25 ps"),
    ],
)
def test_durations_for_people_have_three_digits(ps: float, text: str) -> None:
    assert format_duration(ps) == text
