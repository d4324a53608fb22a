"""Pieces of a prompt, which enter one slot of a key-value cache while other slots decode.

Each layer is one call of a jitted function, as in sequences.py. Call the functions inside a mesh. They return before
the device is done.

Shapes: T positions of a piece, padding included; b copies of the piece, one for each batch shard; V token ids as the
head stores them; K alternatives. Others are those of decoder.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.inference import ahead, sequences
from memoryllm_jax.inference.sampling import Draws, draw_each, without_padding
from memoryllm_jax.model import attention, transformer
from memoryllm_jax.model.sharding import constrain
from memoryllm_jax.model.token_memory import TokenRows, take_rows

MOST_ALTERNATIVES = 20  # OpenAI's API has as many
_PAST_THE_END = 1 << 30  # the position of padding: past the end of any cache, where nothing is written


class Likelihoods(NamedTuple):
    """How likely the model finds tokens, before any sampling setting. T positions, or B sequences.

    Attributes:
      log_probs_T: float32, of the tokens, in nats.
      top_ids_TK: int32, the likeliest tokens in their place, the likeliest first.
      top_log_probs_TK: float32, theirs.
    """

    log_probs_T: jax.Array | np.ndarray
    top_ids_TK: jax.Array | np.ndarray
    top_log_probs_TK: jax.Array | np.ndarray


class Place(NamedTuple):
    """Where a piece lies.

    Attributes:
      slot: int32, the slot of the cache.
      start: int32, the position of its first token.
      count: int32, its tokens without padding.
    """

    slot: jax.Array | np.ndarray
    start: jax.Array | np.ndarray
    count: jax.Array | np.ndarray


class _Where(NamedTuple):
    """What all layers need to know about the positions, on the devices."""

    index_ST: jax.Array
    position_bT: jax.Array
    slot: jax.Array
    rope: tuple[jax.Array, jax.Array]


def run(config: ModelConfig, params: dict, rows: TokenRows, index_T, place: Place, cache: list, reach, shards: int):
    """Runs a piece through the layers and writes its keys and values to the cache.

    Args:
      params: those of `Decoder`, with the factors of the slot.
      index_T: int32, the row of each position.
      cache: the cache of all slots, with the slot's earlier positions. It is donated.
      reach: the `attention.Reach` of attention, at least up to the piece's end.
      shards: batch shards of the mesh. Each computes the piece, because a batch of one cannot be split.
    Returns: (residual stream after the last layer [b, T, D], the cache with the piece).
    """
    x_bTD, where = _embed(config, rows.x0_SUD, index_T, place, shards)
    written = []
    for layer, (layer_params, old) in enumerate(zip(params["layers"], cache, strict=True)):
        ffn_SUD, factors = sequences.rows_of_layer(rows, params, layer)
        x_bTD, new = _layer(config, layer_params, x_bTD, ffn_SUD, factors, where, old, reach)
        written.append(new)
    return x_bTD, written


@functools.partial(ahead.jit, static_argnames=("config", "shards"), out_shardings=(sequences.STREAM, None))
def _embed(config, x0_SUD, index_T, place, shards):
    offset_T = jnp.arange(len(index_T))
    position_T = jnp.where(offset_T < place.count, place.start + offset_T, _PAST_THE_END)
    position_bT = jnp.broadcast_to(position_T, (shards, len(index_T)))
    index_ST = constrain(jnp.broadcast_to(index_T, position_bT.shape), "shard", None)
    x_bTD = take_rows(x0_SUD, index_ST).astype(config.dtype)
    return x_bTD, _Where(index_ST, position_bT, place.slot, transformer.rope_table(config, position_bT))


@functools.partial(
    ahead.jit,
    static_argnames="config",
    donate_argnames=("x_bTD", "cache"),
    out_shardings=(sequences.STREAM, sequences.CACHE),
)
def _layer(config, layer_params, x_bTD, ffn_SUD, factors, where, cache, reach):
    past = attention.Past(cache, where.position_bT, reach, where.slot)
    out = transformer.apply_layer(config, layer_params, x_bTD, ffn_SUD, where.index_ST, where.rope, past, factors)
    return out.x_BTD, out.keys_values


def likelihoods(config: ModelConfig, logits_TV, targets_T, has_alternatives, vocab_size: int) -> Likelihoods:
    """How likely the targets and the likeliest tokens are. For use in jit.

    Args:
      logits_TV: float32.
      targets_T: int32.
      has_alternatives: bool scalar, whether the likeliest tokens are looked for; else they are zeros.
      vocab_size: ids below it are drawn, and so are the likeliest ones. The model may give others a probability too.
    """
    lse_T1 = jax.nn.logsumexp(without_padding(logits_TV, config.vocab_size), -1, keepdims=True)
    count = min(MOST_ALTERNATIVES, vocab_size)
    none = jnp.zeros((len(logits_TV), count))

    def find():
        return tuple(jax.lax.top_k(without_padding(logits_TV, vocab_size), count))

    top, ids = jax.lax.cond(has_alternatives, find, lambda: (none, none.astype(jnp.int32)))
    of_target_T1 = jnp.take_along_axis(logits_TV, targets_T[:, None], -1)
    return Likelihoods((of_target_T1 - lse_T1)[:, 0], ids, jnp.where(has_alternatives, top - lse_T1, 0))


class Drawn(NamedTuple):
    """Tokens that were drawn, int32 [B], and their `Likelihoods`: zeros where they are not asked for."""

    tokens_B: jax.Array
    likelihoods: Likelihoods


def draw(config: ModelConfig, logits_BV, draws: Draws, alternatives_B, position_B, vocab_size: int) -> Drawn:
    """Draws a token for each sequence. For use in jit.

    Args:
      logits_BV, draws, position_B, vocab_size: as of `draw_each`.
      alternatives_B: int32, how many of the likeliest tokens each sequence asks for; -1: not even log-probabilities.
    """
    tokens_B = draw_each(logits_BV, draws, position_B, vocab_size)
    B, count = len(tokens_B), min(MOST_ALTERNATIVES, vocab_size)
    none = Likelihoods(jnp.zeros(B), jnp.zeros((B, count), jnp.int32), jnp.zeros((B, count)))
    found = jax.lax.cond(
        (alternatives_B >= 0).any(),
        lambda: likelihoods(config, logits_BV, tokens_B, (alternatives_B > 0).any(), vocab_size),
        lambda: none,
    )
    # What other sequences ask for must not change a result.
    has_any_B, has_top_B1 = alternatives_B >= 0, (alternatives_B > 0)[:, None]
    wanted = Likelihoods(has_any_B, has_top_B1, has_top_B1)
    return Drawn(tokens_B, jax.tree.map(lambda is_wanted, x: jnp.where(is_wanted, x, 0), wanted, found))


@functools.partial(ahead.jit, static_argnames=("config", "vocab_size"))
def score(config, final_norm, head_VD, x_bTD, before_D, ids_T, has_alternatives, vocab_size: int):
    """Scores a piece's own tokens, each from the state of the position before it.

    Args:
      x_bTD: residual stream after the last layer.
      before_D: that of the position before the piece; any before the first piece, whose first token has no score.
      ids_T: int32, the piece's tokens.
      has_alternatives, vocab_size: as of `likelihoods`.
    Returns: `Likelihoods` of each token.
    """
    x_TD = jnp.concatenate([before_D[None], x_bTD[0, :-1]])
    x_TD = sequences.normalised(config, final_norm, x_TD)
    # Logits are whole on each device, and at most LOGITS_BYTES at a time.
    T = len(ids_T)
    chunk = min(T, max(1, sequences.LOGITS_BYTES // (4 * head_VD.shape[0])))
    padding = -T % chunk

    def score_chunk(piece):
        x_CD, targets_C = piece
        logits_CV = sequences.logits(config, head_VD, x_CD)
        return likelihoods(config, logits_CV, targets_C, has_alternatives, vocab_size)

    x_NCD = jnp.pad(x_TD, ((0, padding), (0, 0))).reshape(-1, chunk, config.dim)
    found = jax.lax.map(score_chunk, (x_NCD, jnp.pad(ids_T, (0, padding)).reshape(-1, chunk)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], found)


@functools.partial(ahead.jit, out_shardings=P())
def last_state(x_bTD, place: Place):
    """The residual stream of a piece's last position, [D]. What reads it compiles once for pieces of all lengths."""
    return x_bTD[0, place.count - 1]


def logits_after(config: ModelConfig, final_norm: dict, head_VD, last_D):
    """Logits [1, V] of the token after a position with this state. For use in jit."""
    last_1D = sequences.normalised(config, final_norm, last_D[None])
    return sequences.logits(config, head_VD, last_1D)
