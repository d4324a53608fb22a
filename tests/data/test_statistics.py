"""Counts of tokens and of what follows them, against plain counting."""

import collections

import numpy as np
from lab import read_all

from memoryllm_jax.data import statistics
from memoryllm_jax.data.dataset import Dataset


def test_counts_and_successors_are_those_of_plain_counting(data_path):
    dataset = Dataset(data_path)
    ids = read_all(dataset)
    counts = collections.Counter(ids.tolist())
    assert statistics.token_counts(dataset, 512).tolist() == [counts[i] for i in range(512)]
    pairs = collections.Counter(zip(ids[:-1].tolist(), ids[1:].tolist()))
    found = statistics.likely_successors(dataset, 512)
    assert found.pairs == len(ids) - 1
    for first in range(512):
        followers = {second: n for (before, second), n in pairs.items() if before == first}
        expected = min(followers, key=lambda second: (-followers[second], second), default=-1)
        assert found.ids[first] == expected


def test_the_sources_of_a_mixture_count_by_their_shares(data_path, swapped):
    """Of equally many tokens of each here, though one is twenty times as large."""
    large, small = (Dataset(path) for path in (data_path, str(swapped)))
    mixed = Dataset(f"{data_path}:1,{swapped}:1")
    total = large.train.tokens + small.train.tokens
    expected = sum(
        statistics.token_counts(dataset, 512) / dataset.train.tokens * total / 2 for dataset in (large, small)
    )
    np.testing.assert_allclose(statistics.token_counts(mixed, 512), expected, atol=0.5)
    pairs = np.zeros((512, 512))
    for dataset in (large, small):
        ids = read_all(dataset)
        np.add.at(pairs, (ids[:-1], ids[1:]), 1 / dataset.train.tokens)
    found = statistics.likely_successors(mixed, 512)
    followed = pairs.any(1)
    np.testing.assert_array_equal(found.ids >= 0, followed)
    np.testing.assert_allclose(pairs[np.arange(512), found.ids][followed], pairs.max(1)[followed])
    assert (found.ids != statistics.likely_successors(large, 512).ids).any()
