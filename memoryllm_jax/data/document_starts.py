"""Where documents begin in windows of a stream of tokens, for config.data.document_mask. No JAX.

The training text is a stream of documents, cut into windows of seq_len wherever they fall. Without the mask, a position
attends to everything before it in its window, also to documents that have nothing to do with its own. With the mask,
attention stays inside the document, and positions count from its beginning ("intra-document causal masking", Zhao et
al. 2024, arXiv 2402.13991; "The Llama 3 Herd of Models", Llama Team 2024, arXiv 2407.21783, section 3.2).

A document begins with its bos. Where the tokenizer has none, it begins with the eos of the document before it, which
stands between the two as GPT-2's <|endoftext|> does. So the first token of a document's text is predicted from that
document alone, as are the others, and the token after its last one shows where it ends. All targets keep their weight:
losses with and without the mask are means over the same targets.
"""

import itertools
from typing import Protocol

import numpy as np

from memoryllm_jax.common.errors import ArgumentError


class Marks(Protocol):
    """What knows the ids before and after each document, or None: a `Tokenizer`, or a `Dataset`."""

    bos_id: int | None
    eos_id: int | None


def first_id(marks: Marks, where: str, argument: str = "config.data.document_mask") -> int:
    """The token id that each document begins with.

    Args:
      where: what the error names: the data, or the model.
      argument: that asks for it.
    Raises: ArgumentError if no id shows where documents begin.
    """
    found = marks.bos_id if marks.bos_id is not None else marks.eos_id
    if found is None:
        problem = f"expected a tokenizer with bos or eos, which show where a document begins, found neither in {where}"
        raise ArgumentError(argument, problem)
    return found


def starts(ids_BT: np.ndarray, first: int) -> np.ndarray:
    """The position in its sequence at which each position's document begins, int32 [B, T].

    The first position of a sequence begins a document, or the rest of one.

    Args:
      ids_BT: token ids of the inputs.
      first: the id that `first_id` returns.
    """
    begins_BT = ids_BT == first
    positions_T = np.arange(ids_BT.shape[1], dtype=np.int32)
    return np.maximum.accumulate(np.where(begins_BT, positions_T, 0), axis=1)


def attention_share(start_BT):
    """The share of the pairs of causal attention that lie inside documents: a scalar above 0, 1 for whole sequences.

    Args:
      start_BT: as `starts` returns it, in NumPy or JAX.
    """
    # A query at position t attends to t - start + 1 keys, itself among them. Without documents that is (T+1)/2 on
    # average.
    return 1 - 2 * start_BT.mean() / (start_BT.shape[1] + 1)


def split(ids: np.ndarray, first: int) -> list[np.ndarray]:
    """Cuts the ids of one window into its documents, each with its last target: neighbours share a token.

    Args:
      ids: at least 2 token ids. The last one is only a target, so that no document begins with it.
      first: the id that `first_id` returns.
    """
    begins = np.flatnonzero(ids[1:-1] == first) + 1
    return [ids[a : b + 1] for a, b in itertools.pairwise([0, *begins.tolist(), len(ids) - 1])]
