"""How tightly tokens group by their coefficient vectors: clustering coefficient and silhouette."""

from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.clusters import (
    Clusters,
    Layers,
    Seed,
    check,
    chosen_layers,
    fit,
    sklearn,
    unit_on_host,
)
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.analysis.neighbours import Neighbours, neighbours_of
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report

_BLOCK = 4096  # rows of the graph's square that are computed at a time
_COMPARED = 3  # tokens that are compared with the whole vocabulary for each node and nearest neighbour, about
_SLACK = 1e-5  # more than what rounding may move a cosine by


def clustering(
    model: KeyValueModel,
    page: Report,
    *,
    layers: Layers = (),
    neighbours: Annotated[int, Option("nearest neighbours that each token is joined with", least=2)] = 10,
    clusters: Clusters = 20,
    nodes: Annotated[int, Option("tokens, drawn at random, whose coefficients are averaged", least=2)] = 300,
    exact: Annotated[bool, Option("average over all tokens instead, which compares every pair of them")] = False,
    sample: Annotated[int, Option("tokens, drawn at random, that the silhouette is measured on")] = 4000,
    seed: Seed = 0,
) -> dict:
    """How strongly tokens group by their coefficient vectors, by layer: clustering coefficient and silhouette.

    MemoryLLM, figure 6, shows a clustering coefficient without defining it. Ours is the mean local clustering
    coefficient (Watts and Strogatz 1998) of the graph that joins two tokens if either is among the other's k nearest by
    cosine of c: of the pairs of a token's neighbours, the share that are joined themselves. It is compared with that of
    a random graph of as many edges, which is the share of all pairs that are joined. The graph is that of the whole
    vocabulary. The mean is over --nodes tokens, with its standard error; or over all of them, with --exact or where the
    vocabulary is so small that this takes less time.

    The silhouette (Rousseeuw 1987, scikit-learn's) is that of the K-means clusters of `clusters`, Euclidean on vectors
    of unit length, on a sample of tokens if there are more.
    """
    model.require_memory("clustering")
    check(model, clusters, sample)
    chosen = chosen_layers(model, layers)
    V = model.config.vocab_size
    if neighbours >= V:
        raise ArgumentError("neighbours", f"expected from 2 to fewer than the {V} tokens, found {neighbours}")
    draw = np.random.default_rng(seed)
    nodes_S = None
    # Of a small vocabulary all nodes take less time: some nodes need the nearest tokens of their neighbours, and of
    # about as many tokens that turn out not to be neighbours.
    if not exact and nodes * _COMPARED * neighbours < V:
        nodes_S = np.sort(draw.choice(V, nodes, replace=False)).astype(np.int32)
    sampled = np.sort(draw.choice(V, min(sample, V), replace=False)).astype(np.int32)
    progress = Progress("clustering", len(chosen), "layer")
    rows = []
    for layer in chosen:
        # Made once a layer, because several passes read it. It is the largest array of this analysis.
        unit_VF = jnp.asarray(unit_on_host(model, layer, model.every_id))
        labels_V, _ = fit(model, unit_VF.__getitem__, clusters, seed)
        graph = nodes_of(model, unit_VF, labels_V, nodes_S, neighbours, f"layer {layer}")
        coefficient, error = mean_and_error(graph.coefficient_S, V)
        silhouette = _silhouette(np.asarray(unit_VF[sampled]), labels_V[sampled])
        chance = float(graph.degree_S.mean() / (V - 1))
        row = {"layer": layer, "coefficient": coefficient, "error": error, "random_graph": chance}
        rows.append(row | {"silhouette": silhouette})
        progress.update(progress.done + 1)
    progress.close()
    _show(page, rows, neighbours, clusters, len(sampled), len(graph.degree_S))
    return {"layers": rows, "nodes": len(graph.degree_S), "neighbours": neighbours}


def nodes_of(model, unit_VF, labels_V, nodes_S, k, label) -> "Nodes":
    """The nodes of a layer's graph: those of tokens nodes_S, or all of them if it is None.

    Args:
      unit_VF: vectors of unit length of all tokens.
      labels_V: as of `some_nodes`; not read if nodes_S is None.
      k: nearest neighbours that each token is joined with.
      label: name of the progress that is shown where every pair of tokens is compared; "" to show none.
    """
    nearest = Nearest(model, lambda _, ids: unit_VF[ids], k)
    if nodes_S is None:
        return all_nodes(nearest(model.every_id, model.every_id, label).ids[0])

    def dots(ids_S):
        x_SF = unit_VF[ids_S]
        for ids_C, is_real_C in model.chunks(model.every_id):
            yield np.asarray(x_SF @ unit_VF[ids_C].T)[:, is_real_C]

    return some_nodes(nearest, dots, labels_V, nodes_S)


def mean_and_error(values_S: np.ndarray, population: int) -> tuple[float, float]:
    """The mean of values that were drawn without replacement, and its standard error, which is 0 for all of them."""
    S = len(values_S)
    left_out = 1 - S / population
    return float(values_S.mean()), float(values_S.std(ddof=1) * np.sqrt(left_out / S))


def _show(page, rows, neighbours, clusters, sampled, nodes):
    """Puts table, CSV and figures on the page."""
    lines, chosen = [list(row.values()) for row in rows], [row["layer"] for row in rows]
    with page.csv("layers", list(rows[0])) as write:
        write(lines)
    series = {
        "nearest neighbours": [row["coefficient"] for row in rows],
        "random graph of as many edges": [row["random_graph"] for row in rows],
    }
    widest = max(row["error"] for row in rows)
    page.figure(
        "coefficient",
        plots.by_layer(series, "clustering coefficient", layers=chosen),
        f"Local clustering coefficient of the {neighbours}-nearest-neighbour graph, mean of {nodes:,} tokens; "
        f"standard errors are at most {widest:.3f}.",
    )
    page.figure(
        "silhouette",
        plots.by_layer({"silhouette": [row["silhouette"] for row in rows]}, "silhouette", layers=chosen),
        f"Mean silhouette of {clusters} K-means clusters on {sampled:,} tokens; 1: tight and apart, 0: overlap.",
    )
    page.table(list(rows[0]), lines)


def _silhouette(unit_NF, labels_N) -> float:
    """Mean silhouette of tokens; NaN if they are all in one cluster, or each is in its own."""
    # scikit-learn raises an error for such a sample, as the silhouette is undefined.
    if not 1 < len(np.unique(labels_N)) < len(labels_N):
        return np.nan
    return float(sklearn("metrics").silhouette_score(unit_NF, labels_N))


class Nearest:
    """Finds the k tokens that are nearest to each of some tokens, by one layer's vectors."""

    def __init__(self, model: KeyValueModel, vectors: Callable[[int, np.ndarray], jax.Array], k: int):
        self.model, self.vectors, self.k = model, vectors, k

    def __call__(self, queries_Q: np.ndarray, ids_N: np.ndarray, label: str = "") -> Neighbours:
        return neighbours_of(self.model, self.vectors, [0], queries_Q, ids_N, self.k, label)


class Nodes(NamedTuple):
    """Some nodes of the graph that joins two tokens if either is among the other's nearest.

    Attributes:
      coefficient_S: local clustering coefficient (Watts and Strogatz 1998) of each node: the share of the pairs of its
        neighbours that are joined themselves; 0 for a node with one neighbour.
      degree_S: how many neighbours each node has.
    """

    coefficient_S: np.ndarray
    degree_S: np.ndarray


def all_nodes(near_Nk: np.ndarray) -> Nodes:
    """The whole graph.

    Args:
      near_Nk: node n is joined with the nodes near_Nk[n]; an edge has no direction.
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
    return Nodes(np.concatenate(joined) / pairs_N, degree_N)


def some_nodes(
    nearest: Nearest, dots: Callable[[np.ndarray], Iterator[np.ndarray]], labels_V: np.ndarray, nodes_S: np.ndarray
) -> Nodes:
    """Some nodes of the graph, exactly, without comparing every pair of tokens.

    A node's neighbours are the tokens near it, which one pass finds, and those that it is near to. A token can only be
    of the latter if the node is nearer to it than the k-th nearest of its own cluster, which is at most as near as its
    k-th nearest of all. So only these few tokens, and the neighbours, are compared with every token.

    Args:
      nearest: finds neighbours.
      dots: yields the cosines [S, C] of the tokens [S] and of consecutive chunks of the vocabulary.
      labels_V: the cluster of each token, whatever it comes from: good clusters only make this faster.
      nodes_S: token ids.
    """
    bound_V = np.full(len(labels_V), -np.inf, np.float32)
    for cluster in np.unique(labels_V):
        members = np.flatnonzero(labels_V == cluster).astype(np.int32)
        if len(members) > nearest.k:
            bound_V[members] = nearest(members, members).cosines[0][:, -1]
    candidates, start = [], 0
    for dots_SC in dots(nodes_S):
        # Products of other shapes may differ in the last bits. A candidate too many costs time alone.
        pairs = np.argwhere(dots_SC >= bound_V[start : start + dots_SC.shape[1]] - _SLACK)
        candidates.append(pairs + np.array([0, start]))
        start += dots_SC.shape[1]
    candidate_P2 = np.concatenate(candidates)
    near = _Near(nearest, len(labels_V))
    near.add(np.union1d(nodes_S, candidate_P2[:, 1]))
    members_of = []
    for number, node in enumerate(nodes_S):
        maybe = candidate_P2[candidate_P2[:, 0] == number, 1]
        reached_by = maybe[(near[maybe] == node).any(1)]
        members_of.append(np.union1d(near[[node]][0], reached_by))
    near.add(np.unique(np.concatenate(members_of)))
    coefficients = [_local(members, near[members]) for members in members_of]
    return Nodes(np.array(coefficients), np.array([len(members) for members in members_of]))


class _Near:
    """The nearest tokens of those of V tokens that were added so far."""

    def __init__(self, nearest: Nearest, V: int):
        self._nearest, self._every_id = nearest, np.arange(V, dtype=np.int32)
        self._place_V = np.full(V, -1)
        self._near_Nk = np.empty((0, nearest.k), np.int32)

    def add(self, ids: np.ndarray) -> None:
        """Finds the nearest of all tokens for those of the distinct ids that are new."""
        new = ids[self._place_V[ids] < 0].astype(np.int32)
        if len(new):
            self._place_V[new] = len(self._near_Nk) + np.arange(len(new))
            self._near_Nk = np.concatenate([self._near_Nk, self._nearest(new, self._every_id).ids[0]])

    def __getitem__(self, ids) -> np.ndarray:
        """[n, k], the nearest tokens of tokens that were added."""
        return self._near_Nk[self._place_V[ids]]


def _local(members_d: np.ndarray, near_dk: np.ndarray) -> float:
    """Share of the pairs of d tokens, in rising order, that are joined. near_dk: the nearest tokens of each of them."""
    d = len(members_d)
    if d < 2:
        return 0.0
    place_dk = np.searchsorted(members_d, near_dk).clip(max=d - 1)
    row, column = np.nonzero(members_d[place_dk] == near_dk)
    joined_dd = np.zeros((d, d), bool)
    joined_dd[row, place_dk[row, column]] = True
    return float((joined_dd | joined_dd.T).sum() / (d * (d - 1)))
