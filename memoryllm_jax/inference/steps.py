"""Decode steps on the device: each fetches the rows of the tokens drawn last, runs the decoder and draws the next.

Shapes: B sequences of a batch, V token ids that can be drawn, k steps of one call.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Standing(NamedTuple):
    """Where the sequences of a batch stand between two steps.

    Attributes:
      tokens_B: int32, the tokens drawn last, which the decoder has not read yet.
      position_B: int32, the positions of these tokens.
    """

    tokens_B: jax.Array
    position_B: jax.Array


class Rules(NamedTuple):
    """What stays the same during a generation.

    Attributes:
      seed: uint32, seed of the draws.
      number_B: int32, the number of each sequence, which its draws depend on.
      end_B: int32, the length at which a sequence ends at the latest, its prompt included.
      is_stop_V: bool, the ids that end a sequence.
    """

    seed: jax.Array
    number_B: jax.Array
    end_B: jax.Array
    is_stop_V: jax.Array

    def is_running(self, standing: Standing):
        """Whether each sequence goes on after the token drawn last."""
        return ~self.is_stop_V[standing.tokens_B] & (standing.position_B + 1 < self.end_B)


class Taken(NamedTuple):
    """What a call returns.

    Attributes:
      drawn_kB: int32, the token that each step drew for each sequence; -1 for steps that were not taken. A sequence
        that has ended repeats its last token.
      standing, cache: after the last step that was taken.
    """

    drawn_kB: jax.Array
    standing: Standing
    cache: list


def take(
    decode: Callable,
    draw: Callable,
    has_rows: Callable | None,
    standing: Standing,
    rules: Rules,
    cache: list,
    count: int,
    ends_early: bool,
) -> Taken:
    """Takes `count` steps, or fewer. For use in jit.

    Args:
      decode: function (tokens_B, position_B, cache) -> (logits [B, V], the cache with these tokens).
      draw: function (logits, position_B of the drawn token) -> int32 [B].
      has_rows: function of tokens_B -> bool [B], whether `decode` finds each token's row; None if it finds all. A step
        whose rows are missing is not taken, nor is any after it.
      cache: keys and values of the earlier positions.
      ends_early: whether to take no more steps when all sequences have ended.
    """

    def goes_on(loop):
        number, (_, now, _) = loop
        condition = number < count
        is_running_B = rules.is_running(now)
        if ends_early:
            condition &= is_running_B.any()
        if has_rows is not None:
            condition &= (has_rows(now.tokens_B) | ~is_running_B).all()
        return condition

    def step(loop):
        number, (drawn_kB, now, cache) = loop
        is_running_B = rules.is_running(now)
        logits_BV, cache = decode(now.tokens_B, now.position_B, cache)
        next_B = draw(logits_BV, now.position_B + 1).astype(jnp.int32)
        # A sequence that has ended stays where it is, so that it never leaves the cache's positions.
        after = Standing(
            jnp.where(is_running_B, next_B, now.tokens_B), jnp.where(is_running_B, now.position_B + 1, now.position_B)
        )
        return number + 1, Taken(drawn_kB.at[number].set(after.tokens_B), after, cache)

    none_kB = jnp.full((count, len(standing.tokens_B)), -1, jnp.int32)
    _, taken = jax.lax.while_loop(goes_on, step, (jnp.int32(0), Taken(none_kB, standing, cache)))
    return taken
