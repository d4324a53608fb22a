"""Clusters of tokens by their coefficient vectors, and what the tokens of a cluster share.

K-means and the projections are scikit-learn's. Vectors are brought to unit length, so that clusters differ in direction
and not in size. The paper does not say whether it does the same.
"""

import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import token_classes, topk
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.common import errors, options, plots
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report

_EPOCHS = 3  # passes of mini-batch K-means over the vocabulary
_PICTURES = {"tsne": "t-SNE", "pca": "PCA"}
_EXAMPLES = 10  # tokens nearest to a cluster's centre that the page lists

Layers = Annotated[tuple[str, ...], Option("layers to look at, such as 0,5,11; by default all")]
Clusters = Annotated[int, Option("number of K-means clusters", least=2)]
Seed = Annotated[int, Option("seed of the random draws")]


def sklearn(module: str):
    """Imports a module of scikit-learn, which is optional. Raises: UserError if it is not installed."""
    return errors.require(f"sklearn.{module}", "analyze", "clusters")


def unit_coefficients(model: KeyValueModel, layer: int, ids_N) -> jax.Array:
    """FFN-M's coefficient vectors of tokens, brought to unit length: c / |c|, float32 [N, F]."""
    return _unit(model.token_coefficients(layer, ids_N).astype(jnp.float32))


@jax.jit
def _unit(c_NF):
    # The 1e-30 keeps a vector of zeros from becoming NaN.
    return c_NF * jax.lax.rsqrt(jnp.square(c_NF).sum(-1, keepdims=True) + 1e-30)


def unit_on_host(model: KeyValueModel, layer: int, ids_N: np.ndarray) -> np.ndarray:
    """`unit_coefficients` as an array in the host's memory, computed chunk by chunk."""
    chunks = []
    for ids_C, is_real_C in model.chunks(ids_N):
        chunks.append(np.asarray(unit_coefficients(model, layer, ids_C))[is_real_C])
    return np.concatenate(chunks)


def check(model: KeyValueModel, clusters: int, sample: int) -> None:
    """Checks the options that `clusters` and `clustering` share, before the work begins.

    Raises: UserError if a number does not fit the model, or scikit-learn is not installed.
    """
    sklearn("cluster")
    # K-means draws its first centres from the first chunk, which must have enough tokens.
    most = min(model.config.vocab_size - 1, model.sizes.tokens)
    if not 2 <= clusters <= most:
        raise ArgumentError("clusters", f"expected from 2 to {most}, found {clusters}")
    if sample <= clusters:
        raise ArgumentError("sample", f"expected more than the {clusters} clusters, found {sample}")


def chosen_layers(model: KeyValueModel, texts: tuple[str, ...]) -> list[int]:
    """The layers that the option names; all if it is empty. Raises: ArgumentError."""
    L = model.config.layers
    if not texts:
        return list(range(L))
    return list(options.layers(texts, "layers", L))


def fit(
    model: KeyValueModel,
    vectors: Callable[[np.ndarray], jax.Array],
    count: int,
    seed: int,
    step: Callable[[], None] = lambda: None,
):
    """Fits K-means to the vectors of all tokens, a chunk of the vocabulary at a time.

    Args:
      vectors: a function ids [n] -> [n, F], such as `unit_coefficients` of one layer.
      step: called after each chunk.
    Returns: (cluster of each token [V], scikit-learn's fitted MiniBatchKMeans).
    """
    # reassignment_ratio=0: scikit-learn would otherwise move the centres of small clusters to tokens drawn at random.
    kmeans = sklearn("cluster").MiniBatchKMeans(count, random_state=seed, n_init=3, reassignment_ratio=0.0)
    draw = np.random.default_rng(seed)
    for _ in range(_EPOCHS):
        # Ids that are close are alike, such as all bytes or all rare words, so chunks are drawn in random order.
        for ids_C, is_real_C in model.chunks(draw.permutation(model.every_id)):
            kmeans.partial_fit(np.asarray(vectors(ids_C))[is_real_C])
            step()
    labels = []
    # A pass of its own, because centres moved until the end of the last one.
    for ids_C, is_real_C in model.chunks(model.every_id):
        labels.append(kmeans.predict(np.asarray(vectors(ids_C)))[is_real_C])
        step()
    return np.concatenate(labels), kmeans


def clusters(
    model: KeyValueModel,
    page: Report,
    *,
    layers: Layers = (),
    clusters: Clusters = 20,
    sample: Annotated[int, Option("tokens, drawn at random, that the pictures show")] = 2000,
    picture: Annotated[str, Option("projection of the pictures", choices=tuple(_PICTURES))] = "tsne",
    seed: Seed = 0,
) -> dict:
    """K-means on the tokens' coefficient vectors, a picture of them, and how pure clusters are in classes by text.

    MemoryLLM, section 3.1 and figure 5: c of FFN-M for every token of the vocabulary, clustered by K-means (here
    scikit-learn's MiniBatchKMeans on vectors of unit length) and shown by t-SNE, or PCA, of a sample of tokens. Purity
    (Manning et al. 2008, section 16.3) is the share of tokens that belong to the commonest class of their cluster, for
    three classifications by text alone: kind (punctuation, digits, capitalised, ...), leading space, script (a stand-in
    for the language). It is compared with the purity of the same clusters with their tokens shuffled. These measures
    are ours.
    """
    model.require_memory("clusters")
    check(model, clusters, sample)
    chosen = chosen_layers(model, layers)
    classes = token_classes.classes(model.texts)
    V = len(model.texts)
    draw = np.random.default_rng(seed)
    pictured = {chosen[0], chosen[len(chosen) // 2], chosen[-1]}
    # Drawn once, so that the pictures of all layers show the same tokens.
    sampled_N = np.sort(draw.choice(V, min(sample, V), replace=False)).astype(np.int32)
    passes = _EPOCHS + 2  # one more each to label the tokens and to find those nearest to the centres
    progress = Progress("clusters", len(chosen) * passes * model.chunk_count(V), "chunk")
    rows, examples, pictures = [], [], {}
    with page.csv("tokens", ["layer", "token", "text", "cluster"]) as write:
        for layer in chosen:
            vectors = functools.partial(unit_coefficients, model, layer)
            labels_V, kmeans = fit(model, vectors, clusters, seed, lambda: progress.update(progress.done + 1))
            write([layer, t, text, k] for t, (text, k) in enumerate(zip(model.texts, labels_V)))
            rows.append({"layer": layer} | _purities(labels_V, draw.permutation(labels_V), classes))
            nearest = nearest_to_centres(model, layer, labels_V, kmeans, lambda: progress.update(progress.done + 1))
            examples += [[layer, *line] for line in cluster_lines(labels_V, nearest, classes["kind"], model.texts)]
            if layer in pictured:
                pictures[layer] = _picture(model, layer, sampled_N, labels_V, classes["kind"], picture, seed)
    progress.close()
    names = [name for name in rows[0] if name.removesuffix(", chance") in classes]
    page.figure(
        "purity",
        plots.by_layer({name: [100 * row[name] for row in rows] for name in names}, "purity, %", layers=chosen),
        f"Purity of {clusters} clusters in classes by text alone, and of the same with tokens shuffled.",
    )
    for layer, figure in pictures.items():
        page.figure(
            f"layer{layer}",
            figure,
            f"Coefficient vectors of {len(sampled_N):,} tokens in layer {layer}, by {_PICTURES[picture]}; colour is "
            "the kind of the token, and each cluster is labelled with a token of its commonest kind near its middle.",
        )
    page.heading("Clusters, by the tokens nearest to their centres")
    head = ["layer", "cluster", "tokens", "commonest kind", "its share, %", "nearest to the centre"]
    page.table(head, examples)
    return {"layers": rows}


def _purities(labels_V, shuffled_V, classes) -> dict[str, float]:
    """A layer's number of clusters, its largest one, and its purity in each classification, beside that by chance."""
    out = {"clusters": len(np.unique(labels_V)), "largest": int(np.bincount(labels_V).max())}
    for name, classes_V in classes.items():
        out[name] = token_classes.purity(labels_V, classes_V)
        out[f"{name}, chance"] = token_classes.purity(shuffled_V, classes_V)
    return out


def nearest_to_centres(
    model: KeyValueModel, layer: int, labels_V: np.ndarray, kmeans, step: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Finds the tokens of each cluster that are nearest to its centre.

    Args:
      labels_V: the cluster of each token, as `fit` returns it.
      kmeans: the fitted MiniBatchKMeans.
      step: called after each chunk.
    Returns: token ids [clusters, 10], nearest first, and -1 where a cluster has fewer tokens.
    """
    centres_KF = jnp.asarray(kmeans.cluster_centers_, jnp.float32)
    top = topk.empty(len(centres_KF), _EXAMPLES)
    for ids_C, is_real_C in model.chunks(model.every_id):
        near_KC = _nearness(unit_coefficients(model, layer, ids_C), centres_KF)
        own_KC = is_real_C & (labels_V[ids_C] == np.arange(len(centres_KF))[:, None])
        top = topk.merge(top, jnp.where(own_KC, near_KC, -jnp.inf), ids_C)
        step()
    return np.asarray(top.labels_Rk)


@jax.jit
def _nearness(x_CF, centres_KF):
    """|x|^2 - |x - centre|^2, [K, C], which falls with the distance. |x| is 1 for all tokens, so the order is right."""
    return 2 * centres_KF @ x_CF.T - jnp.square(centres_KF).sum(-1, keepdims=True)


def cluster_lines(labels_V: np.ndarray, nearest_Kk: np.ndarray, kinds_V: np.ndarray, texts: list[str]) -> list[list]:
    """Lines of the page's table of clusters, largest cluster first; empty clusters are left out.

    Args:
      labels_V: the cluster of each token.
      nearest_Kk: as `nearest_to_centres` returns them.
      kinds_V: the class of each token.
      texts: the text of every token id.
    Returns: [cluster, tokens, commonest class, its share in percent, texts of the nearest tokens] of each cluster.
    """
    lines = []
    sizes_K = np.bincount(labels_V, minlength=len(nearest_Kk))
    for k in np.argsort(-sizes_K, kind="stable"):
        if sizes_K[k]:
            common = _commonest(kinds_V[labels_V == k])
            tokens = [texts[t] for t in nearest_Kk[k] if t >= 0]
            lines.append([int(k), int(sizes_K[k]), common.name, 100 * common.count / int(sizes_K[k]), tokens])
    return lines


class _Commonest(NamedTuple):
    """The most frequent of some names, and how often it occurs."""

    name: str
    count: int


def _commonest(names_N: np.ndarray) -> _Commonest:
    names, counts = np.unique(names_N, return_counts=True)
    return _Commonest(names[counts.argmax()], int(counts.max()))


def _picture(model, layer, sampled_N, labels_V, kinds_V, how, seed):
    """Draws the sampled tokens in a plane, and labels each cluster with one of its tokens."""
    x_N2 = _plane(unit_on_host(model, layer, sampled_N), how, seed)
    kinds_N, labels_N = kinds_V[sampled_N], labels_V[sampled_N]
    figure, ax = plots.new_figure(8, 6)
    for number, name in enumerate(token_classes.KINDS):
        of_kind_N = kinds_N == name
        if of_kind_N.any():
            label = f"{name} ({of_kind_N.sum():,})"
            ax.scatter(x_N2[of_kind_N, 0], x_N2[of_kind_N, 1], s=7, color=f"C{number}", label=label, linewidths=0)
    box = {"fc": "white", "alpha": 0.7, "lw": 0, "pad": 0.5}
    for k in np.unique(labels_N):
        n = _middle(x_N2, np.flatnonzero(labels_N == k), kinds_N)
        text = _drawable(sampled_N[n], model.texts)
        ax.annotate(text, (x_N2[n, 0], x_N2[n, 1]), fontsize=9, weight="bold", bbox=box)
    # The axes of t-SNE have no unit, so neither a grid nor ticks mean anything.
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel(f"first dimension of {_PICTURES[how]}, without unit")
    ax.set_ylabel("second dimension")
    plots.legend(ax, markerscale=2)
    return figure


def _plane(x_NF: np.ndarray, how: str, seed: int) -> np.ndarray:
    """Projects vectors to two dimensions, [N, 2]."""
    # t-SNE gets the first 50 principal components: distances between all F coefficients would take much longer.
    x = sklearn("decomposition").PCA(min(50, *x_NF.shape), random_state=seed).fit_transform(x_NF)
    if how == "tsne":
        # 30 is scikit-learn's default; the perplexity must be smaller than the number of tokens.
        perplexity = min(30, max(2, len(x) // 4))
        x = sklearn("manifold").TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)
    return x[:, :2]


def _middle(x_N2, own: np.ndarray, kinds_N) -> int:
    """Picks the token that labels a cluster: of its commonest kind, nearest to the median of that kind.

    Args:
      own: places of the cluster's tokens in x_N2.
    Returns: a place in x_N2.
    """
    own = own[kinds_N[own] == _commonest(kinds_N[own]).name]
    return own[np.square(x_N2[own] - np.median(x_N2[own], 0)).sum(1).argmin()]


def _drawable(token: int, texts: list[str]) -> str:
    """A token's text for a picture, or its id and script where the picture's font lacks the text."""
    if plots.drawable(texts[token]):
        return texts[token].replace("$", r"\$")  # a dollar begins mathematics in matplotlib
    return f"#{token} {token_classes.script(texts[token])}"
