"""Scores of sequences against tests/reference.py on the checkpoint's own parameters."""

import numpy as np
import pytest
from lab import CONTEXT, log_softmax, of_sequences

from memoryllm_jax.inference import scoring


def some_sequences(*lengths):
    return [np.random.default_rng(n).integers(3, 512, n).tolist() for n in lengths]


@pytest.mark.parametrize("name", ["memory", "flex-3", "base", "value-3", "ple-3"])
def test_scores_are_those_of_the_equations(lab, name, monkeypatch):
    monkeypatch.setattr(scoring, "_POSITIONS", 40)  # more than one batch of a length
    sequences = some_sequences(5, 33, 2, 17, 18, 9, 33, 30, 3)
    with lab.model(name) as model:
        greedy_ends = log_softmax(model, [sequences[1][:CONTEXT]])[0].argmax(-1)
        sequences += [[*sequences[1][:n], int(greedy_ends[n - 1])] for n in (7, CONTEXT)]
        expected = of_sequences(model, sequences)
        found = scoring.score(model.decoder, model.rows, sequences, CONTEXT)
    assert sum(greedy.sum() for _, greedy in expected) >= 2
    for scores, (log_probs, greedy) in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores.log_probs_T, log_probs, atol=2e-5)
        np.testing.assert_array_equal(scores.greedy_T, greedy)
        assert scores.log_probs_T.dtype == np.float32
