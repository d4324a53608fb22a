"""Text out of a decoder: batches of prompts of different length, sampled step by step."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference.decoder import Decoder, bucket


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution. Raises: ArgumentError."""

    temperature: Annotated[float, Option("0 is greedy, else from 0.001 to 1000")] = 0.8
    top_k: Annotated[int, Option("draw from the k likeliest tokens; 0: all", least=0)] = 0
    top_p: Annotated[float, Option("draw from the likeliest tokens that hold this share of the probability")] = 1.0

    def __post_init__(self):
        options.check(self)
        # Outside this range float32 logits overflow, or all differ by less than their rounding.
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ArgumentError("temperature", f"expected 0, or from 0.001 to 1000, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ArgumentError("top_p", f"expected more than 0 and at most 1, found {self.top_p}")


@functools.partial(jax.jit, static_argnames=("sampling", "vocab_size"))
def draw(logits_BV, seed, sequence_B, position_B, sampling: Sampling, vocab_size: int):
    """Ids below `vocab_size`. A draw depends on the seed, the sequence's number and the position, on nothing else."""
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
        inside = jnp.cumsum(p_BV, -1) - p_BV < sampling.top_p  # up to and with the token that reaches top_p
        least = jnp.where(inside, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)

    def one(logits_V, sequence, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sequence), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(one)(logits_BV, sequence_B, position_B)


def generate(
    decoder: Decoder,
    rows,
    prompts: list[list[int]],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    context: int,
    vocab_size: int,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[list[tuple[int, int]]]:
    """Yields, step by step, the new (sequence, token id) pairs of the sequences that have not ended.

    A sequence ends before a stop id, after `max_tokens`, or where the context is full. A step's tokens are yielded
    when the next step is on its way, so that what the caller does with them costs no time.

    Args:
      rows: where rows of the token memory come from (`decoder.LiveRows`, or one of tol/serve.py).
    Raises: UserError for a prompt that is empty or does not fit the context.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"prompt {number}: expected at least one token, found an empty prompt")
        if len(prompt) >= context:
            raise UserError(
                f"prompt {number}: expected fewer than {context} tokens, the model's context, found {len(prompt)}"
            )
    if not 0 <= seed < 2**32:
        raise ArgumentError("seed", f"expected a number from 0 to {2**32 - 1}, found {seed}")
    how = {"sampling": sampling, "vocab_size": vocab_size}
    return _steps(decoder, rows, prompts, max_tokens, np.uint32(seed), context, stop_ids, how)


def _steps(decoder, rows, prompts, max_tokens, seed, context, stop_ids, how):
    count = len(prompts)
    batch = -(-(1 << (count - 1).bit_length()) // decoder.shards) * decoder.shards
    capacity = bucket(max(map(len, prompts)) + max_tokens, context)
    tokens_B, cache = _prefill(decoder, rows, prompts, batch, capacity, seed, how)
    sequence_B = np.arange(batch, dtype=np.int32)
    position_B = np.array([len(p) for p in prompts] + [1] * (batch - count), np.int32)
    running = set(range(count))
    for made in range(max_tokens):
        # Sequences that have ended go on in place, unread, and stay inside the cache.
        at_B = np.minimum(position_B + made, capacity - 1)
        last = made + 1 == max_tokens
        current_B = tokens_B
        if rows.on_device and not last:  # the next step needs nothing from the host: it goes before the tokens are read
            logits, cache = decoder.step(rows.fetch(tokens_B), sequence_B, at_B, cache)
            tokens_B = draw(logits, seed, sequence_B, at_B + 1, **how)
        host_B = np.array(current_B)
        running -= {sequence for sequence in running if int(host_B[sequence]) in stop_ids}
        new = [(sequence, int(host_B[sequence])) for sequence in sorted(running)]
        running -= {sequence for sequence in running if position_B[sequence] + made + 1 >= context}
        if running and not last and not rows.on_device:
            # Rows are read for sequences that go on; the others take one of theirs.
            host_B[[s for s in range(batch) if s not in running]] = host_B[min(running)]
            ids, index_B = np.unique(host_B, return_inverse=True)
            padded = np.pad(ids, (0, batch - len(ids)), mode="edge")
            logits, cache = decoder.step(rows.fetch(padded), index_B.astype(np.int32), at_B, cache)
            tokens_B = draw(logits, seed, sequence_B, at_B + 1, **how)
            rows.prefetch(ids)
        if new:
            yield new
        if not running:
            return


def _prefill(decoder, rows, prompts, batch, capacity, seed, how):
    """Prompts by length bucket: while the device works on one bucket, the rows of the next are fetched."""
    cache = decoder.empty_cache(batch, capacity)
    groups: dict[int, list[int]] = {}
    for sequence, prompt in enumerate(prompts):
        groups.setdefault(bucket(len(prompt), capacity), []).append(sequence)
    tokens_B = np.zeros(batch, np.int32)
    for length, members in sorted(groups.items()):
        b = -(-(1 << (len(members) - 1).bit_length()) // decoder.shards) * decoder.shards
        ids_bT = np.zeros((b, length), np.int32)
        lengths_b, slots_b = np.ones(b, np.int32), np.full(b, batch, np.int32)
        for row, sequence in enumerate(members):
            prompt = prompts[sequence]
            ids_bT[row] = np.pad(prompt, (0, length - len(prompt)), mode="edge")
            lengths_b[row], slots_b[row] = len(prompt), sequence
        ids_bT[len(members) :] = ids_bT[0]
        ids, index_bT = np.unique(ids_bT, return_inverse=True)
        ids = np.pad(ids, (0, bucket(len(ids), b * length) - len(ids)), mode="edge").astype(np.int32)
        index_bT = index_bT.reshape(b, length).astype(np.int32)
        logits_bV, cache = decoder.prefill(rows.fetch(ids), index_bT, lengths_b, slots_b, cache)
        tokens_B = _put(tokens_B, slots_b, draw(logits_bV, seed, slots_b, lengths_b, **how))
    return tokens_B, cache


@jax.jit
def _put(tokens_B, slots_b, tokens_b):
    return tokens_B.at[slots_b].set(tokens_b, mode="drop")
