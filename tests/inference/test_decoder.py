"""Prefill and decode steps against tests/reference.py, with random weights and without any checkpoint."""

import numpy as np
import pytest
import reference
from lab import jitted_step, random_decoder

from memoryllm_jax.inference.decoder import bucket

LENGTHS, STEPS, CONTEXT = (3, 18, 11, 1), 4, 32


def some_ids(count):
    """Random ids, the same at each call."""
    return np.random.default_rng(count).integers(0, 64, count).astype(np.int32)


def decode(decoder, rows, sequences, lengths):
    """Logits [B, STEPS + 1, V] after the first `lengths` ids of each sequence and after each of its next ids."""
    B, T = len(sequences), max(lengths)
    ids_BT = np.stack([np.pad(ids[:n], (0, T - n)) for ids, n in zip(sequences, lengths)])
    ids, index_BT = np.unique(ids_BT, return_inverse=True)
    index_BT, slots_B = index_BT.reshape(B, T).astype(np.int32), np.arange(B, dtype=np.int32)
    cache = decoder.empty_cache(B, bucket(T + STEPS, CONTEXT))
    logits_BV, cache = decoder.prefill(rows.fetch(ids), index_BT, np.array(lengths, np.int32), slots_B, cache)
    out = [logits_BV]
    run_step = jitted_step(decoder)
    for step in range(STEPS):
        position_B = np.array(lengths, np.int32) + step
        next_B = np.array([ids[position] for ids, position in zip(sequences, position_B)], np.int32)
        logits_BV, cache = run_step(rows.fetch(next_B), slots_B, position_B, cache)
        out.append(logits_BV)
    return np.stack(out, 1)


@pytest.mark.parametrize("size, most, padded", [(1, 99, 16), (16, 99, 16), (17, 99, 32), (33, 40, 40), (3, 5, 5)])
def test_a_bucket_is_a_power_of_two_or_the_most(size, most, padded):
    assert bucket(size, most) == padded


@pytest.mark.parametrize(
    "architecture, overrides, mesh",
    [
        ("memory", {"model.tie_embeddings": True}, (1, 1, 1)),
        ("flex-3", {"model.dim": 30, "model.heads": 3, "model.ffn_dim": 103, "model.qk_norm": True}, (2, 2, 2)),
        ("base", {"model.dim": 48, "model.heads": 8, "model.kv_heads": 4, "model.logit_softcap": 9.0}, (1, 1, 4)),
        ("value-3", {"model.kv_heads": 2}, (1, 1, 1)),
        ("ple-3", {}, (2, 1, 1)),
        ("bov-3", {"model.dim": 30, "model.heads": 3, "model.layers": 3}, (1, 2, 2)),
        ("rows-3", {}, (1, 2, 1)),
    ],
)
def test_prefill_and_steps_give_the_logits_of_the_equations(make_config, architecture, overrides, mesh):
    m = make_config(architecture, **{"model.vocab_size": 64, **overrides}).model
    decoder, rows, params = random_decoder(m, mesh)
    sequences = [some_ids(n + STEPS) for n in LENGTHS]
    found_BSV = decode(decoder, rows, sequences, LENGTHS)
    together = np.stack([np.pad(ids, (0, max(LENGTHS) + STEPS - len(ids))) for ids in sequences])
    expected_BTV = np.asarray(reference.logits(params, together, m))
    for n, found, expected in zip(LENGTHS, found_BSV, expected_BTV):
        expected = expected[n - 1 : n + STEPS]
        np.testing.assert_allclose(found[:, :64], expected, atol=3e-5 * np.abs(expected).max())
