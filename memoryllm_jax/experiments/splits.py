"""Groups of held-out targets, whose losses show where a token memory helps.

Targets are grouped by how often their input or they themselves occur in the training text, by their position in the
window, and by whether the token before them gives them away.
"""

from typing import NamedTuple

import numpy as np

from memoryllm_jax.data import statistics
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments.heldout import HeldOutText

_TENTHS = 10


class Split(NamedTuple):
    """One way to group the targets.

    Attributes:
      name: for files, such as "input".
      label: what the groups are, for axes and captions.
      groups: their labels, in order.
      group_N: number of the group of each target.
    """

    name: str
    label: str
    groups: tuple[str, ...]
    group_N: np.ndarray

    def by_document(self, values_N: np.ndarray, text: HeldOutText) -> np.ndarray:
        """Sums over the targets of each group and document, float64 [groups, D]."""
        documents = len(text.bytes_D)
        cells = len(self.groups) * documents
        sums = np.bincount(self.group_N * documents + text.document_N, values_N, cells)
        return sums.reshape(len(self.groups), documents)


def of_text(text: HeldOutText, data: Dataset) -> list[Split]:
    """All splits of a held-out text.

    Args:
      data: whose training text says how frequent tokens are, and which tokens follow which.
    """
    counts_V = statistics.token_counts(data, data.vocab_size)
    successors_V = statistics.likely_successors(data, data.vocab_size).ids
    return [
        by_frequency("input", text.inputs, counts_V),
        by_frequency("target", text.targets, counts_V),
        by_position(text.position_N),
        by_bigram(text, successors_V),
    ]


def tenths(counts_V: np.ndarray) -> np.ndarray:
    """The tenth of the training text that each token makes up, from the rarest tokens, 0, to the most frequent, 9.

    Tokens in rising order of frequency are cut where their counts add up to a tenth, so that every tenth has about as
    many targets. One token may make up more than a tenth, so that a tenth may be empty.

    Args:
      counts_V: how often each token occurs.
    """
    order = np.argsort(counts_V, kind="stable")
    up_to = np.cumsum(counts_V[order])
    middle = up_to - counts_V[order] / 2  # of the stretch of text that a token would fill
    tenth_V = np.empty(len(counts_V), np.int64)
    tenth_V[order] = np.minimum(middle * _TENTHS // max(up_to[-1], 1), _TENTHS - 1)
    return tenth_V


def by_frequency(which: str, ids_N: np.ndarray, counts_V: np.ndarray) -> Split:
    """Groups targets by how often a token occurs in the training text.

    Args:
      which: "input" or "target": the token that `ids_N` holds for each target.
    """
    names = ["rarest", *map(str, range(2, _TENTHS)), "most frequent"]
    return Split(
        which, f"tenth of the training text by frequency of the {which}", tuple(names), tenths(counts_V)[ids_N]
    )


def by_position(position_N: np.ndarray) -> Split:
    """Groups targets by the number of tokens of the window that they are predicted from: 1, 2, 3 to 4, 5 to 8, ..."""
    # position + 1 tokens; the group is the logarithm of that number, rounded up.
    group_N = np.ceil(np.log2(position_N + 1)).astype(np.int64)
    names = ["1", "2", *(f"{2 ** (k - 1) + 1}-{2**k}" for k in range(2, group_N.max() + 1))]
    return Split("position", "tokens before the target in its window", tuple(names[: group_N.max() + 1]), group_N)


def by_bigram(text: HeldOutText, successors_V: np.ndarray) -> Split:
    """Groups targets by whether they are the token that most often follows their input in the training text."""
    group_N = (text.targets == successors_V[text.inputs]).astype(np.int64)
    label = "whether the target is the most frequent successor of its input"
    return Split("bigram", label, ("depends on more context", "most frequent successor"), group_N)
