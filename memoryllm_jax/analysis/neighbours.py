"""Which tokens are most alike, by their memory rows or any other vectors; every pair is compared."""

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import topk
from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.analysis.vocabulary import chosen_tokens, chunk_count, chunks, every_id
from memoryllm_jax.common import plots
from memoryllm_jax.common.legacy import at_least
from memoryllm_jax.common.progress import Progress

_QUERIES = 4096  # tokens whose neighbours are sought in one pass


def neighbours_of(vectors, layers: list[int], queries_Q, ids_N, k: int, label: str):
    """The k most similar of tokens ids_N to each query token by cosine, each layer by itself and all together.

    Args:
      vectors: (layer, ids [n]) -> [n, W].
    Returns: (cosines, ids) [layers + 1, Q, k]; the last is of all the layers' vectors side by side.
    """
    found = []
    blocks = [queries_Q[start : start + _QUERIES] for start in range(0, len(queries_Q), _QUERIES)]
    progress = Progress(label, len(blocks) * chunk_count(len(ids_N)) * len(layers), "chunk")
    done = 0
    for block in blocks:
        wanted = {layer: jnp.concatenate(_vectors_of(vectors, layer, block)) for layer in layers}
        best = [topk.empty(len(block), k) for _ in layers]
        together = topk.empty(len(block), k)
        squares_Q = sum(jnp.square(x).sum(-1) for x in wanted.values())
        for ids_C, real_C in chunks(ids_N):
            dots_QC, squares_C = 0.0, 0.0
            for number, layer in enumerate(layers):
                x_CW = vectors(layer, ids_C)
                dots, squares = _products(wanted[layer], x_CW)
                dots_QC, squares_C = dots_QC + dots, squares_C + squares
                own = jnp.square(wanted[layer]).sum(-1)
                best[number] = _merge(best[number], dots, own, squares, block, ids_C, real_C)
                done += 1
                progress.update(done)
            if len(layers) > 1:
                together = _merge(together, dots_QC, squares_Q, squares_C, block, ids_C, real_C)
        found.append(jax.device_get([*best, together if len(layers) > 1 else best[0]]))
    progress.close()
    whole = [[np.concatenate([of[i][j] for of in found]) for i in range(len(layers) + 1)] for j in (0, 1)]
    return np.stack(whole[0]), np.stack(whole[1])


def _vectors_of(vectors, layer, ids):
    return [vectors(layer, ids_C)[: real_C.sum()] for ids_C, real_C in chunks(ids)]


@jax.jit
def _products(x_QW, y_CW):
    return x_QW @ y_CW.T, jnp.square(y_CW).sum(-1)


@jax.jit
def _merge(best, dots_QC, squares_Q, squares_C, queries_Q, ids_C, real_C):
    cosine_QC = dots_QC * jax.lax.rsqrt(squares_Q[:, None] * squares_C + 1e-30)
    other = real_C & (queries_Q[:, None] != ids_C)
    return topk.merge(best, jnp.where(other, cosine_QC, -jnp.inf), ids_C)


def neighbours(inside: Inside, page, token: list[str] = (), tokens: int = 500, top: int = 10, data: str = "") -> dict:
    """Tokens with the most similar memory rows, by layer and over all.

    The similarity of two tokens in layer l is the cosine of their rows FFN-M_l(NM_l(E[t])); over all layers it is the
    cosine of the rows of all layers side by side, which is how a ToL holds them (MemoryLLM, section 2.3.2). Every token
    of the vocabulary is compared. The measure is ours: the paper shows no neighbours.
    """
    inside.need_memory("neighbours")
    at_least({"top": top})
    chosen = chosen_tokens(inside, page, token, tokens, data)
    L = inside.config.layers
    top = min(top, inside.config.vocab_size - 1)
    cosines, ids = neighbours_of(inside.rows, list(range(L)), chosen, every_id(inside), top, "neighbours")
    texts, names = inside.texts, [*map(str, range(L)), "all"]
    with page.csv("tokens", ["layer", "token", "text", "rank", "neighbour", "neighbour_text", "cosine"]) as write:
        for layer, name in enumerate(names):
            for q, t in enumerate(chosen):
                near = zip(ids[layer, q], cosines[layer, q])
                write([name, t, texts[t], r, n, texts[n], f"{c:.5f}"] for r, (n, c) in enumerate(near, 1))
    agree = [_shared(ids[layer], ids[-1]) for layer in range(L)]
    nearest = [float(cosines[layer, :, 0].mean()) for layer in range(L + 1)]
    series = {f"shares of the {top} neighbours over all layers": [100 * share for share in agree]}
    page.figure(
        "by_layer",
        plots.by_layer(series, "shared neighbours, %"),
        f"How many of a token's {top} nearest in one layer are also its nearest over all layers; mean of "
        f"{len(chosen):,} tokens.",
    )
    series = {"layer by layer": nearest[:L], "all layers together": [nearest[L]] * L}
    page.figure(
        "cosine", plots.by_layer(series, "cosine"), "Cosine of a token's row and its nearest neighbour's; mean."
    )
    page.heading("Nearest over all layers, and in the first, middle and last")
    shown = dict.fromkeys([L, 0, L // 2, L - 1])
    rows = [[texts[t], *([texts[n] for n in ids[layer, q, :6]] for layer in shown)] for q, t in enumerate(chosen[:300])]
    page.table(["token", *(f"layer {names[layer]}".replace("layer all", "all layers") for layer in shown)], rows)
    return {"tokens": chosen, "layers": names, "neighbours": ids, "cosine": cosines.round(5), "shared_with_all": agree}


def _shared(a_Qk, b_Qk) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(a_Qk, b_Qk)]))
