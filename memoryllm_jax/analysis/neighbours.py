"""The most similar tokens, by their memory rows or any other vectors. Every pair of tokens is compared."""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import topk
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.analysis.vocabulary import FrequencyData, Token, Tokens, chosen_tokens
from memoryllm_jax.common import plots
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report
from memoryllm_jax.inference import vocabulary

_LISTED = 300  # tokens in the page's table
_SHOWN = 6  # neighbours of each that the table shows


class Neighbours(NamedTuple):
    """The k other tokens that are most similar to each of Q tokens, most similar first.

    cosines, ids: [layers + 1, Q, k], by each layer, and in the last place by all layers together.
    """

    cosines: np.ndarray
    ids: np.ndarray


def neighbours_of(
    model: KeyValueModel,
    vectors: Callable[[int, np.ndarray], jax.Array],
    layers: Sequence[int],
    queries_Q: np.ndarray,
    ids_N: np.ndarray,
    k: int,
    label: str = "",
    report: Callable[[float], None] | None = None,
) -> Neighbours:
    """Finds the tokens among ids_N that are most similar to each token of queries_Q, by the cosine of their vectors.

    Args:
      vectors: a function (layer, ids [n]) -> [n, W]. All layers together mean these vectors side by side.
      layers: layers to compare tokens in.
      k: neighbours of each token, at most one less than the tokens ids_N.
      label: name of the progress that is shown; "" to show none.
      report: called after each chunk and layer, as by `Progress`.
    """
    size = model.sizes.neighbours
    # Each block makes its own pass over ids_N: only the queries of one block are kept on the device.
    blocks = [chunk.real_ids for chunk in vocabulary.chunks(queries_Q, size)]
    total = len(blocks) * model.chunk_count(len(ids_N)) * len(layers)
    progress = Progress(label, total, "chunk", enabled=bool(label), report=report)
    found = []
    for block_Q in blocks:
        tops = _neighbours_of_block(model, vectors, layers, block_Q, ids_N, k, progress)
        cosines, ids = zip(*jax.device_get(tops))
        found.append(Neighbours(np.stack(cosines), np.stack(ids)))
    progress.close()
    return Neighbours(*(np.concatenate(parts, axis=1) for parts in zip(*found)))


def _neighbours_of_block(model, vectors, layers, block_Q, ids_N, k, progress) -> list[topk.TopK]:
    """Makes one pass over ids_N. Returns: neighbours by each layer, then by all layers together."""
    queries_QW = [_vectors_of(model, vectors, layer, block_Q) for layer in layers]
    squares_Q = [jnp.square(x_QW).sum(-1) for x_QW in queries_QW]
    all_squares_Q = sum(squares_Q)
    by_layer = [topk.empty(len(block_Q), k) for _ in layers]
    together = topk.empty(len(block_Q), k)
    for ids_C, is_real_C in model.chunks(ids_N):
        # Vectors side by side need not be built: their dot products and squares are sums of those of the layers.
        all_dots_QC, all_squares_C = 0.0, 0.0
        for number, layer in enumerate(layers):
            dots_QC, squares_C = _products(queries_QW[number], vectors(layer, ids_C))
            all_dots_QC = all_dots_QC + dots_QC
            all_squares_C = all_squares_C + squares_C
            products = dots_QC, squares_Q[number], squares_C
            by_layer[number] = _merge(by_layer[number], *products, block_Q, ids_C, is_real_C)
            progress.update(progress.done + 1)
        if len(layers) > 1:
            products = all_dots_QC, all_squares_Q, all_squares_C
            together = _merge(together, *products, block_Q, ids_C, is_real_C)
    if len(layers) == 1:
        together = by_layer[0]
    return [*by_layer, together]


def _vectors_of(model, vectors, layer, ids_N):
    """The vectors of tokens in one layer, [N, W], computed in chunks of one shape."""
    return jnp.concatenate([vectors(layer, ids_C)[: is_real_C.sum()] for ids_C, is_real_C in model.chunks(ids_N)])


@jax.jit
def _products(x_QW, y_CW):
    """Dot products [Q, C] of all pairs, and the squared lengths [C] of y."""
    return x_QW @ y_CW.T, jnp.square(y_CW).sum(-1)


@jax.jit
def _merge(top, dots_QC, squares_Q, squares_C, queries_Q, ids_C, is_real_C):
    """The nearest of those found before and of a chunk of tokens. A token is not its own neighbour."""
    # The 1e-30 makes the cosine with a vector of zeros 0 and not NaN.
    cosine_QC = dots_QC * jax.lax.rsqrt(squares_Q[:, None] * squares_C + 1e-30)
    is_other_QC = is_real_C & (queries_Q[:, None] != ids_C)
    return topk.merge(top, jnp.where(is_other_QC, cosine_QC, -jnp.inf), ids_C)


def neighbours(
    model: KeyValueModel,
    page: Report,
    *,
    token: Token = (),
    tokens: Tokens = 500,
    top: Annotated[int, Option("neighbours of each token", least=1)] = 10,
    data: FrequencyData = "",
) -> dict:
    """The tokens with the most similar memory rows, by layer and over all layers.

    The similarity of two tokens in layer l is the cosine of their rows FFN-M_l(NM_l(E[t])). Over all layers it is the
    cosine of the rows of all layers side by side, which is how a ToL file holds them (MemoryLLM, section 2.3.2). Every
    token of the vocabulary is compared. The measure is ours: the paper shows no neighbours.
    """
    model.require_memory("neighbours")
    chosen_Q = chosen_tokens(model, page, token, tokens, data)
    L = model.config.layers
    top = min(top, model.config.vocab_size - 1)
    near = neighbours_of(model, model.rows, range(L), chosen_Q, model.every_id, top, "neighbours")
    _write_tokens(model, page, chosen_Q, near)
    shared = [_shared(near.ids[layer], near.ids[L]) for layer in range(L)]
    _draw(page, near, shared)
    _nearest_table(model, page, chosen_Q, near)
    return {
        "tokens": chosen_Q,
        "layers": [*map(str, range(L)), "all"],
        "neighbours": near.ids,
        "cosine": near.cosines.round(5),
        "shared_with_all": shared,
    }


def _shared(a_Qk, b_Qk) -> float:
    """The share of a token's neighbours a_k that are also among its neighbours b_k; mean over tokens."""
    return float(np.mean([len(np.intersect1d(a_k, b_k)) / len(a_k) for a_k, b_k in zip(a_Qk, b_Qk)]))


def _write_tokens(model, page, chosen_Q, near):
    """Writes all neighbours as CSV."""
    L, texts = model.config.layers, model.texts
    with page.csv("tokens", ["layer", "token", "text", "rank", "neighbour", "neighbour_text", "cosine"]) as write:
        for layer in range(L + 1):
            name = "all" if layer == L else str(layer)
            for q, t in enumerate(chosen_Q):
                for rank, (n, cosine) in enumerate(zip(near.ids[layer, q], near.cosines[layer, q]), 1):
                    write([[name, t, texts[t], rank, n, texts[n], f"{cosine:.5f}"]])


def _draw(page, near, shared):
    """Figures of shared neighbours and of cosines by layer."""
    layers, tokens, top = len(shared), near.ids.shape[1], near.ids.shape[2]
    series = {f"shares of the {top} neighbours over all layers": [100 * share for share in shared]}
    page.figure(
        "by_layer",
        plots.by_layer(series, "shared neighbours, %"),
        f"Share of a token's {top} nearest in one layer that are among its {top} nearest over all layers; mean of "
        f"{tokens:,} tokens.",
    )
    nearest = [float(cosine_Qk[:, 0].mean()) for cosine_Qk in near.cosines]
    series = {"layer by layer": nearest[:layers], "all layers together": [nearest[layers]] * layers}
    page.figure(
        "cosine",
        plots.by_layer(series, "cosine"),
        "Cosine of a token's row and its nearest neighbour's row; mean over tokens.",
    )


def _nearest_table(model, page, chosen_Q, near):
    """The page's table of the nearest neighbours."""
    L, texts = model.config.layers, model.texts
    # A dict, in which layers that coincide in a small model stand once.
    shown = {L: "all layers", 0: "layer 0", L // 2: f"layer {L // 2}", L - 1: f"layer {L - 1}"}
    rows = []
    for q, t in enumerate(chosen_Q[:_LISTED]):
        rows.append([texts[t], *([texts[n] for n in near.ids[layer, q, :_SHOWN]] for layer in shown)])
    page.heading("Nearest over all layers, and in the first, middle and last")
    page.table(["token", *shown.values()], rows)
