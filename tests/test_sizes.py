"""Sizes are read with their units, and what is no size is refused."""

from __future__ import annotations

import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80e9),
        ("1.5 GiB", 1.5 * 2**30),
        ("25MiB", 25 * 2**20),
        ("3 kB", 3000),
        ("2TB", 2e12),
        ("7B", 7),
        (12, 12),
    ],
)
def test_units_are_powers_of_1000_or_1024(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["lots", "", "0", "-1GB", "5 XB", "1GiBs", "1 i", "0.1B", "nan", "25Mib"]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="memory: expected a positive size such as 80GB"):
        parse_size(text, what="memory")


def test_a_number_without_a_unit_can_be_refused():
    with pytest.raises(ConfigError, match="such as 80GB"):
        parse_size("80", needs_unit=True)


@pytest.mark.parametrize("count", [1, 999, 1000, 123_456, 7_890_000_000, 3 * 10**12, 10**16])
def test_a_written_size_is_read_again(count):
    assert parse_size(format_size(count).replace(",", "")) == pytest.approx(count, rel=0.005)
