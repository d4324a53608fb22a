"""Passes over the whole vocabulary in chunks of token ids, in memory that does not grow with the vocabulary."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import topk
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.report import Report
from memoryllm_jax.data import statistics

# Options of the analyses whose pages show some tokens: what `chosen_tokens` takes.
Token = Annotated[tuple[str, ...], Option("token to show, as text that is one token, as ␣the or as #ID", many=True)]
Tokens = Annotated[int, Option("how many tokens to show if none are named; 0: all", least=0)]
FrequencyData = Annotated[str, Option("prepared data, whose most frequent tokens are shown if none are named")]


def chosen_tokens(model: KeyValueModel, page: Report, token: Sequence[str], count: int, path: str) -> np.ndarray:
    """Chooses the tokens that a page shows. The page's facts say which these are.

    Args:
      token: names of tokens. If there are any, `count` and `path` are not used.
      count: how many tokens; 0: all.
      path: prepared data, whose most frequent tokens are chosen; "": ids at even distances are chosen.
    Returns: int32 ids.
    Raises: UserError if a name is no token, or `path` is no prepared data of this tokenizer.
    """
    size = model.config.vocab_size
    if path and (token or not count or count >= size):
        reason = "tokens are named" if token else "all tokens are shown"
        print(f"data: {path} is not read, as {reason}", flush=True)
    if token:
        ids, fact = model.tokens(token), "named"
    elif not count or count >= size:
        ids, fact = model.every_id, f"all {size:,}"
    elif path:
        occurrences_V = statistics.token_counts(model.open_data(path), size)
        ids = np.argsort(-occurrences_V, kind="stable")[:count].astype(np.int32)
        fact = f"the {count:,} most frequent of {path}"
    else:
        # Even distances: many tokenizers give low ids to frequent tokens, so the first ids would be of one sort.
        ids = np.linspace(0, size - 1, count).astype(np.int32)
        fact = f"{count:,}, whose ids are at even distances"
    page.facts["tokens"] = fact
    return ids


def key_triggers(
    model: KeyValueModel, layer: int, keys: np.ndarray, top: int, step: Callable[[], None] = lambda: None
) -> topk.Triggers:
    """Finds the tokens of the whole vocabulary on which keys of FFN-M fire most.

    Args:
      keys: numbers of the keys.
      top: tokens to find for each key.
      step: called after each chunk.
    Returns: the triggers, whose labels are token ids.
    """
    sides = topk.TwoSidedTopK(len(keys), top)
    for ids_C, is_real_C in model.chunks(model.every_id):
        sides.add(model.token_coefficients(layer, ids_C, keys), ids_C, is_real_C)
        step()
    return sides.triggers()


class StrongestKeys(NamedTuple):
    """The k keys that add most to the memory row of each token, strongest first; arrays [..., k].

    keys: numbers of the keys.  c: their coefficients.  share: |c_i| |v_i| over its sum over all keys of the layer.
    """

    keys: np.ndarray
    c: np.ndarray
    share: np.ndarray


@functools.partial(jax.jit, static_argnums=2)
def strongest_keys(c_CF, norms_F, k: int) -> StrongestKeys:
    """The k keys with the largest |c_i| |v_i| for each token.

    Args:
      c_CF: coefficients of tokens.
      norms_F: |v_i|, float32.
    """
    size_CF = jnp.abs(c_CF.astype(jnp.float32)) * norms_F  # sizes rounded to bfloat16 would tie
    top_Ck, keys_Ck = jax.lax.top_k(size_CF, k)
    # The 1e-30 makes the shares of a token whose coefficients are all 0 zero and not NaN.
    total_C1 = jnp.maximum(size_CF.sum(-1, keepdims=True), 1e-30)
    return StrongestKeys(keys_Ck, jnp.take_along_axis(c_CF, keys_Ck, 1), top_Ck / total_C1)
