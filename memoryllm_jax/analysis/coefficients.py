"""Token-key-value coefficients of FFN-M over the whole vocabulary (MemoryLLM, arXiv 2602.00398, section 2.3.1)."""

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import token_page, topk, values
from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.analysis.neighbours import neighbours_of
from memoryllm_jax.analysis.vocabulary import chosen_tokens, chunk_count, chunks, every_id, strongest_keys
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.legacy import at_least
from memoryllm_jax.common.progress import Progress


def coefficients(inside: Inside, page, token: list[str] = (), top: int = 5, tokens: int = 500, data: str = "") -> dict:
    """Coefficients c of FFN-M: the keys that matter most for a token, the tokens that use a key most, what values say.

    MemoryLLM, section 2.3.1, equation 2.8: for the query q = NM_l(E[t]) of token t in layer l, c_i = (q k_i)
    g_i with keys k_i the columns of W_up and g = SiLU(q W_gate), and FFN-M = sum_i c_i v_i with values v_i the rows of
    W_down. The keys that matter most for a token are those of the largest |c_i| |v_i|, the size of what they add;
    `share` is that over its sum. The tokens that use a key most are those of the largest coefficient, on the side of
    its largest |c_i|; `sign` is that side, and the value's top tokens are those of sign * v_i (see `values`). All are
    exact over the whole vocabulary. The page holds the tokens named, else the --tokens most frequent of --data,
    else evenly spread ones; its rows are FFN-M's, with the norm and the top tokens that the output head makes of each.
    """
    inside.need_memory("coefficients")
    if not 1 <= top <= inside.config.memory_dim:
        raise UserError(f"--top: expected from 1 to the {inside.config.memory_dim} keys, found {top}")
    L, V, texts = inside.config.layers, inside.config.vocab_size, inside.texts
    shown = chosen_tokens(inside, page, token, tokens, data)
    listed_V = np.isin(every_id(inside), shown) if token else np.ones(V, bool)
    progress = Progress("coefficients", L * chunk_count(V), "chunk")
    head = ["layer", "token", "text", "keys", "coefficients", "shares"]
    kept, uses = [], {}
    with page.csv("tokens", head) as write_tokens, page.csv("keys", [*token_page.KEY_FIELDS]) as write_keys:
        for layer in range(L):
            norms_F = jnp.linalg.norm(inside.values("memory", layer), axis=1)
            sides, of_shown = topk.TwoSided(len(norms_F), top), {}
            for ids_C, real_C in chunks(every_id(inside)):
                c_CF = inside.token_coefficients(layer, ids_C)
                sides.add(c_CF, ids_C, real_C)
                strongest = [np.asarray(x) for x in strongest_keys(c_CF, norms_F, top)]
                listed = np.flatnonzero(real_C & listed_V[ids_C])
                write_tokens(_token_rows(layer, ids_C[listed], [x[listed] for x in strongest], texts))
                for row in np.flatnonzero(real_C & np.isin(ids_C, shown)):
                    of_shown[int(ids_C[row])] = [x[row] for x in strongest]
                progress.update(progress.done + 1)
            kept.append([np.stack([of_shown[int(t)][k] for t in shown]) for k in range(3)])
            triggers = sides.result()
            says = values.top_tokens(inside, inside.values("memory", layer) * triggers.sign_K[:, None], top)
            write_keys(token_page.key_rows(layer, triggers, says, texts))
            for i in np.unique(kept[-1][0]):
                fires = triggers.labels_Kt[i] >= 0
                uses[layer, int(i)] = (
                    *(triggers.sign_K[i], triggers.labels_Kt[i, fires], triggers.c_Kt[i, fires]),
                    *(says.ids_Nk[i], says.p_Nk[i]),
                )
    progress.close()
    keys_LQk, c_LQk, share_LQk = strongest = [np.stack([of[k] for of in kept]) for k in range(3)]
    near = neighbours_of(inside.rows, list(range(L)), shown, every_id(inside), min(top, V - 1), "neighbours")
    rows = _rows(inside, shown, top)
    concentration = {
        f"the strongest {k}": (100 * share_LQk[..., :k].sum(-1).mean(1)).tolist() for k in sorted({1, top})
    }
    page.figure(
        "concentration",
        plots.by_layer(concentration, "share of sum |c| |v|, %"),
        f"How much of a row the strongest of {inside.config.memory_dim} keys make; mean of {len(shown):,} tokens.",
    )
    page.heading("Search")
    page.raw(token_page.markup(token_page.content(shown, strongest, uses, near, rows, texts)))
    return {
        "tokens": shown,
        "keys": keys_LQk,
        "coefficients": c_LQk,
        "shares": share_LQk,
        "concentration": concentration,
    }


def _token_rows(layer, ids, strongest, texts):
    """CSV lines of tokens, lists within a field apart by spaces."""
    columns = [[" ".join(f"{x:.5g}" for x in of) for of in part.tolist()] for part in strongest]
    return ([layer, t, texts[t], *of] for t, *of in zip(ids.tolist(), *columns))


def _rows(inside, shown, top):
    """(norms [L, Q], top tokens of each row [L, Q, k])."""
    norms, says = [], []
    for layer in range(inside.config.layers):
        rows_QD = jnp.concatenate([inside.rows(layer, i)[: r.sum()] for i, r in chunks(shown)])
        norms.append(np.asarray(jnp.linalg.norm(rows_QD, axis=1)))
        says.append(values.top_tokens(inside, rows_QD, top).ids_Nk)
    return np.stack(norms), np.stack(says)


def outliers(inside: Inside, page, ratio: str = "5,10,20", top: int = 10) -> dict:
    """Keys above M times the mean |c| of their token and layer.

    MemoryLLM, figure 6, counts outlier keys for each token without defining them; the rule |x| > M mean |x| is one that
    its authors use elsewhere. The mean is over the keys of one token in one layer; every token of the vocabulary counts
    once. Also, by the first M, how many each token has in each layer (CSV), and the keys that are outliers for the most
    tokens.
    """
    inside.need_memory("outliers")
    try:
        ratios = list(dict.fromkeys(float(x) for x in ratio.split(",")))
    except ValueError:
        ratios = [0.0]
    if not all(0 < m < np.inf for m in ratios):
        raise UserError(f"--ratio: expected numbers above zero such as 5,10,20, found {ratio!r}")
    at_least({"top": top})
    L, V = inside.config.layers, inside.config.vocab_size
    progress = Progress("outliers", L * chunk_count(V), "chunk")
    rows, hubs, by_token = [], [], []
    for layer in range(L):
        counts, hits_F = [], 0
        for ids_C, real_C in chunks(every_id(inside)):
            count_CM, first_F = outlier_counts(inside.token_coefficients(layer, ids_C), real_C, jnp.array(ratios))
            counts.append(np.asarray(count_CM)[real_C])
            hits_F = hits_F + np.asarray(first_F)
            progress.update(progress.done + 1)
        counts_VM = np.concatenate(counts)
        by_token.append(counts_VM[:, 0])
        for m, count_V in zip(ratios, counts_VM.T):
            row = {"layer": layer, "M": m, "mean": float(count_V.mean()), "largest": int(count_V.max())}
            rows.append(row | {"tokens_without": float((count_V == 0).mean())})
        for i in np.argsort(-hits_F, kind="stable")[:top]:
            hubs.append([layer, int(i), int(hits_F[i]), 100 * float(hits_F[i]) / V])
    progress.close()
    with page.csv("layers", list(rows[0])) as write:
        write(row.values() for row in rows)
    with page.csv("tokens", ["token", "text", *(f"layer_{layer}" for layer in range(L))]) as write:
        write([t, text, *of] for t, (text, *of) in enumerate(zip(inside.texts, *by_token)))
    series = {f"M = {m:g}": [row["mean"] for row in rows if row["M"] == m] for m in ratios}
    page.figure(
        "count",
        plots.by_layer(series, "outlier keys a token"),
        f"Keys of {inside.config.memory_dim} with |c| above M times the token's mean; mean of {V:,} tokens.",
    )
    page.table(["layer", "M", "mean", "largest", "tokens without, share"], [list(row.values()) for row in rows])
    page.heading(f"Keys that are outliers (M = {ratios[0]:g}) for most tokens")
    page.table(["layer", "key", "tokens", "% of the vocabulary"], hubs)
    return {"layers": rows, "keys": hubs}


@jax.jit
def outlier_counts(c_CF, real_C, ratios_M):
    """(outlier keys of each token [C, M], tokens for which each key is one by the first M [F])."""
    size_CF = jnp.abs(c_CF)
    mean_C1 = size_CF.mean(1, keepdims=True)
    counts_CM = jnp.stack([(size_CF > m * mean_C1).sum(1) for m in ratios_M], 1)
    return counts_CM, ((size_CF > ratios_M[0] * mean_C1) & real_C[:, None]).sum(0)
