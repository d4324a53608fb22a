"""Text sampled step by step, for batches of prompts of different lengths."""

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
from memoryllm_jax.inference.decoder import Decoder, bucket
from memoryllm_jax.inference.rows import RowSource


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
    """Draws a token for each sequence.

    A draw depends on the logits, the seed, the sequence's number and the position, and on nothing else: text does not
    change with the batch that it is in.

    Args:
      logits_BV: float32; ids from `vocab_size` on are padding of the head.
      seed: uint32.
      position_B: of the tokens that are drawn.
    Returns: int32 [B], below `vocab_size`.
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
        inside = jnp.cumsum(p_BV, -1) - p_BV < sampling.top_p  # up to and with the token that reaches top_p
        least = jnp.where(inside, sorted_BV, jnp.inf).min(-1, keepdims=True)
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

    A sequence ends before a stop id, after `max_tokens`, or where the context is full.

    Args:
      prompts: token ids of each prompt.
      seed: of the draws, below 2^32.
      context: positions that a sequence may have, its prompt included.
      vocab_size: ids that may be drawn are those below.
    Yields: after each step, the new (sequence, token id) pairs of the sequences that have not ended.
    Raises: ArgumentError for a prompt that is empty or does not fit the context, and for the seed.
    """
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

    The tokens drawn last stay on the device until they are read; the decoder has not seen them yet.

    Args:
      draw_tokens: `draw` with all but the logits, the sequences and the positions given.
    """

    def __init__(self, decoder, rows, prompts, max_tokens, draw_tokens, context, stop_ids):
        self.decoder, self.rows, self.prompts, self.draw_tokens = decoder, rows, prompts, draw_tokens
        self.max_tokens, self.context, self.stop_ids = max_tokens, context, stop_ids
        self.batch = _batch_size(len(prompts), decoder.shards)
        self.capacity = bucket(max(map(len, prompts)) + max_tokens, context)  # positions of the cache
        self.running = set(range(len(prompts)))
        self.sequence_B = np.arange(self.batch, dtype=np.int32)
        unused = self.batch - len(prompts)
        self.prompt_lengths_B = np.array([len(prompt) for prompt in prompts] + [1] * unused, np.int32)
        self.tokens_B = np.zeros(self.batch, np.int32)
        self.cache = None  # made by `_prefill`

    def steps(self) -> Iterator[list[tuple[int, int]]]:
        """Yields the new (sequence, token id) pairs of each step."""
        self._prefill()
        for step in range(self.max_tokens):
            position_B = self.prompt_lengths_B + step  # of the tokens drawn last
            is_last = step + 1 == self.max_tokens
            drawn_B = self.tokens_B
            # Rows on the device are looked up by ids that are on the device too. So the next step is dispatched before
            # this one's tokens are read, and the device does not wait for the host. It is wasted if all sequences end.
            if self.rows.on_device and not is_last:
                self._decode(self.rows.fetch(drawn_B), self.sequence_B, position_B)
            ids_B = np.array(drawn_B)  # waits for the device; a copy, which `_fetch_running` changes
            new = self._unstopped(ids_B)
            self.running = {sequence for sequence in self.running if position_B[sequence] + 1 < self.context}
            # Rows in host memory or on disk are fetched by the host, which must know the ids first.
            if self.running and not is_last and not self.rows.on_device:
                self._decode(*self._fetch_running(ids_B), position_B)
            # The tokens are handed out only now, when the device is at work on the next ones.
            if new:
                yield new
            if not self.running:
                return

    def _unstopped(self, ids_B) -> list[tuple[int, int]]:
        """Ends the sequences that drew a stop id. Returns: (sequence, token id) of those that go on."""
        self.running = {sequence for sequence in self.running if int(ids_B[sequence]) not in self.stop_ids}
        return [(sequence, int(ids_B[sequence])) for sequence in sorted(self.running)]

    def _fetch_running(self, ids_B):
        """(rows of the running sequences' tokens, index [B] of each sequence's row). Changes ids_B."""
        ended = [sequence for sequence in range(self.batch) if sequence not in self.running]
        ids_B[ended] = ids_B[min(self.running)]  # no row is read for a sequence that nobody reads
        ids, index_B = np.unique(ids_B, return_inverse=True)
        padded = np.pad(ids, (0, self.batch - len(ids)), mode="edge")  # one shape, so compiled once
        return self.rows.fetch(padded), index_B.astype(np.int32)

    def _decode(self, rows, index_B, position_B):
        """Feeds the tokens drawn last, whose rows these are, to the decoder, and draws the next. Does not wait."""
        # Sequences that have ended stay in the batch. Once at the cache's end, they overwrite its last position.
        position_B = np.minimum(position_B, self.capacity - 1)
        logits_BV, self.cache = self.decoder.step(rows, index_B, position_B, self.cache)
        self.tokens_B = self.draw_tokens(logits_BV, sequence_B=self.sequence_B, position_B=position_B + 1)

    def _prefill(self):
        """Reads the prompts into the cache and draws the first tokens, one length bucket at a time.

        Nothing waits for the device, so it works on one bucket while the rows of the next are fetched.
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
        """Prompts of one length bucket as a batch of b sequences.

        Returns: (token ids [b, length], lengths [b], places in the cache [b]). What fills up the batch's shape repeats
          ids, so that it needs no row of its own, and has its place past the cache's end, where nothing is written.
        """
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
    power = 1 << (sequences - 1).bit_length()
    return -(-power // shards) * shards


@jax.jit
def _put(tokens_B, slots_b, tokens_b):
    return tokens_B.at[slots_b].set(tokens_b, mode="drop")
