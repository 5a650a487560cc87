"""What rows hold, as a few numbers that do not depend on their order; taken by the executors, block by block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spark_nn.columns import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Fingerprint:
    """What rows hold.

    Every row is hashed to 64 bits. Added up, the hashes do not depend on the rows' order; the exclusive or alone
    would not notice a row that comes twice more.

    Parameters
    ----------
    rows : int
        Number of rows, those that cannot be used included.
    xor : int
        Exclusive or of the hashes.
    total : int
        Their sum, modulo 2**64.
    """

    rows: int = 0
    xor: int = 0
    total: int = 0

    def __add__(self, other: Fingerprint) -> Fingerprint:
        return Fingerprint(self.rows + other.rows, self.xor ^ other.xor, (self.total + other.total) & _MASK)

    @classmethod
    def of(cls, hashes: np.ndarray, rows: int) -> Fingerprint:
        """The fingerprint of rows with the given hashes, of so many rows in all."""
        return cls(rows, int(np.bitwise_xor.reduce(hashes)), int(hashes.sum()))


def hash_rows(block: dict[str, np.ndarray], tensors: Sequence[Tensor]) -> np.ndarray:
    """A hash of each row of a block.

    Rows are taken as 32-bit words, each multiplied by a random number of 64 bits, and added up [1]_: two rows that
    differ get different sums but for one pair in 2**32 or fewer, wherever they differ. The finish makes sums of hashes
    as telling as the hashes.

    Parameters
    ----------
    block : dict of str to numpy.ndarray
        Arrays of shape ``(rows,) + shape``.
    tensors : sequence of Tensor
        Which of them to hash, in order.

    Returns
    -------
    numpy.ndarray of uint64
        Shape ``(rows,)``.

    References
    ----------
    .. [1] M. Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer arithmetic
       without primes", STACS 1996, 569-580.
    """
    hashes = np.zeros(len(next(iter(block.values()))), np.uint64)
    for place, tensor in enumerate(tensors):
        words = _words(block[tensor.name], tensor)
        # Their shape is part of what rows hold.
        hashes += np.einsum("ij,j->i", words, _multipliers((place, *block[tensor.name].shape[1:]), words.shape[1]))
    return mix(hashes)


def mix(values: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits, each spread over all of its bits: the finalizer of MurmurHash3."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    result: np.ndarray = values ^ (values >> np.uint64(33))
    return result


def _words(block: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The rows of a block as 32-bit words, shape ``(rows, words)``."""
    flat = np.ascontiguousarray(block).reshape(len(block), -1)
    if not tensor.numeric:
        flat = pd.util.hash_array(flat.reshape(-1), categorize=False).reshape(flat.shape)
    return flat.view(np.uint32) if flat.itemsize % 4 == 0 else flat.astype(np.uint32)


@functools.lru_cache(maxsize=64)
def _multipliers(seed: tuple[int, ...], words: int) -> np.ndarray:
    """Random numbers, always the same for a seed."""
    return np.random.default_rng(seed).integers(0, 2**64, words, dtype=np.uint64)
