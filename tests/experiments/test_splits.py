"""Groups of held-out targets, against a count by hand over every target."""

import collections
import itertools

import numpy as np
import pytest
from lab import CONTEXT, read_all

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import heldout, splits


@pytest.fixture(scope="module")
def data(lab):
    return Dataset(lab.data_path)


def test_every_target_is_in_the_groups_that_a_count_by_hand_gives(data):
    text = heldout.open_text(data, CONTEXT)
    of_input, of_target, position, bigram = splits.of_text(text, data)
    train, ids = read_all(data).tolist(), text.ids.tolist()
    counts, pairs = collections.Counter(train), collections.Counter(itertools.pairwise(train))
    by_rarity = sorted(range(data.vocab_size), key=lambda i: counts[i])
    before, tenth = 0, {}
    for i in by_rarity:
        tenth[i] = int((before + counts[i] / 2) / len(train) * 10)
        before += counts[i]
    likeliest: dict[int, int] = {}
    for (a, b), count in sorted(pairs.items()):
        if a not in likeliest or count > pairs[a, likeliest[a]]:
            likeliest[a] = b
    names = {1: "1", 2: "2"} | {n: "3-4" for n in (3, 4)} | {n: "5-8" for n in range(5, 9)}
    names |= {n: "9-16" for n in range(9, 17)} | {n: "17-32" for n in range(17, 33)}
    for n, (a, b) in enumerate(itertools.pairwise(ids)):
        assert of_input.group_N[n] == tenth[a] and of_target.group_N[n] == tenth[b]
        assert position.groups[position.group_N[n]] == names[n % CONTEXT + 1]
        assert bigram.group_N[n] == (likeliest.get(a) == b)


def test_sums_by_group_and_document(data):
    text = heldout.open_text(data, CONTEXT)
    split = splits.by_position(text.position_N)
    values_N = np.random.default_rng(0).random(len(text.targets))
    expected = np.zeros((len(split.groups), len(text.bytes_D)))
    for group, document, value in zip(split.group_N, text.document_N, values_N):
        expected[group, document] += value
    np.testing.assert_allclose(split.by_document(values_N, text), expected)
    np.testing.assert_allclose(split.by_document(values_N, text).sum(0), text.by_document(values_N))
