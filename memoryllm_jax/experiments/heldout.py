"""The held-out text that all runs of a vocabulary are scored on.

Its targets and windows are the same for all runs, so that differences between them can be taken document by document.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from memoryllm_jax.data import document_starts
from memoryllm_jax.data.dataset import Dataset


class HeldOutText(NamedTuple):
    """The held-out text of one vocabulary, cut into windows. Its N targets are all its tokens but the first.

    Attributes:
      ids: token ids, int32 [N + 1]; target n is ids[n + 1], and the token before it, ids[n], is its input.
      document_N: number of the document that each target is in, from 0.
      position_N: number of tokens before each target's input in its window.
      bytes_D: bytes of text of each document.
      digest: SHA-256 of ids and context, by which files of scores name the text.
    """

    ids: np.ndarray
    document_N: np.ndarray
    position_N: np.ndarray
    bytes_D: np.ndarray
    digest: str

    @property
    def inputs(self) -> np.ndarray:
        """Ids that the targets are predicted after, int32 [N]."""
        return self.ids[:-1]

    @property
    def targets(self) -> np.ndarray:
        """Ids of the targets, int32 [N]."""
        return self.ids[1:]

    def by_document(self, values_N: np.ndarray) -> np.ndarray:
        """Sums over the targets of each document, float64 [D]."""
        return np.bincount(self.document_N, values_N, len(self.bytes_D))


def open_text(data: Dataset, context: int) -> HeldOutText:
    """Reads the whole validation split of prepared data.

    Args:
      context: tokens that are predicted in a window.
    Raises: UserError if the data is damaged, or its documents do not show where they begin.
    """
    stream = data.validation
    stream.verify([0], stream.tokens)
    ids = stream.read(0, stream.tokens)
    # A target belongs to the document of its input: the last one of a document is the id that ends it.
    begins = ids[:-1] == document_starts.first_id(data, data.path, "data")
    document_N = np.cumsum(begins, dtype=np.int64)
    document_N -= document_N[0]
    digest = hashlib.sha256(ids.astype("<i4").tobytes() + context.to_bytes(8, "little")).hexdigest()
    return HeldOutText(ids, document_N, np.arange(len(ids) - 1) % context, _bytes(ids, document_N, data), digest)


def _bytes(ids: np.ndarray, document_N: np.ndarray, data: Dataset) -> np.ndarray:
    """Bytes of text of each document, which add up to those of the split, float64 [D]."""
    tokenizer = data.tokenizer()
    special = [i for i in (data.bos_id, data.eos_id) if i is not None]
    documents = np.split(ids[1:], np.flatnonzero(np.diff(document_N)) + 1)
    sizes_D = [len(tokenizer.decode(piece[~np.isin(piece, special)]).encode()) for piece in documents]
    # The text was decoded from tokens of a tokenizer that may normalise, for example white space. The sizes of the
    # documents as they were given are known in sum, so that bits per byte do not depend on the tokenizer.
    return np.array(sizes_D) * (data.validation.bytes / max(sum(sizes_D), 1))
