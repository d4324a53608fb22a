"""What whole-sequence passes compile. Their numbers are tested with the decoder and with scoring."""

import collections
import logging

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import random_decoder

from memoryllm_jax.inference import sequences


def test_what_is_compiled_does_not_grow_with_the_layers(make_config, caplog):
    def compiled(layers):
        """Names of the functions that are compiled, with the types of their arguments."""
        m = make_config("flex-3", **{"model.vocab_size": 64, "model.layers": layers}).model
        decoder, rows, _ = random_decoder(m, (2, 1, 2))
        B, T = decoder.shards, 16
        lengths, slots = np.full(B, T, np.int32), np.arange(B, dtype=np.int32)
        index = np.arange(B * T, dtype=np.int32).reshape(B, T)
        cache = decoder.empty_cache(B, 2 * T)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
            fetched = rows.fetch(np.arange(B * T, dtype=np.int32))
            decoder.score(fetched, index, index, np.ones((B, T), np.float32))
            decoder.log_probs(fetched, index, index)
            decoder.prefill(fetched, index, lengths, slots, cache)
        return collections.Counter(r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling"))

    few, many = compiled(2), compiled(5)
    of_layers = ("jit(live_layer)", "jit(_score_layer)", "jit(_prefill_layer)")
    assert not many - few and all(any(name in message for message in many) for name in of_layers)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)])
def test_logits_take_no_more_memory_than_their_limit(make_config, monkeypatch, mesh):
    V, N, limit = 1000, 512, 100_000
    monkeypatch.setattr(sequences, "LOGITS_BYTES", limit)
    m = make_config("memory", **{"model.vocab_size": V}).model
    decoder, _, _ = random_decoder(m, mesh)
    S, parts = decoder.shards, mesh[2]
    states = jax.ShapeDtypeStruct((S, N, m.dim), jnp.float32)
    targets, weights = (jax.ShapeDtypeStruct((S, N), dtype) for dtype in (jnp.int32, jnp.float32))
    head = decoder.params["final_norm"], decoder.params["head"]
    passes = {sequences._log_probs_of_states: (targets,), sequences._score_states: (targets, weights)}
    for pass_, arguments in passes.items():
        with jax.set_mesh(decoder.mesh):
            text = pass_.lower(m, *head, states, *arguments).compile().as_text()
        sizes = [size for dims, size in hlo.arrays(text) if V // parts in dims and m.dim not in dims]
        assert limit / 2 < max(sizes) <= limit
