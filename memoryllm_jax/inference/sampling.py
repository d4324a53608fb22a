"""How a token is drawn from the logits of a batch.

Shapes: B sequences of the batch, V token ids as the head stores them.
"""

import dataclasses
import functools
from typing import Annotated

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
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < vocab_size, logits_BV, -jnp.inf)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV /= sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits_BV, min(sampling.top_k, vocab_size))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, -1)
        p_BV = jax.nn.softmax(sorted_BV, -1)
        # The sum before a token decides, so that the token that reaches top_p is kept too.
        is_kept = jnp.cumsum(p_BV, -1) - p_BV < sampling.top_p
        least = jnp.where(is_kept, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)

    def draw_one(logits_V, sequence, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sequence), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw_one)(logits_BV, sequence_B, position_B)
