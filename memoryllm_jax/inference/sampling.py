"""Samples text step by step, for batches of prompts of different lengths.

Shapes: B sequences of the batch, V token ids as the head stores them; b prompts of one length bucket, T its length.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import TEMPERATURES, is_temperature
from memoryllm_jax.inference.decoder import Decoder, bucket, next_power_of_two
from memoryllm_jax.inference.rows import RowSource


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


@functools.partial(jax.jit, static_argnames=("sampling", "vocab_size"))
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


def generate(
    decoder: Decoder,
    rows: RowSource,
    prompts: list[list[int]],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    context: int,
    vocab_size: int,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[list[tuple[int, int]]]:
    """Samples one continuation of each prompt, all of them in one batch.

    A sequence ends before a stop id, after `max_tokens` new tokens, or when the context is full.

    Args:
      prompts: token ids of each prompt.
      max_tokens: most new tokens of a sequence.
      sampling: how tokens are drawn.
      seed: seed of the draws, from 0 to 2^32 - 1.
      context: most positions of a sequence, its prompt included.
      vocab_size: only ids below it are drawn.
      stop_ids: ids that end a sequence; they are not yielded.
    Yields: after each step, the new (sequence, token id) pairs of the sequences that have not ended.
    Raises: ArgumentError for a prompt that is empty or does not fit the context, and for the seed.
    """
    # Not a generator itself, so that errors are raised by the call and not by the first step.
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ArgumentError("prompt", f"expected at least one token, found none in prompt {number}")
        if len(prompt) >= context:
            raise ArgumentError(
                "prompt",
                f"expected fewer than {context} tokens, the model's context, found {len(prompt)} in prompt {number}",
            )
    if not 0 <= seed < 2**32:
        raise ArgumentError("seed", f"expected a number from 0 to {2**32 - 1}, found {seed}")
    draw_tokens = functools.partial(draw, seed=np.uint32(seed), sampling=sampling, vocab_size=vocab_size)
    return _Generation(decoder, rows, prompts, max_tokens, draw_tokens, context, stop_ids).steps()


class _Generation:
    """B sequences that grow together: one for each prompt, and unused ones that pad the batch to its compiled shape.

    Args:
      draw_tokens: function of (logits, sequence_B=, position_B=) that draws tokens; the other arguments are those of
        `generate`.
    Attributes:
      batch: B.
      capacity: positions of the cache for each sequence.
      running: numbers of the sequences that have not ended.
      tokens_B: the tokens drawn last. They may still be computed on the device, and the decoder has not read them yet.
      cache: keys and values of all earlier tokens; None before the prefill.
    """

    def __init__(self, decoder, rows, prompts, max_tokens, draw_tokens, context, stop_ids):
        self.decoder, self.rows, self.prompts, self.draw_tokens = decoder, rows, prompts, draw_tokens
        self.max_tokens, self.context, self.stop_ids = max_tokens, context, stop_ids
        self.batch = _batch_size(len(prompts), decoder.shards)
        self.capacity = bucket(max(map(len, prompts)) + max_tokens, context)
        self.running = set(range(len(prompts)))
        self.sequence_B = np.arange(self.batch, dtype=np.int32)
        unused = self.batch - len(prompts)
        self.prompt_lengths_B = np.array([len(prompt) for prompt in prompts] + [1] * unused, np.int32)
        self.tokens_B = np.zeros(self.batch, np.int32)
        self.cache = None

    def steps(self) -> Iterator[list[tuple[int, int]]]:
        """Yields the new (sequence, token id) pairs of each step."""
        self._prefill()
        for step in range(self.max_tokens):
            position_B = self.prompt_lengths_B + step  # of the tokens drawn last
            is_last = step + 1 == self.max_tokens
            drawn_B = self.tokens_B
            # Rows on the device can be fetched by ids that are still on the device. So the next step is dispatched
            # before this step's tokens are read, and the device never waits for the host. The step is wasted if all
            # sequences end here.
            if self.rows.on_device and not is_last:
                self._decode(self.rows.fetch(drawn_B), self.sequence_B, position_B)
            ids_B = np.array(drawn_B)  # waits for the device; a copy, because `_fetch_running` changes it
            new = self._unstopped(ids_B)
            self.running = {sequence for sequence in self.running if position_B[sequence] + 1 < self.context}
            # Rows in host memory or on disk are fetched by the host, which has to read the ids first.
            if self.running and not is_last and not self.rows.on_device:
                self._decode(*self._fetch_running(ids_B), position_B)
            # Yielded only now, so that the device works on the next step while the caller handles these tokens.
            if new:
                yield new
            if not self.running:
                return

    def _unstopped(self, ids_B) -> list[tuple[int, int]]:
        """Ends the sequences that drew a stop id. Returns: (sequence, token id) pairs of the running sequences."""
        self.running = {sequence for sequence in self.running if int(ids_B[sequence]) not in self.stop_ids}
        return [(sequence, int(ids_B[sequence])) for sequence in sorted(self.running)]

    def _fetch_running(self, ids_B):
        """Fetches the rows of the running sequences' tokens. It overwrites the ids of the others in ids_B.

        Returns: (rows, index [B] of each sequence's row).
        """
        ended = [sequence for sequence in range(self.batch) if sequence not in self.running]
        ids_B[ended] = ids_B[min(self.running)]  # so that no row is fetched for a sequence that has ended
        ids, index_B = np.unique(ids_B, return_inverse=True)
        padded = np.pad(ids, (0, self.batch - len(ids)), mode="edge")  # one shape, so that it compiles once
        return self.rows.fetch(padded), index_B.astype(np.int32)

    def _decode(self, rows, index_B, position_B):
        """Runs the tokens drawn last through the decoder and draws the next ones, without waiting for the device.

        Args:
          rows: rows of the tokens drawn last.
          index_B: the row of each sequence's token.
          position_B: the positions of these tokens.
        """
        # Sequences that have ended stay in the batch. At the cache's end they overwrite its last position.
        position_B = np.minimum(position_B, self.capacity - 1)
        logits_BV, self.cache = self.decoder.step(rows, index_B, position_B, self.cache)
        self.tokens_B = self.draw_tokens(logits_BV, sequence_B=self.sequence_B, position_B=position_B + 1)

    def _prefill(self):
        """Runs the prompts through the decoder and draws the first tokens, one length bucket at a time.

        It does not wait for the device, which works on one bucket while the host fetches the rows of the next.
        """
        self.cache = self.decoder.empty_cache(self.batch, self.capacity)
        buckets: dict[int, list[int]] = {}
        for sequence, prompt in enumerate(self.prompts):
            buckets.setdefault(bucket(len(prompt), self.capacity), []).append(sequence)
        for length, members in sorted(buckets.items()):
            ids_bT, lengths_b, slots_b = self._padded_prompts(members, length)
            ids, index_bT = np.unique(ids_bT, return_inverse=True)
            ids = np.pad(ids, (0, bucket(len(ids), ids_bT.size) - len(ids)), mode="edge").astype(np.int32)
            index_bT = index_bT.reshape(ids_bT.shape).astype(np.int32)
            rows = self.rows.fetch(ids)
            logits_bV, self.cache = self.decoder.prefill(rows, index_bT, lengths_b, slots_b, self.cache)
            tokens_b = self.draw_tokens(logits_bV, sequence_B=slots_b, position_B=lengths_b)
            self.tokens_B = _put(self.tokens_B, slots_b, tokens_b)

    def _padded_prompts(self, members, length):
        """The prompts of one length bucket as a batch of b sequences.

        Args:
          members: numbers of the bucket's sequences.
          length: positions of the bucket.
        Returns: (token ids [b, length], lengths [b], places in the cache's batch [b]).
        """
        # Padding repeats ids of the prompts, so that no more rows are fetched. Sequences that pad the batch get a place
        # past the cache's end, where nothing is written.
        b = _batch_size(len(members), self.decoder.shards)
        ids_bT = np.zeros((b, length), np.int32)
        lengths_b, slots_b = np.ones(b, np.int32), np.full(b, self.batch, np.int32)
        for i, sequence in enumerate(members):
            prompt = self.prompts[sequence]
            ids_bT[i] = np.pad(prompt, (0, length - len(prompt)), mode="edge")
            lengths_b[i], slots_b[i] = len(prompt), sequence
        ids_bT[len(members) :] = ids_bT[0]
        return ids_bT, lengths_b, slots_b


def _batch_size(sequences, shards):
    """A power of two, so that few shapes compile, rounded up to a multiple of the batch shards."""
    return -(-next_power_of_two(sequences) // shards) * shards


@jax.jit
def _put(tokens_B, slots_b, tokens_b):
    return tokens_B.at[slots_b].set(tokens_b, mode="drop")
