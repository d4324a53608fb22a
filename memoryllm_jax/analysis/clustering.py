"""How tightly tokens group by their coefficient vectors: clustering coefficient and silhouette."""

import functools
from typing import Annotated

import numpy as np

from memoryllm_jax.analysis.clusters import (
    Clusters,
    Layers,
    Seed,
    check,
    chosen_layers,
    fit,
    sklearn,
    unit_coefficients,
    unit_on_host,
)
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.analysis.neighbours import neighbours_of
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report

_BLOCK = 4096  # rows of the graph's square that are computed at a time


def clustering(
    model: KeyValueModel,
    page: Report,
    *,
    layers: Layers = (),
    neighbours: Annotated[int, Option("nearest neighbours that each token is joined with", least=2)] = 10,
    clusters: Clusters = 20,
    tokens: Annotated[int, Option("tokens of the graph, drawn at random; 0: all", least=0)] = 0,
    sample: Annotated[int, Option("tokens, drawn at random, that the silhouette is measured on")] = 4000,
    seed: Seed = 0,
) -> dict:
    """How strongly tokens group by their coefficient vectors, by layer: clustering coefficient and silhouette.

    MemoryLLM, figure 6, shows a clustering coefficient without defining it. Ours is the mean local clustering
    coefficient (Watts and Strogatz 1998) of the graph that joins two tokens if either is among the other's k nearest by
    cosine of c: of the pairs of a token's neighbours, the share that are joined themselves. It is compared with that of
    a random graph of as many edges, which is the share of all pairs that are joined. The graph is exact over the
    vocabulary; --tokens draws some to save time.

    The silhouette (Rousseeuw 1987, scikit-learn's) is that of the K-means clusters of `clusters`, Euclidean on vectors
    of unit length, on a sample of tokens if there are more.
    """
    model.require_memory("clustering")
    check(model, clusters, sample)
    chosen = chosen_layers(model, layers)
    V = model.config.vocab_size
    count = min(tokens or V, V)
    if neighbours >= count:
        raise ArgumentError("neighbours", f"expected from 2 to fewer than the {count} tokens, found {neighbours}")
    draw = np.random.default_rng(seed)
    ids_N = np.sort(draw.choice(V, count, replace=False)).astype(np.int32)
    sampled = np.sort(draw.choice(V, min(sample, V), replace=False)).astype(np.int32)
    progress = Progress("clustering", len(chosen), "layer")
    rows = []
    for layer in chosen:
        vectors = functools.partial(unit_coefficients, model)
        near = neighbours_of(model, vectors, [layer], ids_N, ids_N, neighbours, f"layer {layer}")
        # Nodes are numbered by their place in ids_N, which is sorted.
        coefficient, chance = clustering_coefficient(np.searchsorted(ids_N, near.ids[0]))
        labels_V, _ = fit(model, layer, clusters, seed)
        silhouette = _silhouette(model, layer, sampled, labels_V)
        rows.append({"layer": layer, "coefficient": coefficient, "random_graph": chance, "silhouette": silhouette})
        progress.update(progress.done + 1)
    progress.close()
    lines = [list(row.values()) for row in rows]
    with page.csv("layers", list(rows[0])) as write:
        write(lines)
    series = {
        "nearest neighbours": [row["coefficient"] for row in rows],
        "random graph of as many edges": [row["random_graph"] for row in rows],
    }
    page.figure(
        "coefficient",
        plots.by_layer(series, "clustering coefficient", layers=chosen),
        f"Mean local clustering coefficient of the {neighbours}-nearest-neighbour graph of {count:,} tokens.",
    )
    page.figure(
        "silhouette",
        plots.by_layer({"silhouette": [row["silhouette"] for row in rows]}, "silhouette", layers=chosen),
        f"Mean silhouette of {clusters} K-means clusters on {len(sampled):,} tokens; 1: tight and apart, 0: overlap.",
    )
    page.table(list(rows[0]), lines)
    return {"layers": rows, "tokens": count, "neighbours": neighbours}


def _silhouette(model, layer, sampled, labels_V) -> float:
    """Mean silhouette of the sampled tokens; NaN if they are all in one cluster, or each is in its own."""
    labels = labels_V[sampled]
    # scikit-learn raises an error for such a sample, as the silhouette is undefined.
    if not 1 < len(np.unique(labels)) < len(sampled):
        return np.nan
    return float(sklearn("metrics").silhouette_score(unit_on_host(model, layer, sampled), labels))


def clustering_coefficient(near_Nk: np.ndarray) -> tuple[float, float]:
    """The clustering coefficient of a graph, and what it is in a random graph of as many edges.

    Args:
      near_Nk: node n is joined with the nodes near_Nk[n]; an edge has no direction.
    Returns: (mean local clustering coefficient, share of all pairs of nodes that are joined).
    """
    from scipy import sparse  # comes with scikit-learn, which is optional

    N, k = near_Nk.shape
    nodes = np.repeat(np.arange(N), k)
    graph = sparse.csr_matrix((np.ones(N * k, np.int32), (nodes, near_Nk.reshape(-1))), (N, N))
    graph = graph.maximum(graph.T)  # two nodes are joined if either is near the other
    # int64, because the square below overflows int32 for a node that is near more than 46,340 others.
    degree_N = np.asarray(graph.sum(1)).ravel().astype(np.int64)
    joined = []  # for each node, the pairs of its neighbours that are joined, each counted both ways
    # In blocks, because the square of the whole graph has far more entries than the graph.
    for start in range(0, N, _BLOCK):
        block = graph[start : start + _BLOCK]
        paths = block @ graph  # paths of two edges; those between joined nodes close a triangle
        joined.append(np.asarray(paths.multiply(block).sum(1)).ravel())
    pairs_N = np.maximum(degree_N * (degree_N - 1), 1)  # at least 1: a node with one neighbour has coefficient 0
    return float(np.mean(np.concatenate(joined) / pairs_N)), float(degree_N.sum() / (N * (N - 1)))
