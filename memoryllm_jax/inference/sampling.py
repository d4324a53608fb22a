"""How a token is drawn from the logits of a batch.

Shapes: B sequences of the batch, V token ids as the head stores them.
"""

import dataclasses
import functools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import TEMPERATURES, is_temperature
from memoryllm_jax.inference import ahead


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution. Raises: ArgumentError."""

    temperature: Annotated[float, Option(TEMPERATURES)] = 0.8
    top_k: Annotated[int, Option("draw from the k likeliest tokens; 0: all", least=0)] = 0
    top_p: Annotated[float, Option("draw from the likeliest tokens that hold this share of the probability")] = 1.0

    def __post_init__(self):
        options.check(self)
        if not is_temperature(self.temperature):
            raise ArgumentError("temperature", f"expected {TEMPERATURES}, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ArgumentError("top_p", f"expected more than 0 and at most 1, found {self.top_p}")


@functools.partial(ahead.jit, static_argnames=("sampling", "vocab_size"))
def draw(logits_BV, seed, sequence_B, position_B, sampling: Sampling, vocab_size: int):
    """Draws a token for each sequence.

    A draw depends only on the logits, the seed, the sequence's number and the position. So a text does not depend on
    the batch that it is sampled in.

    Args:
      logits_BV: float32; ids from `vocab_size` on are padding of the head.
      seed: uint32.
      sequence_B: int32, the number of each sequence.
      position_B: int32, the position of the token that is drawn.
    Returns: token ids below `vocab_size`, int32 [B].
    """
    logits_BV = without_padding(logits_BV, vocab_size)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV /= sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits_BV, min(sampling.top_k, vocab_size))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, -1)
        logits_BV = jnp.where(logits_BV < _least_of_share(sorted_BV, sampling.top_p), -jnp.inf, logits_BV)
    return jax.vmap(_draw_one, (0, None, 0, 0))(logits_BV, seed, sequence_B, position_B)


class Draws(NamedTuple):
    """How the tokens of each sequence of a batch are drawn: `Sampling`, with the seed and the number of `draw`.

    Attributes:
      seed_B: uint32.
      number_B: int32.
      temperature_B, top_p_B: float32.
      top_k_B: int32.
    """

    seed_B: jax.Array
    number_B: jax.Array
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array


def draw_each(logits_BV, draws: Draws, position_B, vocab_size: int):
    """`draw` with settings of their own for each sequence: it draws the same tokens. For use in jit.

    Sorting and drawing are skipped while no sequence of the batch needs them.

    Args:
      logits_BV, position_B, vocab_size: as of `draw`.
    Returns: token ids below `vocab_size`, int32 [B].
    """
    logits_BV = without_padding(logits_BV, vocab_size)
    likeliest_B = logits_BV.argmax(-1).astype(jnp.int32)
    is_greedy_B = draws.temperature_B == 0
    has_limit_B = ~is_greedy_B & ((draws.top_k_B > 0) | (draws.top_p_B < 1))

    def sample():
        scaled_BV = logits_BV / jnp.where(is_greedy_B, 1, draws.temperature_B)[:, None]
        limited_BV = jax.lax.cond(has_limit_B.any(), lambda: _limited(scaled_BV, draws), lambda: scaled_BV)
        drawn_B = jax.vmap(_draw_one)(limited_BV, draws.seed_B, draws.number_B, position_B)
        return jnp.where(is_greedy_B, likeliest_B, drawn_B.astype(jnp.int32))

    return jax.lax.cond(is_greedy_B.all(), lambda: likeliest_B, sample)


def without_padding(logits_BV, vocab_size: int):
    """The logits, -inf for ids from `vocab_size` on, which only pad the head."""
    return jnp.where(jnp.arange(logits_BV.shape[1]) < vocab_size, logits_BV, -jnp.inf)


def _limited(logits_BV, draws):
    """The logits, -inf for ids outside each sequence's top_k and top_p."""
    sorted_BV = -jnp.sort(-logits_BV, -1)
    kth_B1 = jnp.take_along_axis(sorted_BV, jnp.maximum(draws.top_k_B - 1, 0)[:, None], -1, mode="clip")
    least_B1 = jnp.where(draws.top_k_B[:, None] > 0, kth_B1, -jnp.inf)
    top_p_B1 = draws.top_p_B[:, None]
    of_share_B1 = _least_of_share(jnp.where(sorted_BV < least_B1, -jnp.inf, sorted_BV), top_p_B1)
    least_B1 = jnp.maximum(least_B1, jnp.where(top_p_B1 < 1, of_share_B1, -jnp.inf))
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _least_of_share(sorted_BV, top_p):
    """The least of the logits, sorted from the largest on, whose tokens together hold the share `top_p`, [B, 1]."""
    p_BV = jax.nn.softmax(sorted_BV, -1)
    # The sum before a token decides, so that the token that reaches top_p is kept too.
    is_kept = jnp.cumsum(p_BV, -1) - p_BV < top_p
    return jnp.where(is_kept, sorted_BV, jnp.inf).min(-1, keepdims=True)


def _draw_one(logits_V, seed, sequence, position):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sequence), position)
    return jax.random.categorical(key, logits_V)
