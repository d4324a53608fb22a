import functools
import re

import numpy as np
import pytest
from by_hand import unit

from memoryllm_jax.analysis import clusters, token_classes
from memoryllm_jax.common.errors import UserError


def test_each_token_is_in_the_cluster_of_the_nearest_centre(in_numpy):
    trained = in_numpy("flex-3")
    vectors = functools.partial(clusters.unit_coefficients, trained.model, 1)
    labels, kmeans = clusters.fit(trained.model, vectors, 6, 0)
    c = trained.c(trained.asked("memory", 1), trained.ffn("memory", 1))
    distance = np.linalg.norm(unit(c)[:, None] - kmeans.cluster_centers_, axis=-1)
    assert (labels == distance.argmin(1)).mean() > 0.999 and len(labels) == 512


def test_clusters_of_tokens_of_two_kinds_are_pure(two_kinds, run):
    row, _ = run("clusters", two_kinds[0], clusters=2, picture="pca", sample=50)["layers"]
    assert row["leading space"] == 1 and row["leading space, chance"] < 0.95


def test_the_page_lists_clusters_with_the_tokens_nearest_to_their_centres(two_kinds):
    model, is_spaced = two_kinds
    labels, kmeans = clusters.fit(model, functools.partial(clusters.unit_coefficients, model, 0), 2, 0)
    nearest = clusters.nearest_to_centres(model, 0, labels, kmeans)
    classes = token_classes.classes(model.texts)["leading space"]
    x = np.asarray(clusters.unit_coefficients(model, 0, model.every_id))
    for cluster, count, name, share, texts in clusters.cluster_lines(labels, nearest, classes, model.texts):
        own = np.flatnonzero(labels == cluster)
        assert (count, share) == (len(own), 100) and name == ("space" if is_spaced[own[0]] else "none")
        closest = own[np.linalg.norm(x[own] - kmeans.cluster_centers_[cluster], axis=1).argmin()]
        assert texts[0] == model.texts[closest]


@pytest.mark.parametrize(
    "command, options, message",
    [
        ("clusters", {"layers": ("0", "2")}, "layers: expected layers from 0 to 1, such as 0,1, found '2'"),
        ("clusters", {"clusters": 101}, "clusters: expected from 2 to 100, found 101"),
        ("clusters", {"sample": 20}, "sample: expected more than the 20 clusters, found 20"),
        ("clustering", {"neighbours": 512}, "neighbours: expected from 2 to fewer than the 512 tokens, found 512"),
    ],
)
def test_refusals(token_keys, run, command, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(command, token_keys, **options)
