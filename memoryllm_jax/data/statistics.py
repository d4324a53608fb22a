"""Statistics of prepared text: how often each token occurs, and which tokens follow it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.data.dataset import Dataset

_BLOCK = 1 << 20  # tokens read at a time
_COUNTED = 1 << 28  # tokens of the training text, evenly spread: enough to rank a vocabulary
_PAIRED = 1 << 22  # likewise for pairs of tokens, which are sorted in memory
SUCCESSORS = 4  # kept of each token


def _blocks(dataset: Dataset, limit: int) -> Iterator[np.ndarray]:
    """Blocks of the training text, evenly spread, of about `limit` tokens together."""
    count = -(-dataset.train.tokens // _BLOCK)
    step = max(1, count * _BLOCK // limit)
    for number in range(0, count, step):
        yield dataset.train.read(number * _BLOCK, _BLOCK)


def token_counts(dataset: Dataset, vocab_size: int) -> np.ndarray:
    """int64 [V]: how often each id occurs in the training text, or in an even sample of a large one."""
    counts = np.zeros(vocab_size, np.int64)
    for block in _blocks(dataset, _COUNTED):
        counts += np.bincount(block, minlength=vocab_size)
    return counts


class Successors(NamedTuple):
    """Tokens that follow each token.

    Attributes:
      ids: int32 [V, SUCCESSORS], most frequent first; the token itself stands where there are fewer.
      pairs: int64 [V], how many pairs that begin with the token were counted.
    """

    ids: np.ndarray
    pairs: np.ndarray


def likely_successors(dataset: Dataset, vocab_size: int) -> Successors:
    """Counted in an even sample of the pairs of the training text."""
    pairs = np.concatenate(
        [block[:-1].astype(np.int64) * vocab_size + block[1:] for block in _blocks(dataset, _PAIRED)]
    )
    pair, counts = np.unique(pairs, return_counts=True)
    first, second = np.divmod(pair, vocab_size)
    order = np.lexsort((-counts, first))  # by first token, then the most frequent pair
    first, second, counts = first[order], second[order], counts[order]
    rank = np.arange(len(first)) - np.searchsorted(first, first)  # among the pairs of the same first token
    ids = np.repeat(np.arange(vocab_size, dtype=np.int32)[:, None], SUCCESSORS, 1)
    kept = rank < SUCCESSORS
    ids[first[kept], rank[kept]] = second[kept]
    return Successors(ids, np.bincount(first, counts, vocab_size).astype(np.int64))
