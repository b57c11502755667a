"""How near arrays are to what they should be."""

from __future__ import annotations

from typing import Any

import numpy as np


def relative_error(found: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
