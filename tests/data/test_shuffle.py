"""The order of an epoch: a permutation, always the same one."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from jaxmoo.data.shuffle import epoch_order


# Among them sizes around those at which the cipher needs more bits.
@pytest.mark.parametrize("size", [1, 2, 3, 97, 65_535, 65_536, 65_537, 65_538, 262_145])
def test_an_epoch_has_everything_once(size):
    for seed, epoch in ((0, 0), (2**31 - 1, 5)):
        assert (np.bincount(epoch_order(size, seed, epoch), minlength=size) == 1).all()


def test_orders_never_change():
    """Pinned: runs that are resumed go on in the order in which they began (that of Grain 0.2)."""
    assert epoch_order(7, 0, 0).tolist() == [1, 2, 4, 5, 3, 6, 0]
    orders = [epoch_order(n, s, e) for n in (40, 1000, 70_000) for s in (1, 99) for e in (0, 3)]
    digest = hashlib.sha256(np.concatenate(orders).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "25e57f57258bb84d"
    assert len({tuple(order[:9]) for order in orders}) == len(orders)
