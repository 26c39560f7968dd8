"""Limits are checked when they are made."""

import math

import pytest

from federated.errors import ConfigError
from federated.wire import DEFAULT_LIMITS, Limits


@pytest.mark.parametrize("name", ["max_bytes", "max_header_bytes", "max_tensors"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_size_that_is_no_positive_integer_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"limit {name} is"):
        Limits(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_norm_that_bounds_nothing_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="limit max_norm is"):
        Limits(max_norm=value)


def test_the_defaults_set_no_norm_bound() -> None:
    assert DEFAULT_LIMITS.max_norm == 0.0
