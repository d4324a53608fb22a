"""Groups of tokens by their coefficient vectors: K-means, what the groups share, and how close-knit they are.

K-means, silhouette and the projections are scikit-learn's. Vectors are brought to unit length, so that a group is a
direction and not a size; the paper does not say whether its are.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import token_classes, topk, vocabulary
from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.analysis.neighbours import neighbours_of
from memoryllm_jax.analysis.vocabulary import chunk_count, chunks, every_id
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.legacy import at_least, layers_of
from memoryllm_jax.common.progress import Progress

_EPOCHS = 3  # passes of mini-batch K-means over the vocabulary
_ROWS = 4096  # of a graph, squared at a time
_PICTURES = {"tsne": "t-SNE", "pca": "PCA"}
_EXAMPLES = 10  # tokens nearest to a cluster's centre


def _sklearn(module: str):
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise UserError("this analysis needs scikit-learn: pip install 'memoryllm_jax[analyze]'") from error


def unit_coefficients(inside: Inside, layer: int, ids_N):
    """c / |c| of FFN-M, [N, F]."""
    return _unit(inside.token_coefficients(layer, ids_N).astype(jnp.float32))


@jax.jit
def _unit(c_NF):
    return c_NF * jax.lax.rsqrt(jnp.square(c_NF).sum(-1, keepdims=True) + 1e-30)


def _host(inside, layer, ids):
    return np.concatenate([np.asarray(unit_coefficients(inside, layer, i)[: r.sum()]) for i, r in chunks(ids)])


def _check(inside: Inside, clusters: int, sample: int) -> None:
    """Raises: UserError, also without scikit-learn."""
    _sklearn("cluster")
    most = min(inside.config.vocab_size - 1, vocabulary.CHUNK)  # the first chunk gives the first centres
    if not 2 <= clusters <= most:
        raise UserError(f"--clusters: expected from 2 to {most}, found {clusters}")
    if sample <= clusters:
        raise UserError(f"--sample: expected more than the {clusters} clusters, found {sample}")


def fit(inside: Inside, layer: int, count: int, seed: int, step=lambda: None):
    """(cluster of each token [V], scikit-learn's fitted MiniBatchKMeans), a chunk of the vocabulary at a time."""
    model = _sklearn("cluster").MiniBatchKMeans(count, random_state=seed, n_init=3, reassignment_ratio=0.0)
    draw = np.random.default_rng(seed)
    for _ in range(_EPOCHS):
        for ids_C, real_C in chunks(draw.permutation(every_id(inside))):
            model.partial_fit(np.asarray(unit_coefficients(inside, layer, ids_C))[real_C])
            step()
    labels = []
    for ids_C, real_C in chunks(every_id(inside)):
        labels.append(model.predict(np.asarray(unit_coefficients(inside, layer, ids_C)))[real_C])
        step()
    return np.concatenate(labels), model


def clusters(
    inside: Inside,
    page,
    layers: str = "",
    clusters: int = 20,
    sample: int = 2000,
    picture: str = "tsne",
    seed: int = 0,
) -> dict:
    """K-means on the tokens' coefficient vectors, a picture of them, and how pure clusters are in surface classes.

    MemoryLLM, section 3.1 and figure 5: c of FFN-M for every token of the vocabulary, clustered by K-means (here
    scikit-learn's MiniBatchKMeans on vectors of unit length) and shown by t-SNE, or PCA, of a sample of tokens. Purity
    (Manning et al. 2008, section 16.3) is the share of tokens that are of the commonest class of their cluster, for
    three classifications by text alone: kind (punctuation, digits, capitalised, ...), leading space, script (a stand-in
    for the language). It is held against the purity of the same clusters with their tokens shuffled. These measures are
    ours.
    """
    inside.need_memory("clusters")
    if picture not in _PICTURES:
        raise UserError(f"--picture: expected tsne or pca, found {picture!r}")
    _check(inside, clusters, sample)
    chosen = layers_of(layers, inside.config.layers)
    classes, texts = token_classes.classes(inside.texts), inside.texts
    draw = np.random.default_rng(seed)
    pictured = {chosen[0], chosen[len(chosen) // 2], chosen[-1]}
    sampled = np.sort(draw.choice(len(texts), min(sample, len(texts)), replace=False)).astype(np.int32)
    progress = Progress("clusters", len(chosen) * (_EPOCHS + 2) * chunk_count(len(texts)), "chunk")
    step = lambda: progress.update(progress.done + 1)  # noqa: E731
    rows, tables, pictures = [], [], []
    with page.csv("tokens", ["layer", "token", "text", "cluster"]) as write:
        for layer in chosen:
            labels, model = fit(inside, layer, clusters, seed, step)
            write([layer, t, text, k] for t, (text, k) in enumerate(zip(texts, labels)))
            shuffled = draw.permutation(labels)
            row = {"layer": layer, "clusters": len(np.unique(labels)), "largest": int(np.bincount(labels).max())}
            for name, of in classes.items():
                row[name] = token_classes.purity(labels, of)
                row[f"{name}, chance"] = token_classes.purity(shuffled, of)
            rows.append(row)
            tables += _examples(inside, layer, labels, model, classes["kind"], step)
            if layer in pictured:
                pictures.append((layer, _picture(inside, layer, sampled, labels, classes["kind"], picture, seed)))
    progress.close()
    series = {name: [100 * row[name] for row in rows] for name in rows[0] if name.removesuffix(", chance") in classes}
    page.figure(
        "purity",
        plots.by_layer(series, "purity, %", layers=chosen),
        f"Purity of {clusters} clusters in classes that the text alone decides, and of the same with tokens shuffled.",
    )
    for layer, figure in pictures:
        page.figure(
            f"layer{layer}",
            figure,
            f"Coefficient vectors of {len(sampled):,} tokens in layer {layer}, by {_PICTURES[picture]}; colour is the "
            "kind of the token, and each cluster is labelled with a token of its commonest kind near its middle.",
        )
    page.heading("Clusters, by the tokens nearest to their centres")
    page.table(["layer", "cluster", "tokens", "commonest kind", "its share, %", "nearest to the centre"], tables)
    return {"layers": rows}


def _examples(inside, layer, labels, model, kinds, step):
    """A table's row for each cluster, largest first."""
    best = topk.empty(len(model.cluster_centers_), _EXAMPLES)
    centres_KF = jnp.asarray(model.cluster_centers_, jnp.float32)
    for ids_C, real_C in chunks(every_id(inside)):
        near_KC = _nearness(unit_coefficients(inside, layer, ids_C), centres_KF)
        own_KC = real_C & (labels[ids_C] == np.arange(len(centres_KF))[:, None])
        best = topk.merge(best, jnp.where(own_KC, near_KC, -jnp.inf), ids_C)
        step()
    near = np.asarray(best.labels_Rk)
    out = []
    for k in np.argsort(-np.bincount(labels, minlength=len(near)), kind="stable"):
        if (labels == k).any():
            names, counts = np.unique(kinds[labels == k], return_counts=True)
            share = 100 * counts.max() / counts.sum()
            tokens = [inside.texts[t] for t in near[k] if t >= 0]
            out.append([layer, int(k), int(counts.sum()), names[counts.argmax()], float(share), tokens])
    return out


@jax.jit
def _nearness(x_CF, centres_KF):
    return 2 * centres_KF @ x_CF.T - jnp.square(centres_KF).sum(-1, keepdims=True)


def _picture(inside, layer, sampled, labels, kinds, how, seed):
    x_NF = _host(inside, layer, sampled)
    flat = _sklearn("decomposition").PCA(min(50, *x_NF.shape), random_state=seed).fit_transform(x_NF)
    if how == "tsne":
        perplexity = min(30, max(2, len(flat) // 4))
        flat = _sklearn("manifold").TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(flat)
    figure, ax = plots.new_figure(8, 6)
    for number, name in enumerate(token_classes.KINDS):
        of = kinds[sampled] == name
        if of.any():
            ax.scatter(*flat[of, :2].T, s=7, color=f"C{number}", label=f"{name} ({of.sum():,})", linewidths=0)
    for k in np.unique(labels[sampled]):
        own = np.flatnonzero(labels[sampled] == k)
        names, counts = np.unique(kinds[sampled[own]], return_counts=True)
        own = own[kinds[sampled[own]] == names[counts.argmax()]]
        middle = own[np.square(flat[own, :2] - np.median(flat[own, :2], 0)).sum(1).argmin()]
        text = inside.texts[sampled[middle]]
        text = text.replace("$", r"\$") if plots.drawable(text) else f"#{sampled[middle]} {token_classes.script(text)}"
        ax.annotate(
            text, flat[middle, :2], fontsize=9, weight="bold", bbox={"fc": "white", "alpha": 0.7, "lw": 0, "pad": 0.5}
        )
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel(f"first dimension of {_PICTURES[how]}, without unit")
    ax.set_ylabel("second dimension")
    plots.legend(ax, markerscale=2)
    return figure


def clustering(
    inside: Inside,
    page,
    layers: str = "",
    neighbours: int = 10,
    clusters: int = 20,
    tokens: int = 0,
    sample: int = 4000,
    seed: int = 0,
) -> dict:
    """How strongly tokens group by their coefficient vectors, by layer: clustering coefficient and silhouette.

    MemoryLLM, figure 6, shows a clustering coefficient without defining it. Ours is the mean local clustering
    coefficient (Watts and Strogatz 1998) of the graph that joins two tokens if either is among the other's k nearest by
    cosine of c: of the pairs of a token's neighbours, the share that are neighbours themselves. Beside it stands that
    of a random graph of as many edges, which is the share of all pairs that are joined. The silhouette (Rousseeuw 1987,
    scikit-learn's) is that of the K-means clusters of `clusters`, Euclidean on vectors of unit length, on a sample of
    tokens if there are more. The graph is exact over the vocabulary; --tokens draws some to save time.
    """
    inside.need_memory("clustering")
    _check(inside, clusters, sample)
    at_least({"tokens": tokens}, 0)
    chosen = layers_of(layers, inside.config.layers)
    draw, size = np.random.default_rng(seed), inside.config.vocab_size
    count = min(tokens or size, size)
    if not 2 <= neighbours < count:
        raise UserError(f"--neighbours: expected from 2 to fewer than the {count} tokens, found {neighbours}")
    ids = np.sort(draw.choice(size, count, replace=False)).astype(np.int32)
    some = np.sort(draw.choice(size, min(sample, size), replace=False)).astype(np.int32)
    progress = Progress("clustering", len(chosen), "layer")
    rows = []
    for number, layer in enumerate(chosen, 1):
        vectors = functools.partial(unit_coefficients, inside)
        near = neighbours_of(vectors, [layer], ids, ids, neighbours, f"layer {layer}")[1][0]
        coefficient, chance = clustering_coefficient(np.searchsorted(ids, near))
        labels, _ = fit(inside, layer, clusters, seed)
        silhouette = np.nan  # of tokens that are all in one cluster there is none
        if 1 < len(np.unique(labels[some])) < len(some):
            silhouette = float(_sklearn("metrics").silhouette_score(_host(inside, layer, some), labels[some]))
        rows.append({"layer": layer, "coefficient": coefficient, "random_graph": chance, "silhouette": silhouette})
        progress.update(number)
    progress.close()
    with page.csv("layers", list(rows[0])) as write:
        write(row.values() for row in rows)
    pick = lambda name: [row[name] for row in rows]  # noqa: E731
    series = {"nearest neighbours": pick("coefficient"), "random graph of as many edges": pick("random_graph")}
    page.figure(
        "coefficient",
        plots.by_layer(series, "clustering coefficient", layers=chosen),
        f"Mean local clustering coefficient of the {neighbours}-nearest-neighbour graph of {count:,} tokens.",
    )
    page.figure(
        "silhouette",
        plots.by_layer({"silhouette": pick("silhouette")}, "silhouette", layers=chosen),
        f"Mean silhouette of {clusters} K-means clusters on {len(some):,} tokens; 1: tight and apart, 0: overlapping.",
    )
    page.table(list(rows[0]), [list(row.values()) for row in rows])
    return {"layers": rows, "tokens": count, "neighbours": neighbours}


def clustering_coefficient(near_Nk: np.ndarray) -> tuple[float, float]:
    """Mean local clustering coefficient of the graph whose node n is joined with near[n], and the share of joined
    pairs."""
    from scipy import sparse

    N, k = near_Nk.shape
    ones = np.ones(N * k, np.int32)
    graph = sparse.csr_matrix((ones, (np.repeat(np.arange(N), k), near_Nk.reshape(-1))), (N, N))
    graph = graph.maximum(graph.T)
    degree = np.asarray(graph.sum(1)).ravel().astype(np.int64)
    blocks = (graph[start : start + _ROWS] for start in range(0, N, _ROWS))
    closed = np.concatenate([np.asarray((b @ graph).multiply(b).sum(1)).ravel() for b in blocks])  # pairs, both ways
    return float(np.mean(closed / np.maximum(degree * (degree - 1), 1))), float(degree.sum() / (N * (N - 1)))
