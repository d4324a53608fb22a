"""Statistics of prepared text: how often each token occurs, and which tokens follow it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.data.dataset import Dataset

_BLOCK = 1 << 20  # tokens read at a time
_COUNTED = 1 << 28  # tokens counted at most: enough to rank a vocabulary by frequency
_PAIRED = 1 << 22  # pairs of tokens counted at most, as they are sorted in memory


def _blocks(dataset: Dataset, limit: int) -> Iterator[np.ndarray]:
    """Yields evenly spread blocks of the training text, int32 [_BLOCK], with about `limit` tokens together."""
    count = math.ceil(dataset.train.tokens / _BLOCK)
    step = max(1, count * _BLOCK // limit)
    starts = range(0, count * _BLOCK, step * _BLOCK)
    dataset.train.verify(starts, _BLOCK)
    for start in starts:
        yield dataset.train.read(start, _BLOCK)


def token_counts(dataset: Dataset, vocab_size: int) -> np.ndarray:
    """Counts how often each token occurs in the training text; of a large text, in an evenly spread sample.

    Returns: int64 [V].
    """
    counts = np.zeros(vocab_size, np.int64)
    for block in _blocks(dataset, _COUNTED):
        counts += np.bincount(block, minlength=vocab_size)
    return counts


class Successors(NamedTuple):
    """The token that most often follows each token.

    Attributes:
      ids: int32 [V], -1 for a token that nothing follows.
      pairs: number of token pairs that were counted.
    """

    ids: np.ndarray
    pairs: int


def likely_successors(dataset: Dataset, vocab_size: int) -> Successors:
    """Finds the most frequent successor of each token, in an evenly spread sample of the training text.

    Among equally frequent successors, the one with the lowest id is taken.
    """
    # A pair of tokens as one number, so that np.unique counts pairs.
    pairs = np.concatenate(
        [block[:-1].astype(np.int64) * vocab_size + block[1:] for block in _blocks(dataset, _PAIRED)]
    )
    pair, counts = np.unique(pairs, return_counts=True)
    first, second = np.divmod(pair, vocab_size)
    # By first token, and then by falling count. The sort is stable, so among equals the lowest second id comes first.
    order = np.lexsort((-counts, first))
    tokens, most_frequent = np.unique(first[order], return_index=True)
    ids = np.full(vocab_size, -1, np.int32)
    ids[tokens] = second[order][most_frequent]
    return Successors(ids, len(pairs))
