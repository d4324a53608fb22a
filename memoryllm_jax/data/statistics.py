"""What prepared text tells about rows: how often each is needed, and which is likely needed next."""

import numpy as np

from memoryllm_jax.data.dataset import Dataset

_BLOCK = 1 << 20
_COUNTED = 1 << 28  # tokens of the training text, evenly spread: enough to rank a vocabulary
_PAIRED = 1 << 22  # likewise for pairs, which are sorted in memory
SUCCESSORS = 4  # of each token


def _blocks(dataset: Dataset, limit: int):
    pieces = -(-dataset.train.tokens // _BLOCK)
    step = max(1, pieces * _BLOCK // limit)
    return (dataset.train.read(k * _BLOCK, _BLOCK) for k in range(0, pieces, step))


def token_counts(dataset: Dataset, vocab_size: int) -> np.ndarray:
    """int64 [V]: how often each id occurs in the training text, or in an even sample of a large one."""
    counts = np.zeros(vocab_size, np.int64)
    for block in _blocks(dataset, _COUNTED):
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def likely_successors(dataset: Dataset, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(the tokens that most often follow each id, most often first, how many were counted), of an even sample of pairs.

    int32 [V, SUCCESSORS], in which the id itself fills up, and int64 [V].
    """
    pairs = np.concatenate([b[:-1].astype(np.int64) * vocab_size + b[1:] for b in _blocks(dataset, _PAIRED)])
    codes, counts = np.unique(pairs, return_counts=True)
    first, second = codes // vocab_size, codes % vocab_size
    order = np.lexsort((-counts, first))
    first, second = first[order], second[order]
    rank = np.arange(len(first)) - np.searchsorted(first, first)
    out = np.repeat(np.arange(vocab_size, dtype=np.int32)[:, None], SUCCESSORS, 1)
    top = rank < SUCCESSORS
    out[first[top], rank[top]] = second[top]
    return out, np.bincount(first, counts[order], vocab_size).astype(np.int64)
