"""Single draws from given logits."""

import jax
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


def test_settings_of_their_own_draw_the_same_tokens_with_a_sort_or_without(monkeypatch):
    rng = np.random.default_rng(3)
    ways = [GREEDY, Sampling(0.7), Sampling(1.3, 3), Sampling(0.7, 0, 0.9), Sampling(1.3, 40, 0.3), Sampling(1.1)] * 30
    logits_BV = jnp.asarray(rng.normal(0, 2, (len(ways), 64)), jnp.float32)
    seed_B, position_B = rng.integers(0, 2**32, len(ways), np.uint32), rng.integers(0, 99, len(ways)).astype(np.int32)
    number_B = rng.integers(0, 9, len(ways)).astype(np.int32)

    def each(chosen):
        at = np.array(chosen)
        settings = [np.array([getattr(ways[k], name) for k in chosen]) for name in ("temperature", "top_k", "top_p")]
        draws = sampling.Draws(
            seed_B[at], number_B[at], *(np.float32(settings[0]), settings[1], np.float32(settings[2]))
        )
        return np.asarray(jax.jit(sampling.draw_each, static_argnums=3)(logits_BV[at], draws, position_B[at], 60))

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_LARGEST", 16)  # not enough for all: `draw` below sorts
        together = each(range(len(ways)))
    for k, how in enumerate(ways):
        one = slice(k, k + 1)
        expected = sampling.draw(logits_BV[one], seed_B[k], number_B[one], position_B[one], how, 60)
        assert together[k] == expected[0], how
    greedy = [k for k, how in enumerate(ways) if not how.temperature]
    for chosen in (greedy, [*greedy, 1, 5, 7]):  # without a draw, and without a sort
        np.testing.assert_array_equal(each(chosen), together[chosen])
