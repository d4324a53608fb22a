"""Single draws, and texts sampled in batches from a model with random weights, which does not repeat one token."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from lab import random_decoder

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference import sampling
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model.token_memory import TokenRows

GREEDY, CONTEXT, VOCAB = Sampling(temperature=0), 32, 60


class HostRows:
    """A row source that needs ids on the host, and records the ids of each fetch."""

    on_device = False

    def __init__(self, live):
        self.rows, self.fetched = live.fetch(np.arange(64, dtype=np.int32)), []

    def fetch(self, ids_U):
        self.fetched.append(ids_U)
        return TokenRows(self.rows.x0_SUD[:, ids_U], [ffn_SUD[:, ids_U] for ffn_SUD in self.rows.ffn_LSUD])


@pytest.fixture(scope="module")
def sources(make_config):
    """(decoder, rows on the device, the same rows on the host)"""
    decoder, live, _ = random_decoder(make_config("flex-3", **{"model.vocab_size": 64}).model)
    return decoder, live, HostRows(live)


def texts(decoder, rows, prompts, tokens=12, settings=GREEDY, seed=0, stop_ids=frozenset()):
    """The new tokens of each prompt."""
    out = [[] for _ in prompts]
    for new in sampling.generate(decoder, rows, prompts, tokens, settings, seed, CONTEXT, VOCAB, stop_ids):
        for sequence, token in new:
            out[sequence].append(token)
    return out


def some_prompts(*lengths):
    return [np.random.default_rng(n).integers(3, VOCAB, n).tolist() for n in lengths]


def test_a_text_does_not_depend_on_its_batch_or_on_where_rows_are(sources):
    decoder, live, host = sources
    prompts, settings = some_prompts(3, 20, 9), Sampling(0.9, top_k=40, top_p=0.95)
    together = texts(decoder, live, prompts, settings=settings)
    assert len({token for text in together for token in text}) > 12  # not one token over and over
    assert texts(decoder, host, prompts, settings=settings) == together
    assert texts(decoder, live, prompts[:1], settings=settings) == together[:1]
    assert texts(decoder, live, prompts, settings=settings, seed=8) != together
    assert texts(decoder, host, prompts) == texts(decoder, live, prompts)


def test_texts_end_at_stop_tokens_the_context_and_max_tokens(sources):
    decoder, live, host = sources
    prompts, settings = some_prompts(5, 20, CONTEXT - 1), Sampling(1.0)
    for rows in (live, host):
        full = texts(decoder, rows, prompts, 1000, settings)
        assert [len(p) + len(t) for p, t in zip(prompts, full)] == [CONTEXT] * 3
        assert texts(decoder, rows, prompts, 6, settings) == [t[:6] for t in full]
        assert texts(decoder, rows, prompts, 1, settings) == [t[:1] for t in full]
        stop = full[0][8]
        host.fetched.clear()
        stopped = texts(decoder, rows, prompts, 1000, settings, stop_ids=frozenset({stop}))
        assert stopped == [list(itertools.takewhile(stop.__ne__, text)) for text in full]
        assert len(stopped[0]) <= 8 and len(stopped[1]) > 0
    assert not any(stop in ids for ids in host.fetched if len(ids) == 4)  # no row is read for a text that has ended


@pytest.mark.parametrize(
    "prompts, seed, name, problem",
    [
        ([[5], [7] * CONTEXT], 0, "prompt", f"expected fewer than {CONTEXT} tokens.*found {CONTEXT} in prompt 2"),
        ([[]], 0, "prompt", "expected at least one token, found none in prompt 1"),
        ([[5]], -1, "seed", "expected a number from 0 to 4294967295, found -1"),
    ],
)
def test_invalid_prompts_and_seeds_are_refused_before_anything_runs(prompts, seed, name, problem):
    with pytest.raises(ArgumentError, match=f"^{name}: {problem}") as error:
        sampling.generate(None, None, prompts, 12, GREEDY, seed, CONTEXT, VOCAB)
    assert error.value.name == name


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
