"""Text sampled from a model in training: a look at what it has learned, not a server."""

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.config import Config
from memoryllm_jax.tokenizer import Tokenizer


def sample(trainer, params, tokenizer: Tokenizer, config: Config, length: int, seed: int) -> str:
    """The prompt of the config and up to `length` sampled tokens, within one training window.

    Every step evaluates the whole window: no cache, so that it works for every architecture and mesh as they train.
    """
    prompt = tokenizer.encode(config.sample.prompt)
    if tokenizer.bos_id is not None:
        prompt = [tokenizer.bos_id, *prompt]
    prompt = (prompt or [0])[: config.seq_len - 1]
    ids = np.zeros(config.seq_len, np.int32)
    ids[: len(prompt)] = prompt
    key = jax.random.key(seed)
    stop = min(config.seq_len, len(prompt) + length)
    end = len(prompt)
    while end < stop:
        drawn = trainer.next_token(params, ids, end - 1, tokenizer.vocab_size, jax.random.fold_in(key, end))
        ids[end] = jax.device_get(drawn)
        if ids[end] == tokenizer.eos_id:
            break
        end += 1
    return tokenizer.decode(ids[:end])


def next_token(trainer, params, ids_T, last, vocab_size, key):
    """A token id below `vocab_size` drawn from the model's distribution after position `last`; to be jitted."""
    c = trainer.config
    # One copy of the window for each batch shard: the kernels want the batch to divide over the mesh.
    ids_SN = jnp.tile(ids_T, (trainer.shards, 1))
    index_SN = jnp.tile(jnp.arange(c.seq_len), (trainer.shards, 1))
    rows = trainer.model.apply({"params": params}, ids_SN, method="token_rows")
    hidden = trainer.model.apply({"params": params}, rows, index_SN, c.seq_len, method="hidden")
    head_VD = trainer.model.apply({"params": params}, method="output_embedding")
    logits_V = head_VD @ hidden[0, last].astype(jnp.float32)
    logits_V = jnp.where(jnp.arange(logits_V.size) < vocab_size, logits_V, -jnp.inf)
    greedy = c.sample.temperature == 0
    return logits_V.argmax() if greedy else jax.random.categorical(key, logits_V / c.sample.temperature)
