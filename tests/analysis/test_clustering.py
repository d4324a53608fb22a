import jax.numpy as jnp
import numpy as np
import pytest

from memoryllm_jax.analysis import clustering


def test_tokens_of_two_kinds_have_a_high_silhouette(two_kinds, run):
    found = run("clustering", two_kinds[0], clusters=2, nodes=20, sample=100, neighbours=5)
    assert found["layers"][0]["silhouette"] > 0.3 and found["nodes"] == 20


def test_clustering_coefficient_of_known_graphs():
    cliques = np.array([[j for j in range(5 * (i // 5), 5 * (i // 5) + 5) if j != i] for i in range(10)])  # two of five
    found = clustering.all_nodes(cliques)
    assert (found.coefficient_S == 1).all() and (found.degree_S == 4).all()
    ring = np.stack([np.arange(9) - 1, np.arange(1, 10)], 1) % 9
    assert not clustering.all_nodes(ring).coefficient_S.any()
    # A triangle 0 1 2, and 3 joined with 2 alone. Of the three pairs of 2's neighbours, one is joined.
    found = clustering.all_nodes(np.array([[1], [2], [0], [2]]))
    np.testing.assert_allclose(found.coefficient_S, [1, 1, 1 / 3, 0])


@pytest.mark.parametrize("clusters", (1, 7))
def test_some_nodes_are_those_of_the_whole_graph(make_model, clusters):
    """With clusters of any quality: these are random."""
    model, rng = make_model("memory"), np.random.default_rng(0)
    V = model.config.vocab_size
    # Some tokens point almost where all others do, so that they are near to many more tokens than are near to them.
    x = rng.standard_normal((V, 6)) + 2 * (np.arange(V)[:, None] % 50 == 0)
    unit = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    labels, nodes = rng.integers(clusters, size=V), np.sort(rng.choice(V, 40, replace=False)).astype(np.int32)
    whole = clustering.nodes_of(model, unit, labels, None, 5, "")
    found = clustering.nodes_of(model, unit, labels, nodes, 5, "")
    np.testing.assert_array_equal(found.degree_S, whole.degree_S[nodes])
    np.testing.assert_allclose(found.coefficient_S, whole.coefficient_S[nodes])
    assert whole.degree_S.max() > 10 and 0 < whole.coefficient_S.mean() < 1


def test_error_of_the_mean_is_the_spread_of_samples():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=400)
    samples = [clustering.mean_and_error(rng.choice(values, 200, replace=False), 400) for _ in range(300)]
    means, errors = np.array(samples).T
    assert means.std() == pytest.approx(errors.mean(), rel=0.1)
    assert clustering.mean_and_error(values, 400) == (pytest.approx(values.mean()), 0)
