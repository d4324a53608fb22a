"""Counts of tokens and of what follows them, against plain counting."""

import collections

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
