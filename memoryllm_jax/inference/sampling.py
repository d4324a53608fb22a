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

_LARGEST = 1024  # so many of the largest logits nearly always decide top_k and top_p, without a sort of all


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
        return _likeliest(logits_BV)
    logits_BV /= sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        B = len(logits_BV)
        top_k_B = jnp.full(B, min(sampling.top_k, vocab_size), jnp.int32)
        logits_BV = _limited(logits_BV, top_k_B, jnp.full(B, sampling.top_p, jnp.float32))
    return _sampled(logits_BV, jnp.broadcast_to(seed, sequence_B.shape), sequence_B, position_B)


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
    likeliest_B = _likeliest(logits_BV)
    is_greedy_B = draws.temperature_B == 0
    top_k_B, top_p_B = jnp.where(is_greedy_B, 0, draws.top_k_B), jnp.where(is_greedy_B, 1, draws.top_p_B)
    has_limit = ((top_k_B > 0) | (top_p_B < 1)).any()

    def sample():
        scaled_BV = logits_BV / jnp.where(is_greedy_B, 1, draws.temperature_B)[:, None]
        limited_BV = jax.lax.cond(has_limit, lambda: _limited(scaled_BV, top_k_B, top_p_B), lambda: scaled_BV)
        drawn_B = _sampled(limited_BV, draws.seed_B, draws.number_B, position_B)
        return jnp.where(is_greedy_B, likeliest_B, drawn_B)

    return jax.lax.cond(is_greedy_B.all(), lambda: likeliest_B, sample)


def without_padding(logits_BV, vocab_size: int):
    """The logits, -inf for ids from `vocab_size` on, which only pad the head."""
    return jnp.where(jnp.arange(logits_BV.shape[1]) < vocab_size, logits_BV, -jnp.inf)


def _limited(logits_BV, top_k_B, top_p_B):
    """The logits, -inf for ids outside each sequence's top_k (0: all) and top_p."""

    def from_sort():
        return _least_kept(logits_BV, -jnp.sort(-logits_BV, -1), top_k_B, top_p_B)[0]

    def from_largest():
        # Behind a barrier: where a part of the result is read, XLA replaces top_k by a sort of all.
        largest_BN = jax.lax.optimization_barrier(jax.lax.top_k(logits_BV, _LARGEST)[0])
        least_B1, is_known_B1 = _least_kept(logits_BV, largest_BN, top_k_B, top_p_B)
        sorted_B1 = jax.lax.cond(is_known_B1.all(), lambda: least_B1, from_sort)
        # Whether others need the sort must not change a sequence's result.
        return jnp.where(is_known_B1, least_B1, sorted_B1)

    if logits_BV.shape[1] <= _LARGEST:
        least_B1 = from_sort()
    else:
        # An accelerator sorts quickly, and would wait for the host at the condition.
        least_B1 = jax.lax.platform_dependent(cpu=from_largest, default=from_sort)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def _least_kept(logits_BV, largest_BN, top_k_B, top_p_B):
    """The least logits within top_k and top_p, as far as the largest logits tell.

    Args:
      largest_BN: the N largest logits, the largest first.
    Returns: (float32 [B, 1], whether the N largest suffice to know it, bool [B, 1]).
    """
    top_k_B1, top_p_B1, N = top_k_B[:, None], top_p_B[:, None], largest_BN.shape[1]
    kth_B1 = jnp.take_along_axis(largest_BN, jnp.clip(top_k_B1 - 1, 0, N - 1), -1)
    kth_B1 = jnp.where(top_k_B1 > 0, kth_B1, -jnp.inf)

    def weights(x):
        return jnp.where(x < kth_B1, 0, jnp.exp(x - largest_BN[:, :1]))

    p_BN = weights(largest_BN) / weights(logits_BV).sum(-1, keepdims=True)
    # The sum before a token decides, so that the token that reaches top_p is kept too.
    is_kept_BN = jnp.cumsum(p_BN, -1) - p_BN < top_p_B1
    of_share_B1 = jnp.where(is_kept_BN, largest_BN, jnp.inf).min(-1, keepdims=True)
    least_B1 = jnp.maximum(kth_B1, jnp.where(top_p_B1 < 1, of_share_B1, -jnp.inf))
    # What follows the N largest is dropped by top_p, or by top_k except where it equals the k-th.
    is_dropped_B1 = ~is_kept_BN[:, -1:] | (largest_BN[:, -1:] <= kth_B1)
    return least_B1, (top_k_B1 <= N) & (is_dropped_B1 | (top_p_B1 >= 1))


def _likeliest(logits_BV):
    """The id of each largest logit, the first of equal ones, int32 [B]. On a CPU, `argmax` takes ten times as long."""
    # Else the CPU computes what the logits are made of twice, once for each use.
    logits_BV = jax.lax.optimization_barrier(logits_BV)
    V = logits_BV.shape[1]
    is_largest_BV = logits_BV == logits_BV.max(-1, keepdims=True)
    # XLA for CPUs has fast minima of floats, not of integers. Floats up to 2^24 are exact.
    dtype = jnp.float32 if V <= 1 << 24 else jnp.int32
    first_B = jnp.where(is_largest_BV, jnp.arange(V, dtype=dtype), V).min(-1).astype(jnp.int32)
    return jnp.where(first_B < V, first_B, 0)  # no logit is the largest if one is NaN


def _sampled(logits_BV, seed_B, number_B, position_B):
    """Draws from the softmax of each sequence's logits, as `jax.random.categorical` does, int32 [B]."""

    def perturbed(logits_V, seed, number, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), position)
        return jax.random.gumbel(key, logits_V.shape, logits_V.dtype) + logits_V

    return _likeliest(jax.vmap(perturbed)(logits_BV, seed_B, number_B, position_B))
