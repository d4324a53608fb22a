"""Rows of bigrams: which row of a table a position reads by its token and the one before.

The hash is that of modded-nanogpt's bigram embedding (https://github.com/KellerJordan/modded-nanogpt/pull/201). Tables
that are looked up by hashed n-grams are also the subject of Huang et al. 2025 (Over-Tokenized Transformer, arXiv
2501.16975) and Cheng et al. 2026 (Engram, arXiv 2601.07372).

Shapes: B sequences, T positions, U distinct pairs of a token and a row.
"""

import numpy as np


def row_ids(ids_BT: np.ndarray, size: int, is_first_BT: np.ndarray | None = None) -> np.ndarray:
    """The row that each position reads, int32 [B, T].

    Args:
      ids_BT: token ids.
      size: rows of the table. The last one is that of positions without a token before.
      is_first_BT: whether a position is the first of its document; None: only the first of each sequence is.
    """
    ids_BT = ids_BT.astype(np.uint32)  # products wrap
    found_BT = np.full(ids_BT.shape, size - 1, np.int32)
    found_BT[:, 1:] = (36313 * ids_BT[:, 1:] ^ 27191 * ids_BT[:, :-1]) % (size - 1)
    if is_first_BT is not None:
        found_BT[is_first_BT] = size - 1
    return found_BT


def distinct(ids: np.ndarray, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [U], rows [U], the place of each position's pair among them, of the shape of `ids`), all int32."""
    pairs, place = np.unique(ids.astype(np.int64) << 32 | row_ids, return_inverse=True)
    return (pairs >> 32).astype(np.int32), pairs.astype(np.int32), place.reshape(ids.shape).astype(np.int32)
