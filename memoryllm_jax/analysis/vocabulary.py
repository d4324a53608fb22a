"""Passes over the whole vocabulary, a chunk of token ids at a time: exact, and no larger for a larger vocabulary."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import topk
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.common.report import Report
from memoryllm_jax.data import statistics


def chosen_tokens(model: KeyValueModel, page: Report, token: Sequence[str], count: int, path: str) -> np.ndarray:
    """int32 ids of the tokens that a page shows; the page's facts say which these are.

    Args:
      token: names of tokens, which take the place of the following.
      count: how many tokens; 0: all.
      path: prepared data, of which the most frequent tokens are taken; "": ids at even distances.
    Raises: UserError.
    """
    size = model.config.vocab_size
    if token:
        ids, fact = model.tokens(token), "named"
    elif not count or count >= size:
        ids, fact = model.every_id, f"all {size:,}"
    elif path:
        occurrences_V = statistics.token_counts(model.open_data(path), size)
        ids = np.argsort(-occurrences_V, kind="stable")[:count].astype(np.int32)
        fact = f"the {count:,} most frequent of {path}"
    else:
        ids, fact = np.linspace(0, size - 1, count).astype(np.int32), f"{count:,}, at even distances of id"
    page.facts["tokens"] = fact
    return ids


def key_triggers(
    model: KeyValueModel, layer: int, keys: np.ndarray, top: int, step: Callable[[], None] = lambda: None
) -> topk.Triggers:
    """The tokens on which each key of FFN-M fires most, over the whole vocabulary; labels are token ids.

    Args:
      step: called after each chunk.
    """
    sides = topk.TwoSidedTopK(len(keys), top)
    for ids_C, is_real_C in model.chunks(model.every_id):
        sides.add(model.token_coefficients(layer, ids_C, keys), ids_C, is_real_C)
        step()
    return sides.triggers()


class StrongestKeys(NamedTuple):
    """The k keys that add most to each of some tokens' rows, strongest first; arrays [..., k].

    keys: numbers of the keys.  c: coefficients.  share: |c_i| |v_i| over its sum over all keys of the layer.
    """

    keys: np.ndarray
    c: np.ndarray
    share: np.ndarray


@functools.partial(jax.jit, static_argnums=2)
def strongest_keys(c_CF, norms_F, k: int) -> StrongestKeys:
    """The keys of the largest |c_i| |v_i| for each token.

    Args:
      norms_F: |v_i|.
    """
    size_CF = jnp.abs(c_CF) * norms_F
    top_Ck, keys_Ck = jax.lax.top_k(size_CF, k)
    total_C1 = jnp.maximum(size_CF.sum(-1, keepdims=True), 1e-30)
    return StrongestKeys(keys_Ck, jnp.take_along_axis(c_CF, keys_Ck, 1), top_Ck / total_C1)
