"""The order of an epoch: a permutation that a seed and a number decide, in every version alike.

A block cipher permutes the numbers of so many bits; walking on from a number that is too large
until one is not permutes those below a bound (Black and Rogaway, *Ciphers with Arbitrary Finite
Domains*, 2002). The cipher is four rounds of Simon (Beaulieu et al., *The Simon and Speck Families
of Lightweight Block Ciphers*, 2013) with keys from C++'s ``std::seed_seq``. That is the order of
Grain's ``MapDataset.range(size).seed(seed).shuffle().repeat()``, which runs have had from the
beginning, and which Grain does not promise to keep.
"""

from __future__ import annotations

import numpy as np

__all__ = ["epoch_order"]

_WORD = 2**32 - 1
_ROUNDS = 4


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch shows things.

    Args:
      size: how many there are.
      seed: any integer from 0.
      epoch: from 0.

    Returns:
      Integers [size], every number below `size` once.

    Example:
      >>> epoch_order(5, seed=0, epoch=0).tolist(), epoch_order(5, seed=0, epoch=1).tolist()
      ([1, 2, 4, 0, 3], [0, 3, 1, 4, 2])
    """
    derived = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
    bits = max((size - 1).bit_length(), 16)
    after = _encrypted(bits + bits % 2, _keys((derived + epoch) & _WORD))
    # Each number leads to one on its cycle with none below `size` between: twice as far every time.
    while (after[:size] >= size).any():
        after = np.where(after < size, after, after[after])
    return after[:size]


def _encrypted(bits: int, keys: list[int]) -> np.ndarray:
    """All numbers of an even number of bits, each encrypted by Simon's rounds: [2**bits]."""
    half = bits // 2
    mask = (1 << half) - 1

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return ((x << by) | (x >> (half - by))) & mask

    numbers = np.arange(1 << bits, dtype=np.int32 if bits < 31 else np.int64)
    left, right = numbers >> half, numbers & mask
    for key in keys:
        mixed = (rotated(right, 1) & rotated(right, 8)) ^ rotated(right, 2)
        left, right = right, left ^ mixed ^ (key & mask)
    return (left << half) | right


def _keys(seed: int) -> list[int]:
    """The cipher's keys: what ``std::seed_seq{seed}`` generates, for as many words as rounds."""
    words, n = [0x8B8B8B8B] * _ROUNDS, _ROUNDS
    for k in range(2 * n):
        here, first, second, before = k % n, (k + 1) % n, (k + 2) % n, (k - 1) % n
        if k < n:
            x = words[here] ^ words[first] ^ words[before]
            one = 1664525 * (x ^ (x >> 27)) & _WORD
            # The number of seeds comes first, then each with its number.
            two = (one + (1 if k == 0 else k + seed if k == 1 else k)) & _WORD
            words[first] = (words[first] + one) & _WORD
            words[second] = (words[second] + two) & _WORD
        else:
            x = (words[here] + words[first] + words[before]) & _WORD
            one = 1566083941 * (x ^ (x >> 27)) & _WORD
            two = (one - here) & _WORD
            words[first] ^= one
            words[second] ^= two
        words[here] = two
    return words
