"""Documents in the sequences of a batch, for config.data.document_mask.

The training text is a stream of documents, cut into windows of seq_len wherever they fall. Without the mask, a position
attends to everything before it in its window, also to documents that have nothing to do with its own. With the mask,
attention stays inside the document, and positions count from its beginning ("intra-document causal masking", Zhao et
al. 2024, arXiv 2402.13991; "The Llama 3 Herd of Models", Llama Team 2024, arXiv 2407.21783, section 3.2).

A document begins with its bos. Where the tokenizer has none, it begins with the eos of the document before it, which
stands between the two as GPT-2's <|endoftext|> does. So the first token of a document's text is predicted from that
document alone, as are the others, and the token after its last one shows where it ends. All targets keep their weight:
losses with and without the mask are means over the same targets.
"""

import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset


def first_id(dataset: Dataset) -> int:
    """The token id that each document begins with. Raises: UserError if documents are not told apart by a token."""
    found = dataset.bos_id if dataset.bos_id is not None else dataset.eos_id
    if found is None:
        raise UserError(
            "config.data.document_mask: expected a tokenizer with bos or eos, which show where a document begins, "
            f"found one with neither in {dataset.path}"
        )
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
