"""Decode steps over tokens that a text gives, to measure their time on real text."""

import jax
import numpy as np

from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.steps import Rules, Standing


class GivenTokens:
    """Sequences whose tokens the caller gives. Steps are those of `generation.generate`, one a call.

    Args:
      batch: number of sequences B, a multiple of the decoder's batch shards.
      capacity: positions of the key-value cache.
      vocab_size: only ids below it are drawn.
    Attributes:
      cache: keys and values. A step attends to no later position, so that another text may begin at position 0 again.
    """

    def __init__(self, decoder: Decoder, batch: int, capacity: int, vocab_size: int):
        self._decoder, self._vocab_size = decoder, vocab_size
        self.cache = decoder.empty_cache(batch, capacity)
        end_B = np.full(batch, capacity + 1, np.int32)  # no sequence ends: the caller decides
        rules = Rules(np.uint32(0), np.arange(batch, dtype=np.int32), end_B, np.zeros(vocab_size, bool))
        start = Standing(np.zeros(batch, np.int32), np.zeros(batch, np.int32))
        _, self._rules = decoder.start(start, rules)

    def step(self, rows: RowSource, tokens_B: np.ndarray, position: int) -> jax.Array:
        """Decodes one token of each sequence, without waiting for the device.

        Args:
          tokens_B: int32.
          position: of these tokens in their sequences.
        Returns: the likeliest next tokens, int32 [1, B], on the device.
        """
        if not rows.on_device:
            rows.hold(tokens_B)
        standing = Standing(tokens_B, np.full(len(tokens_B), position, np.int32))
        taken = self._decoder.steps(rows, standing, self._rules, self.cache, Sampling(0.0), self._vocab_size, 1)
        self.cache = taken.cache
        return taken.drawn_kB
