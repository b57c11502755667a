"""Memory that runs out, or that no machine has."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.runtime.memory import MemoryFullError, check_host_memory, named_when_full


@pytest.mark.parametrize("allocate", [jnp.zeros, np.zeros])
def test_a_device_or_host_without_room_is_an_error_of_ours(allocate):
    expected = r"memory has run out \(.*llocat.*\)\. Use less\."
    with pytest.raises(MemoryFullError, match=expected), named_when_full("Use less."):
        allocate(2**47)


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), named_when_full("Use less."):
        raise ZeroDivisionError


def test_what_is_larger_than_this_machine_is_refused():
    check_host_memory(1, "a byte")
    with pytest.raises(ConfigError, match=r"everything takes .* TB, and this machine has"):
        check_host_memory(2**60, "everything")
