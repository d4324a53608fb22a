"""Statistics of prepared text: how often each token occurs, and which tokens follow it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.data.dataset import Dataset

_BLOCK = 1 << 20  # tokens read at a time
_COUNTED = 1 << 28  # tokens counted at most: enough to rank a vocabulary by frequency
_PAIRED = 1 << 22  # pairs of tokens counted at most, as they are sorted in memory


class _Block(NamedTuple):
    """A piece of the training text, and how often to count what it holds; 1 unless the data is a mixture."""

    ids: np.ndarray
    weight: float


def _blocks(dataset: Dataset, limit: int) -> Iterator[_Block]:
    """Yields evenly spread blocks of the training text, with about `limit` tokens together.

    In a mixture, each source counts by its share of what the run trains on, and not by its size.
    """
    sources = [source for source in dataset.sources if source.train.tokens]
    spans = [source.train for source in sources]
    step = max(1, sum(math.ceil(span.tokens / _BLOCK) for span in spans) * _BLOCK // limit)
    starts = [range(span.start, span.start + span.tokens, step * _BLOCK) for span in spans]
    # The last block of a source ends where the next source begins.
    sizes = [[min(_BLOCK, span.start + span.tokens - at) for at in found] for span, found in zip(spans, starts)]
    total = sum(map(sum, sizes))
    dataset.train.verify([start for found in starts for start in found], _BLOCK)
    for source, found, of_source in zip(sources, starts, sizes):
        weight = float(source.share) * total / sum(of_source)
        for start, size in zip(found, of_source):
            yield _Block(dataset.train.read(start, size), weight)


def token_counts(dataset: Dataset, vocab_size: int) -> np.ndarray:
    """Counts how often each token occurs in the training text; of a large text, in an evenly spread sample.

    In a mixture, it is how often it would occur in as much text with the mixture's shares, rounded.
    Returns: int64 [V].
    """
    counts = np.zeros(vocab_size)
    for block in _blocks(dataset, _COUNTED):
        counts += block.weight * np.bincount(block.ids, minlength=vocab_size)
    return np.rint(counts).astype(np.int64)


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

    The sources of a mixture count by their shares. Among equally frequent successors, the one with the lowest id is
    taken.
    """
    blocks = list(_blocks(dataset, _PAIRED))
    # A pair of tokens as one number, so that np.unique counts pairs.
    pairs = np.concatenate([block.ids[:-1].astype(np.int64) * vocab_size + block.ids[1:] for block in blocks])
    weights = np.concatenate([np.full(len(block.ids) - 1, block.weight) for block in blocks])
    pair, numbers = np.unique(pairs, return_inverse=True)
    counts = np.bincount(numbers, weights)
    first, second = np.divmod(pair, vocab_size)
    # By first token, and then by falling count. The sort is stable, so among equals the lowest second id comes first.
    order = np.lexsort((-counts, first))
    tokens, most_frequent = np.unique(first[order], return_index=True)
    ids = np.full(vocab_size, -1, np.int32)
    ids[tokens] = second[order][most_frequent]
    return Successors(ids, len(pairs))
