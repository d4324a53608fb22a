"""Generates text for batches of prompts of different lengths.

Shapes: B sequences of the batch; b prompts of one length bucket, T its length; k decode steps of one call.
"""

import collections
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference import ahead
from memoryllm_jax.inference.decoder import Decoder, bucket, next_power_of_two
from memoryllm_jax.inference.rows import RowSource, refuse_bigrams
from memoryllm_jax.inference.sampling import Sampling, draw
from memoryllm_jax.inference.steps import Rules, Standing

# Steps of one call where nobody waits for each token. A call takes the host as long as ten small layers take a device,
# and where a call cannot end early, up to twice as many steps are wasted after all sequences have ended.
STEPS_PER_CALL = 8


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
    steps_per_call: int = 1,
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
      steps_per_call: decode steps of one call to the device. More than one take the host less time for each token, and
        bring that many tokens at a time.
    Yields: after each step, the new (sequence, token id) pairs of the sequences that have not ended. Inside
      `ahead.only_shapes` it yields nothing: the functions of the prefill and of the decode steps are compiled.
    Raises: ArgumentError for a prompt that is empty or does not fit the context, and for the seed; UserError for a
      model whose rows do not follow from a token alone.
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
    refuse_bigrams(decoder.config)
    how = _How(max_tokens, sampling, seed, context, vocab_size, stop_ids, steps_per_call)
    return _Generation(decoder, rows, prompts, how).run()


class _How(NamedTuple):
    """The arguments of `generate` from `max_tokens` on."""

    max_tokens: int
    sampling: Sampling
    seed: int
    context: int
    vocab_size: int
    stop_ids: frozenset[int]
    steps_per_call: int


class _Called(NamedTuple):
    """A call that was dispatched: the tokens that it draws, and whether its first step finds its rows for sure."""

    ids_kB: jax.Array
    finds_rows: bool


class _Generation:
    """B sequences that grow together: one for each prompt, and unused ones that pad the batch to its compiled shape.

    Attributes:
      batch: B.
      capacity: positions of the cache for each sequence.
      most: the most new tokens of any sequence.
      count: the most steps of one call.
      running: numbers of the sequences that have not ended, as far as the drawn tokens were read.
      done: number of tokens that were read, of each running sequence.
    """

    def __init__(self, decoder: Decoder, rows: RowSource, prompts: list[list[int]], how: _How):
        self.decoder, self.rows, self.prompts, self.how = decoder, rows, prompts, how
        self.batch = _batch_size(len(prompts), decoder.shards)
        longest = max(map(len, prompts))
        self.capacity = bucket(longest + how.max_tokens, how.context)
        self.running = set(range(len(prompts)))
        self.done = 0
        self.prompt_lengths_B = np.ones(self.batch, np.int32)
        self.prompt_lengths_B[: len(prompts)] = [len(prompt) for prompt in prompts]
        self.end_B = np.zeros(self.batch, np.int32)  # unused sequences have ended
        self.end_B[: len(prompts)] = [min(len(prompt) + how.max_tokens, how.context) for prompt in prompts]
        self.most = int((self.end_B - self.prompt_lengths_B).max())
        # A power of two, so that few counts compile. The prefill draws the first token.
        self.count = min(how.steps_per_call, next_power_of_two(max(self.most - 1, 1)))

    def run(self) -> Iterator[list[tuple[int, int]]]:
        """Yields the new (sequence, token id) pairs of each step."""
        self._prefill()
        if ahead.is_on():
            self._call()
            return
        # Calls whose tokens, int32 [steps, B], are not read yet. The prefill has drawn the first ones.
        calls = collections.deque([_Called(self.standing.tokens_B[None], finds_rows=True)])
        while self.running:
            # The next call is dispatched before the tokens of this one are read, so that the device does not wait for
            # the host. It reads the tokens on the device. Where their rows have to be read first, it takes no step.
            if len(calls) == 1 and self.done + len(calls[0].ids_kB) < self.most:
                calls.append(_Called(self._call(), self.rows.on_device))
            ids_kB = np.asarray(calls.popleft().ids_kB)  # waits for the device
            new, is_missing = [], False
            for ids_B in ids_kB[ids_kB[:, 0] >= 0]:
                if not self.running:
                    break
                new.append(self._read(ids_B))
                last_ids = ids_B[sorted(self.running)]
                if not self.rows.on_device and len(last_ids):
                    is_missing = self.rows.hold(last_ids)
            if not new and not any(call.finds_rows for call in calls):
                # Another text has displaced rows since they were held.
                is_missing = True
                self.rows.hold(last_ids)
            # Dispatched just after `hold`, so that it finds its rows even if another text displaces them later.
            if self.running and (is_missing or not calls):
                calls.append(_Called(self._call(), finds_rows=True))
            # Yielded only now, so that the device works on the next step while the caller handles these tokens.
            yield from filter(None, new)

    def _read(self, ids_B) -> list[tuple[int, int]]:
        """Ends the sequences that drew a stop id or have no room for another token.

        Args:
          ids_B: the tokens that one step drew.
        Returns: (sequence, token id) pairs of the sequences that were running and drew no stop id.
        """
        new = [(k, int(ids_B[k])) for k in sorted(self.running) if int(ids_B[k]) not in self.how.stop_ids]
        position_B = self.prompt_lengths_B + self.done
        self.running = {k for k, _ in new if position_B[k] + 1 < self.end_B[k]}
        self.done += 1
        return new

    def _call(self) -> jax.Array:
        """Dispatches the next steps. Returns: the tokens that they draw, on the device."""
        taken = self.decoder.steps(
            self.rows, self.standing, self.rules, self.cache, self.how.sampling, self.how.vocab_size, self.count
        )
        self.standing, self.cache = taken.standing, taken.cache
        return taken.drawn_kB

    def _prefill(self) -> None:
        """Runs the prompts through the decoder and draws the first tokens, one length bucket at a time.

        It does not wait for the device, which works on one bucket while the host fetches the rows of the next.
        """
        how = self.how
        if not self.rows.on_device:
            self.rows.reserve(len(self.prompts))
        self.cache = self.decoder.empty_cache(self.batch, self.capacity)
        tokens_B = np.zeros(self.batch, np.int32)
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
            tokens_b = draw(logits_bV, np.uint32(how.seed), slots_b, lengths_b, how.sampling, how.vocab_size)
            tokens_B = _put(tokens_B, slots_b, tokens_b)
        is_stop_V = np.zeros(how.vocab_size, bool)
        is_stop_V[[id for id in how.stop_ids if id < how.vocab_size]] = True
        rules = Rules(np.uint32(how.seed), np.arange(self.batch, dtype=np.int32), self.end_B, is_stop_V)
        self.standing, self.rules = self.decoder.start(Standing(tokens_B, self.prompt_lengths_B), rules)

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


@ahead.jit
def _put(tokens_B, slots_b, tokens_b):
    return tokens_B.at[slots_b].set(tokens_b, mode="drop")
