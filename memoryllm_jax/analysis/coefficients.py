"""Token-key-value coefficients of FFN-M over the whole vocabulary (MemoryLLM, arXiv 2602.00398, section 2.3.1)."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import token_page, topk, values
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.analysis.neighbours import neighbours_of
from memoryllm_jax.analysis.vocabulary import FrequencyData, StrongestKeys, Token, Tokens, chosen_tokens, strongest_keys
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report

_TOKEN_FIELDS = ["layer", "token", "text", "keys", "coefficients", "shares"]
_USED_BY = ["tokens", "coefficients", "texts"]
_VALUE_SAYS = ["value_tokens", "value_probabilities", "value_texts"]
_KEY_FIELDS = ["layer", "key", "sign", *_USED_BY, *_VALUE_SAYS]


def coefficients(
    model: KeyValueModel,
    page: Report,
    *,
    token: Token = (),
    tokens: Tokens = 500,
    top: Annotated[int, Option("how many keys of a token, tokens of a key and tokens of a value to list", least=1)] = 5,
    data: FrequencyData = "",
) -> dict:
    """Coefficients c of FFN-M: the keys that matter most for a token, the tokens that use a key most, what values say.

    MemoryLLM, section 2.3.1, equation 2.8: for the query q = NM_l(E[t]) of token t in layer l, c_i = (q k_i) g_i with
    keys k_i the columns of W_up and g = SiLU(q W_gate), and FFN-M = sum_i c_i v_i with values v_i the rows of W_down.
    The keys that matter most for a token have the largest |c_i| |v_i|, the size of what they add; `share` is that size
    over its sum over all keys. The tokens that use a key most have the largest coefficients on the side of its largest
    |c_i|; `sign` is that side, and the value's top tokens are those of sign * v_i (see `values`). All are exact over
    the whole vocabulary.

    The page shows the tokens that --token names; without --token, as many as --tokens says: the most frequent ones of
    --data, or without --data those whose ids are at even distances. It also shows the norm of each token's row, and the
    top tokens that the output head makes of it.
    """
    model.require_memory("coefficients")
    L, V, F = model.config.layers, model.config.vocab_size, model.config.memory_dim
    if top > min(F, V):
        raise ArgumentError(
            "top", f"expected at most {min(F, V)}, as the model has {F} keys a layer and {V} tokens, found {top}"
        )
    shown_Q = chosen_tokens(model, page, token, tokens, data)
    # The CSV file has every token unless some are named: --tokens and --data only keep the page small.
    listed = np.unique(shown_Q) if token else model.every_id
    progress = Progress("coefficients", L * model.chunk_count(V), "chunk")
    of_shown: list[StrongestKeys] = []
    keys: dict[tuple[int, int], token_page.Key] = {}
    with page.csv("tokens", _TOKEN_FIELDS) as write_tokens, page.csv("keys", _KEY_FIELDS) as write_keys:
        for layer in range(L):
            of_tokens, triggers = _pass_over_vocabulary(model, layer, top, lambda: progress.update(progress.done + 1))
            # The model adds c v, so a key whose strongest coefficient is negative adds -v.
            signed_values_FD = model.values("memory", layer) * triggers.sign_K[:, None]
            says = values.top_tokens(model, signed_values_FD, top)
            write_tokens(_token_lines(layer, listed, of_tokens, model.texts))
            write_keys(_key_lines(layer, triggers, says, model.texts))
            of_shown.append(StrongestKeys(*(x_Vk[shown_Q] for x_Vk in of_tokens)))
            # The page holds only keys that a shown token leads to; the CSV file holds all of them.
            for i in np.unique(of_shown[-1].keys):
                keys[layer, int(i)] = _key_on_page(int(i), triggers, says)
    progress.close()
    strongest = StrongestKeys(*(np.stack(of_layers) for of_layers in zip(*of_shown)))  # [L, Q, k]
    near = neighbours_of(model, model.rows, range(L), shown_Q, model.every_id, min(top, V - 1), "neighbours")
    rows = _rows(model, shown_Q, top)
    concentration = {}
    for k in sorted({1, top}):
        concentration[f"the strongest {k}"] = (100 * strongest.share[..., :k].sum(-1).mean(1)).tolist()
    page.figure(
        "concentration",
        plots.by_layer(concentration, "share of sum |c| |v|, %"),
        f"Share of a row that its strongest keys make, of {F}; mean of {len(shown_Q):,} tokens.",
    )
    page.heading("Search")
    page.raw(token_page.markup(token_page.content(shown_Q, strongest, keys, near, rows, model.texts)))
    return {
        "tokens": shown_Q,
        "keys": strongest.keys,
        "coefficients": strongest.c,
        "shares": strongest.share,
        "concentration": concentration,
    }


def _pass_over_vocabulary(
    model: KeyValueModel, layer: int, top: int, step: Callable[[], None]
) -> tuple[StrongestKeys, topk.Triggers]:
    """Finds the strongest keys of every token [V, k] and the triggers of every key in one pass."""
    norms_F = model.value_norms("memory", layer)
    sides = topk.TwoSidedTopK(len(norms_F), top)
    chunks = []
    for ids_C, is_real_C in model.chunks(model.every_id):
        c_CF = model.token_coefficients(layer, ids_C)
        sides.add(c_CF, ids_C, is_real_C)
        chunks.append([np.asarray(x_Ck)[is_real_C] for x_Ck in strongest_keys(c_CF, norms_F, top)])
        step()
    return StrongestKeys(*(np.concatenate(parts) for parts in zip(*chunks))), sides.triggers()


def _token_lines(layer: int, ids: np.ndarray, strongest: StrongestKeys, texts: Sequence[str]) -> Iterator[list]:
    """Lines of the CSV file of tokens; spaces separate the keys of a token."""
    for t in ids.tolist():
        columns = [" ".join(f"{x:.5g}" for x in x_Vk[t].tolist()) for x_Vk in strongest]
        yield [layer, t, texts[t], *columns]


def _key_lines(layer: int, triggers: topk.Triggers, says: values.TopTokens, texts: Sequence[str]) -> Iterator[list]:
    """Lines of the CSV file of keys; spaces separate the tokens of a key."""
    for i in range(len(triggers.sign_K)):
        key = _key_on_page(i, triggers, says)
        uses = _joined(key.triggers, key.coefficients, texts)
        yield [layer, i, int(key.sign), *uses, *_joined(key.tokens, key.probabilities, texts)]


def _joined(ids, numbers, texts) -> tuple[str, str, str]:
    """Three cells of a CSV file: token ids, their numbers and their texts."""
    return " ".join(map(str, ids)), " ".join(f"{x:.4g}" for x in numbers), " ".join(texts[i] for i in ids)


def _key_on_page(i: int, triggers: topk.Triggers, says: values.TopTokens) -> token_page.Key:
    """What the page and the CSV file show of a layer's key number i."""
    fires_t = triggers.labels_Kt[i] >= 0  # a key may have fewer triggers than the array has places
    return token_page.Key(
        sign=triggers.sign_K[i],
        triggers=triggers.labels_Kt[i, fires_t],
        coefficients=triggers.c_Kt[i, fires_t],
        tokens=says.ids_Nk[i],
        probabilities=says.p_Nk[i],
    )


def _rows(model: KeyValueModel, shown_Q: np.ndarray, top: int) -> token_page.Rows:
    """The norms and top tokens of the shown tokens' memory rows, in each layer."""
    norms, tokens = [], []
    for layer in range(model.config.layers):
        chunks = [model.rows(layer, ids_C)[: is_real_C.sum()] for ids_C, is_real_C in model.chunks(shown_Q)]
        rows_QD = jnp.concatenate(chunks)
        norms.append(np.asarray(jnp.linalg.norm(rows_QD, axis=1)))
        tokens.append(values.top_tokens(model, rows_QD, top).ids_Nk)
    return token_page.Rows(np.stack(norms), np.stack(tokens))


def outliers(
    model: KeyValueModel,
    page: Report,
    *,
    ratio: Annotated[tuple[str, ...], Option("factors M of the mean |c|, such as 5,10,20")] = ("5", "10", "20"),
    top: Annotated[int, Option("keys of each layer to list: those that are outliers for most tokens", least=1)] = 10,
) -> dict:
    """Keys above M times the mean |c| of their token and layer.

    MemoryLLM, figure 6, counts the outlier keys of a token without defining them; the rule |x| > M mean |x| is one that
    its authors use elsewhere. The mean is over the keys of one token in one layer, and every token of the vocabulary
    counts once. For the first M, a CSV file gives the number of outliers of each token in each layer, and a table lists
    the keys that are outliers for most tokens.
    """
    model.require_memory("outliers")
    ratios = _ratios(ratio)
    L, V = model.config.layers, model.config.vocab_size
    progress = Progress("outliers", L * model.chunk_count(V), "chunk")
    rows, most_often, by_token = [], [], []
    for layer in range(L):
        counts_VM, hits_F = _outliers_of_layer(model, layer, ratios, lambda: progress.update(progress.done + 1))
        by_token.append(counts_VM[:, 0])  # for the first M alone, as the file has V x L numbers for each
        for m, count_V in zip(ratios, counts_VM.T):
            row = {"layer": layer, "M": m, "mean": float(count_V.mean()), "largest": int(count_V.max())}
            rows.append(row | {"tokens_without": float((count_V == 0).mean())})
        for i in np.argsort(-hits_F, kind="stable")[:top]:
            most_often.append([layer, int(i), int(hits_F[i]), 100 * float(hits_F[i]) / V])
    progress.close()
    with page.csv("layers", list(rows[0])) as write:
        write(row.values() for row in rows)
    with page.csv("tokens", ["token", "text", *(f"layer_{layer}" for layer in range(L))]) as write:
        write([t, text, *counts] for t, (text, *counts) in enumerate(zip(model.texts, *by_token)))
    series = {f"M = {m:g}": [row["mean"] for row in rows if row["M"] == m] for m in ratios}
    page.figure(
        "count",
        plots.by_layer(series, "outlier keys a token"),
        f"Keys of {model.config.memory_dim} with |c| above M times the token's mean; mean of {V:,} tokens.",
    )
    page.table(["layer", "M", "mean", "largest", "tokens without, share"], [list(row.values()) for row in rows])
    page.heading(f"Keys that are outliers (M = {ratios[0]:g}) for most tokens")
    page.table(["layer", "key", "tokens", "% of the vocabulary"], most_often)
    return {"layers": rows, "keys": most_often}


def _ratios(texts: Sequence[str]) -> list[float]:
    """The option's numbers in their order, each once. Raises: ArgumentError."""
    try:
        ratios = list(dict.fromkeys(float(text) for text in texts))
    except ValueError:
        ratios = []  # is refused below, with the same message
    # NaN and infinity are numbers to `float`, but no |c| is above them.
    if not ratios or not all(0 < m < math.inf for m in ratios):
        raise ArgumentError("ratio", f"expected numbers above zero such as 5,10,20, found {','.join(texts)!r}")
    return ratios


def _outliers_of_layer(
    model: KeyValueModel, layer: int, ratios: list[float], step: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Counts outliers in one pass over the vocabulary.

    Returns: (for each M, outlier keys of each token [V, M]; for the first M, tokens of each outlier key [F]).
    """
    counts, hits_F = [], 0
    for ids_C, is_real_C in model.chunks(model.every_id):
        c_CF = model.token_coefficients(layer, ids_C)
        count_CM, chunk_hits_F = outlier_counts(c_CF, is_real_C, jnp.array(ratios))
        counts.append(np.asarray(count_CM)[is_real_C])
        hits_F = hits_F + np.asarray(chunk_hits_F)
        step()
    return np.concatenate(counts), hits_F


@jax.jit
def outlier_counts(c_CF, is_real_C, ratios_M):
    """Counts the outliers among the coefficients of a chunk of tokens.

    Args:
      c_CF: coefficients of the tokens.
      is_real_C: False for tokens that only fill up the chunk, which the second result leaves out.
      ratios_M: float32, factors of the token's mean |c|.
    Returns: (outlier keys of each token by each M [C, M], tokens for which each key is an outlier by the first M [F]).
    """
    size_CF = jnp.abs(c_CF)
    mean_C1 = size_CF.mean(1, keepdims=True)
    counts_CM = jnp.stack([(size_CF > m * mean_C1).sum(1) for m in ratios_M], 1)
    return counts_CM, ((size_CF > ratios_M[0] * mean_C1) & is_real_C[:, None]).sum(0)
