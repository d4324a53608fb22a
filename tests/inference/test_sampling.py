"""Single draws from given logits."""

import jax.numpy as jnp
import numpy as np

from memoryllm_jax.inference import sampling
from memoryllm_jax.inference.sampling import Sampling

GREEDY = Sampling(temperature=0)


def draws(logits, count, settings, vocab, seed=0):
    """`count` tokens drawn from the same logits [V], each for another sequence."""
    logits = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    sequences = np.arange(count, dtype=np.int32)
    return np.asarray(sampling.draw(logits, np.uint32(seed), sequences, sequences % 7, settings, vocab))


def test_draws_follow_the_softmax_within_their_limits():
    rng = np.random.default_rng(0)
    logits, count, vocab = rng.normal(0, 1.5, 12), 6000, 9
    logits[9:] = 20.0  # ids past the vocabulary must not be drawn, although their logits are the largest
    p = np.exp(logits[:vocab] / 0.7)
    order = np.argsort(-p)
    # The likeliest ids up to and with the one that reaches 0.8 of the probability.
    nucleus = order[: int(np.searchsorted(np.cumsum(p[order]) / p.sum(), 0.8)) + 1]
    assert 2 < len(nucleus) < 8
    for limits, kept in (({}, order), ({"top_k": 4}, order[:4]), ({"top_p": 0.8}, nucleus)):
        seen = np.bincount(draws(logits, count, Sampling(0.7, **limits), vocab), minlength=12)
        assert set(np.nonzero(seen)[0]) == set(kept), limits
        expected = count * p[kept] / p[kept].sum()
        assert (np.square(seen[kept] - expected) / expected).sum() < 30  # chi-square with at most 8 degrees of freedom


def test_each_setting_is_greedy_at_its_limit():
    rng = np.random.default_rng(0)
    many = jnp.asarray(rng.normal(0, 1, (64, 12)), jnp.float32)
    at = np.arange(64, dtype=np.int32)
    for settings in (GREEDY, Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-6)):
        drawn = sampling.draw(many, np.uint32(0), at, at, settings, 9)
        np.testing.assert_array_equal(drawn, np.asarray(many[:, :9].argmax(1)))


def test_a_seed_repeats_its_draws():
    logits = np.random.default_rng(0).normal(0, 1, 12)
    first, again, other = (draws(logits, 64, Sampling(0.7), 9, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
