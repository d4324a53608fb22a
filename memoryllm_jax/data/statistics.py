"""Statistics of prepared text: how often each token occurs, and which tokens follow it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.data.dataset import Dataset

_BLOCK = 1 << 20  # tokens read at a time
_COUNTED = 1 << 28  # tokens of the training text, evenly spread: enough to rank a vocabulary
_PAIRED = 1 << 22  # likewise for pairs of tokens, which are sorted in memory


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
    """The token that most often follows each token.

    Attributes:
      ids: int32 [V], -1 for a token that nothing follows.
      pairs: how many pairs of tokens were counted.
    """

    ids: np.ndarray
    pairs: int


def likely_successors(dataset: Dataset, vocab_size: int) -> Successors:
    """Counted in an even sample of the pairs of the training text; of equally frequent ones the lowest id."""
    pairs = np.concatenate(
        [block[:-1].astype(np.int64) * vocab_size + block[1:] for block in _blocks(dataset, _PAIRED)]
    )
    pair, counts = np.unique(pairs, return_counts=True)
    first, second = np.divmod(pair, vocab_size)
    order = np.lexsort((-counts, first))  # by first token, then the most frequent pair
    tokens, most_frequent = np.unique(first[order], return_index=True)
    ids = np.full(vocab_size, -1, np.int32)
    ids[tokens] = second[order][most_frequent]
    return Successors(ids, len(pairs))
