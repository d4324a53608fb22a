"""Does a value predict what follows its key's triggers? (Geva et al. 2021, section 4)"""

import numpy as np

from memoryllm_jax.analysis import values
from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.analysis.triggers import find, open_corpus, sample_keys
from memoryllm_jax.analysis.vocabulary import checked_dataset
from memoryllm_jax.common import plots
from memoryllm_jax.common.legacy import at_least
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import statistics


def agreement(
    inside: Inside,
    page,
    ffn: str = "",
    keys: int = 0,
    top: int = 50,
    predictive: int = 100,
    data: str = "",
    split: str = "train",
    length: int = 64,
    limit: int = 1 << 20,
    seed: int = 0,
) -> dict:
    """How often a value's top token is the next token of its key's top trigger, by layer, and that token's rank.

    Geva et al. 2021, section 4 and figure 4: agreement is argmax p_i = w_i, with p_i the value's distribution (as in
    `values`, v_i with the sign of its strongest coefficient) and w_i the token that follows the top-1 trigger in the
    text; figure 5: the rank of w_i under p_i. Then, of the values with the largest max p, how many have their
    top token after at least one of the key's top-t triggers. Chance is measured: values paired with other keys'
    triggers. For FFN-M the trigger is a token, exact over the vocabulary, and w_i the token that most often follows it
    in the training text, by up to 4 million pairs spread evenly over it; of the top-t triggers each has its own. Keys
    whose trigger does not occur there are left out.
    """
    ffn = inside.ffn_name(ffn)
    chosen = sample_keys(inside, ffn, keys, [], seed)
    at_least({"top": top, "predictive": predictive})
    corpus = open_corpus(inside, ffn, data, split, length, limit, page)
    following = _following(inside, page, corpus, data)
    found = find(inside, ffn, chosen, top, corpus)
    progress = Progress("values", len(found), "layer")
    draw, layers, peaked = np.random.default_rng(seed), [], []
    with page.csv("keys", ["layer", "key", "sign", "top_token", "max_p", "next_token", "rank"]) as write:
        for layer, (sign_K, labels_Kt, _) in found.items():
            next_K = np.array([following(label) for label in labels_Kt[:, 0]])
            there = np.flatnonzero(next_K >= 0)
            other_K = np.zeros_like(next_K)
            other_K[there] = others(draw, next_K[there])
            # Of all keys, with a trigger in the text or not: one shape for all layers, so compiled once.
            v_KD = inside.values(ffn, layer)[chosen[layer]] * sign_K[:, None]
            top_ids, p = (x[there, 0] for x in values.top_tokens(inside, v_KD, 1))
            ranks = values.ranks(inside, v_KD, np.maximum(next_K, 0), other_K)
            rank, other_rank = (x[there] for x in ranks)
            own, labels_Kt, next_K, other_K = chosen[layer][there], labels_Kt[there], next_K[there], other_K[there]
            progress.update(progress.done + 1)
            if not len(own):
                nothing = dict.fromkeys(("agreement", "chance", "median_rank", "chance_rank"), np.nan)
                layers.append({"layer": layer, "keys": 0} | nothing)
                continue
            columns = own, sign_K[there], top_ids, [f"{x:.4g}" for x in p], next_K, rank
            write([layer, *row] for row in zip(*columns))
            layers.append(
                {
                    "layer": layer,
                    "keys": len(own),
                    "agreement": float((top_ids == next_K).mean()),
                    "chance": float((top_ids == other_K).mean()) if len(own) > 1 else np.nan,
                    "median_rank": float(np.median(rank)),
                    "chance_rank": float(np.median(other_rank)) if len(own) > 1 else np.nan,
                }
            )
            most = np.argsort(-p, kind="stable")[:predictive]
            peaked += [(float(p[k]), layer, int(own[k]), int(top_ids[k]), labels_Kt[k].tolist()) for k in most]
    progress.close()
    peaked = sorted(peaked, key=lambda x: -x[0])[:predictive]
    best = []
    for p, layer, i, token, labels in peaked:
        nexts = [following(label) for label in labels]
        best.append([layer, i, p, inside.texts[token], sum(n == token for n in nexts), sum(n >= 0 for n in nexts)])
    matched = sum(row[4] > 0 for row in best)
    at = [row["layer"] for row in layers]
    pick = lambda name, scale=1: [scale * row[name] for row in layers]  # noqa: E731
    series = {"value and its own trigger": pick("agreement", 100), "value and another's (chance)": pick("chance", 100)}
    page.figure(
        "agreement",
        plots.by_layer(series, "agreement, % of keys", layers=at),
        f"Share of {inside.label(ffn)}'s keys whose value's top token follows the key's top trigger.",
    )
    series = {"own trigger": pick("median_rank"), "another's (chance)": pick("chance_rank")}
    page.figure(
        "rank",
        plots.by_layer(series, "median rank", log=True, layers=at),
        f"Rank, among {inside.config.vocab_size:,} tokens, of the trigger's next token under the value; 1 is the top.",
    )
    page.heading(f"The {len(best)} most predictive values")
    page.text(f"{matched} of {len(best)} have their top token after at least one of the key's top {top} triggers.")
    page.table(["layer", "key", "max p", "top token", "triggers it follows", "of"], best)
    counts = {layer: sum(row[0] == layer for row in best) for layer in at}
    most = {"values": best, "matched": matched, "by_layer": counts}
    return {"ffn": ffn, "layers": layers, "predictive": most}


def others(draw: np.random.Generator, x_K: np.ndarray) -> np.ndarray:
    """Each place takes the value of another, drawn at random, and each is taken once."""
    order = draw.permutation(len(x_K))
    out_K = np.empty_like(x_K)
    out_K[order] = x_K[np.roll(order, 1)]
    return out_K


def _following(inside, page, corpus, data):
    """A function: label of a trigger -> the token that follows it, -1 where there is none."""
    if corpus is not None:
        return lambda label: corpus.next(label) if label >= 0 else -1
    dataset = checked_dataset(inside, data)
    successors, counts = statistics.likely_successors(dataset, inside.config.vocab_size)
    pairs = f"{counts.sum():,} pairs of the training text, spread evenly"
    page.facts["next tokens"] = f"{data}, the most frequent successor in {pairs}"
    return lambda label: int(successors[label, 0]) if label >= 0 and counts[label] else -1
