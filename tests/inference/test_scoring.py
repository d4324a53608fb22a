"""Scores of sequences against tests/reference.py, with random weights."""

import jax
import numpy as np
import pytest
import reference
from lab import random_decoder

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference import scoring

CONTEXT = 32


@pytest.mark.parametrize("architecture, devices", [("base", 2), ("flex-3", 1), ("bov-3", 1), ("bigram-3", 1)])
def test_scores_are_those_of_the_equations(make_config, architecture, devices):
    options = {"model.qk_norm": True, "model.logit_softcap": 9.0} if architecture == "flex-3" else {}
    m = make_config(architecture, **{"model.vocab_size": 64, **options}).model
    decoder, rows, params = random_decoder(m, (devices, 1, 1))
    log_probs = jax.jit(lambda params, ids: jax.nn.log_softmax(reference.logits(params, ids, m)))
    lengths = (5, 33, 2, 18, 33, 9, CONTEXT)
    ids = np.random.default_rng(0).integers(0, 64, (len(lengths), CONTEXT + 1))
    likeliest = np.asarray(log_probs(params, ids[:, :-1]).argmax(-1))
    for sequence in (5, 6):  # their last id is the likeliest
        last = lengths[sequence] - 1
        ids[sequence, last] = likeliest[sequence, last - 1]
    sequences = [ids[sequence, :length].tolist() for sequence, length in enumerate(lengths)]
    found = scoring.score(decoder, rows, sequences, CONTEXT, positions=40)  # more than one batch of a length

    log_probs_BTV = np.asarray(log_probs(params, ids[:, :-1]))
    expected_BT = np.take_along_axis(log_probs_BTV, ids[:, 1:, None], -1)[..., 0]
    greedy_BT = log_probs_BTV.argmax(-1) == ids[:, 1:]
    for scores, length, expected_T, greedy_T in zip(found, lengths, expected_BT, greedy_BT, strict=True):
        np.testing.assert_allclose(scores.log_probs_T, expected_T[: length - 1], atol=2e-5)
        np.testing.assert_array_equal(scores.greedy_T, greedy_T[: length - 1])
        assert scores.log_probs_T.dtype == np.float32
    assert all(found[sequence].greedy_T[-1] for sequence in (5, 6))


@pytest.mark.parametrize("length", [1, CONTEXT + 2])
def test_sequences_too_short_or_too_long_are_refused(length):
    with pytest.raises(ArgumentError, match=f"sequences: expected 2 to 33 ids in each, found {length} in sequence 1"):
        scoring.score(None, None, [[1, 2], [1] * length], CONTEXT)
