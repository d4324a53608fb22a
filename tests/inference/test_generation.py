"""Texts sampled in batches from a model with random weights, which does not repeat one token."""

import itertools

import numpy as np
import pytest
from lab import HostRows, random_decoder

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference import generation
from memoryllm_jax.inference.sampling import Sampling

GREEDY, CONTEXT, VOCAB = Sampling(temperature=0), 32, 60


@pytest.fixture(scope="module")
def sources(make_config):
    """(decoder, rows on the device, the same rows on the host)"""
    decoder, live, _ = random_decoder(make_config("flex-3", **{"model.vocab_size": 64}).model)
    return decoder, live, HostRows(live)


def texts(decoder, rows, prompts, tokens=12, settings=GREEDY, seed=0, stop_ids=frozenset(), steps=1):
    """The new tokens of each prompt."""
    out = [[] for _ in prompts]
    for new in generation.generate(decoder, rows, prompts, tokens, settings, seed, CONTEXT, VOCAB, stop_ids, steps):
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
    for rows in (live, host):
        assert texts(decoder, rows, prompts, settings=settings, steps=4) == together
    assert texts(decoder, live, prompts[:1], settings=settings) == together[:1]
    assert texts(decoder, live, prompts, settings=settings, seed=8) != together
    assert texts(decoder, host, prompts) == texts(decoder, live, prompts)


@pytest.mark.parametrize("steps", [1, 4])
def test_texts_that_grow_in_turns_do_not_take_each_others_rows(sources, steps):
    decoder, live, host = sources
    prompts, settings = some_prompts(3, 9), Sampling(0.9)
    alone = [texts(decoder, live, [prompt], settings=settings)[0] for prompt in prompts]
    growing = [
        generation.generate(decoder, host, [p], 12, settings, 0, CONTEXT, VOCAB, steps_per_call=steps) for p in prompts
    ]
    grown = [[token for [(_, token)] in of_prompt] for of_prompt in zip(*zip(*growing))]
    assert grown == alone


def test_rows_that_are_displaced_as_soon_as_they_are_held_are_held_again(sources):
    decoder, live, _ = sources
    prompt, settings = some_prompts(3)[0], Sampling(0.9)

    class Displaced(HostRows):
        def hold(self, ids_U):
            is_missing = super().hold(ids_U)
            if len(self.asked) % 2:
                self.held[:] = False
            return is_missing

    assert texts(decoder, Displaced(live), [prompt], settings=settings) == texts(
        decoder, live, [prompt], settings=settings
    )


def test_texts_end_at_stop_tokens_the_context_and_max_tokens(sources):
    decoder, live, host = sources
    prompts, settings = some_prompts(5, 20, CONTEXT - 1), Sampling(1.0)
    for rows, steps in itertools.product((live, host), (1, 4)):
        full = texts(decoder, rows, prompts, 1000, settings, steps=steps)
        assert [len(p) + len(t) for p, t in zip(prompts, full)] == [CONTEXT] * 3
        assert texts(decoder, rows, prompts, 6, settings, steps=steps) == [t[:6] for t in full]
        assert texts(decoder, rows, prompts, 1, settings, steps=steps) == [t[:1] for t in full]
        stop = full[0][8]
        host.asked.clear()
        stopped = texts(decoder, rows, prompts, 1000, settings, stop_ids=frozenset({stop}), steps=steps)
        assert stopped == [list(itertools.takewhile(stop.__ne__, text)) for text in full]
        assert len(stopped[0]) <= 8 and len(stopped[1]) > 0
        assert not any(stop in ids for ids in host.asked)  # no row is read for a text that has ended


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
        generation.generate(None, None, prompts, 12, GREEDY, seed, CONTEXT, VOCAB)
    assert error.value.name == name
