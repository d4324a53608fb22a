import numpy as np
import pytest

from memoryllm_jax.analysis import clustering


def test_tokens_of_two_kinds_have_a_high_silhouette(two_kinds, run):
    found = run("clustering", two_kinds[0], clusters=2, tokens=60, sample=100, neighbours=5)
    assert found["layers"][0]["silhouette"] > 0.3 and found["tokens"] == 60


def test_clustering_coefficient_of_known_graphs():
    cliques = np.array([[j for j in range(5 * (i // 5), 5 * (i // 5) + 5) if j != i] for i in range(10)])  # two of five
    assert clustering.clustering_coefficient(cliques) == (1, pytest.approx(4 / 9))
    ring = np.stack([np.arange(9) - 1, np.arange(1, 10)], 1) % 9
    assert clustering.clustering_coefficient(ring)[0] == 0
    # A triangle 0 1 2, and 3 joined with 2 alone. Of the three pairs of 2's neighbours, one is joined.
    found, _ = clustering.clustering_coefficient(np.array([[1], [2], [0], [2]]))
    assert found == pytest.approx((1 + 1 + 1 / 3 + 0) / 4)
