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
    for first in range(512):
        frequencies = sorted((n for (a, _), n in pairs.items() if a == first), reverse=True)
        assert found.pairs[first] == sum(frequencies)
        kept = [pairs[first, second] for second in found.ids[first].tolist() if (first, second) in pairs]
        # The token itself fills up the places of a token with few successors, and may be one of them.
        assert kept[: len(frequencies)] == frequencies[: statistics.SUCCESSORS]
        if not frequencies:
            assert found.ids[first].tolist() == [first] * statistics.SUCCESSORS
    assert np.array_equal(found.pairs, np.bincount(ids[:-1], minlength=512))
