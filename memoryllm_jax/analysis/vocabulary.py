"""Passes over the whole vocabulary, a chunk of token ids at a time: exact, and no larger for a larger vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import topk
from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset, statistics

CHUNK = 2048  # tokens whose coefficients exist at one time


def chunks(ids: np.ndarray):
    """(ids [C], real [C]) of one shape, the last chunk filled up with ids that are not real."""
    size = min(CHUNK, len(ids))
    for start in range(0, len(ids), size):
        at = np.arange(start, start + size)
        yield ids[np.minimum(at, len(ids) - 1)].astype(np.int32), at < len(ids)


def chunk_count(tokens: int) -> int:
    return -(-tokens // min(CHUNK, tokens))


def every_id(inside: Inside) -> np.ndarray:
    return np.arange(inside.config.vocab_size, dtype=np.int32)


def checked_dataset(inside: Inside, path: str) -> dataset.Dataset:
    """Raises: UserError, also where no data is named."""
    if not path:
        raise UserError("--data: expected a folder that `prepare` wrote, as this analysis needs text")
    return dataset.open_for(path, inside.tokenizer.digest)


def chosen_tokens(inside: Inside, page, token: list[str], count: int, path: str) -> np.ndarray:
    """The tokens named; else the `count` most frequent ones of the data; without data, evenly spread ids. 0: all.

    The page's facts say which. Raises: UserError.
    """
    ids, page.facts["tokens"] = _chosen(inside, token, count, path)
    return ids


def _chosen(inside, token, count, path):
    if token:
        return inside.tokens(token), "named"
    size = inside.config.vocab_size
    if count < 0:
        raise UserError(f"--tokens: expected a number of tokens, or 0 for all, found {count}")
    if not count or count >= size:
        return every_id(inside), f"all {size:,}"
    if path:
        counts = statistics.token_counts(checked_dataset(inside, path), size)
        return np.argsort(-counts, kind="stable")[:count].astype(np.int32), f"the {count:,} most frequent of {path}"
    return np.linspace(0, size - 1, count).astype(np.int32), f"{count:,}, at even distances of id"


def key_triggers(inside: Inside, layer: int, keys: np.ndarray, top: int, step=lambda: None) -> topk.Triggers:
    """The tokens that use each key of FFN-M most, over the whole vocabulary; labels are token ids."""
    sides = topk.TwoSided(len(keys), top)
    for ids_C, real_C in chunks(every_id(inside)):
        sides.add(inside.token_coefficients(layer, ids_C, keys), ids_C, real_C)
        step()
    return sides.result()


@functools.partial(jax.jit, static_argnums=2)
def strongest_keys(c_CF, norms_F, k):
    """Keys of each token by the size of what they add, |c_i| |v_i|: (keys, c, share of the token's total) [C, k]."""
    size_CF = jnp.abs(c_CF) * norms_F
    top, keys = jax.lax.top_k(size_CF, k)
    return keys, jnp.take_along_axis(c_CF, keys, 1), top / jnp.maximum(size_CF.sum(-1, keepdims=True), 1e-30)
