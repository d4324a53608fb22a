"""Whether a value predicts what follows its key's triggers (Geva et al. 2021, arXiv 2012.14913, section 4)."""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np

from memoryllm_jax.analysis import topk, values
from memoryllm_jax.analysis.corpus import Corpus, TextOptions
from memoryllm_jax.analysis.key_values import FFN, KeyValueModel
from memoryllm_jax.analysis.triggers import Keys, Top, find, open_corpus, sample_keys
from memoryllm_jax.common import plots
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report
from memoryllm_jax.data import statistics


def agreement(
    model: KeyValueModel,
    page: Report,
    *,
    text: TextOptions,
    ffn: FFN = "",
    keys: Keys = 0,
    top: Top = 50,
    predictive: Annotated[
        int, Option("values to look at one by one, those of the largest maximum probability", least=1)
    ] = 100,
) -> dict:
    """How often a value's top token is the next token of its key's top trigger, by layer, and that token's rank.

    Geva et al. 2021, section 4 and figure 4: agreement is argmax p_i = w_i, with p_i the value's distribution (as in
    `values`, v_i with the sign of its strongest coefficient) and w_i the token that follows the top-1 trigger in the
    text; figure 5: the rank of w_i under p_i. Then, of the values with the largest max p, how many have their top token
    after at least one of the key's top-t triggers. Chance is measured by pairing values with other keys' triggers. The
    triggers of FFN-M are tokens, exact over the vocabulary, and w_i is the token that most often follows the trigger in
    the training text, by up to 4 million pairs at even distances. Keys whose trigger does not occur there are left out.
    """
    ffn = model.ffn(ffn)
    chosen = sample_keys(model, ffn, keys, (), text.seed)
    corpus = open_corpus(model, ffn, text, page)
    following = next_tokens(model, page, corpus, text.data)
    found = find(model, ffn, chosen, top, corpus)
    progress = Progress("values", len(found), "layer")
    draw, layers, peaked = np.random.default_rng(text.seed), [], []
    with page.csv("keys", ["layer", "key", "sign", "top_token", "max_p", "next_token", "rank"]) as write:
        for layer, triggers in found.items():
            pairs = _pairs(model, ffn, layer, chosen[layer], triggers, following, draw)
            write(_csv_lines(layer, pairs))
            layers.append({"layer": layer, "keys": len(pairs.keys_K)} | _measures(pairs))
            peaked += _most_peaked(layer, pairs, predictive)
            progress.update(progress.done + 1)
    progress.close()
    peaked.sort(key=lambda value: -value.p)  # is stable, so that lower layers come first
    shown = [_matches(value, model.texts, following) for value in peaked[:predictive]]
    matched = sum(row[4] > 0 for row in shown)
    _draw(model, page, ffn, layers)
    page.heading(f"The {len(shown)} most predictive values")
    page.text(f"{matched} of {len(shown)} have their top token after at least one of the key's top {top} triggers.")
    page.table(["layer", "key", "max p", "top token", "triggers it follows", "of"], shown)
    by_layer = {row["layer"]: sum(line[0] == row["layer"] for line in shown) for row in layers}
    return {
        "ffn": ffn,
        "layers": layers,
        "predictive": {"values": shown, "matched": matched, "by_layer": by_layer},
    }


def next_tokens(model: KeyValueModel, page: Report, corpus: Corpus | None, data: str) -> Callable[[int], int]:
    """A function: label of a trigger -> the token that follows it, -1 where there is none."""
    if corpus is not None:
        return lambda label: corpus.next(label) if label >= 0 else -1
    dataset = model.open_data(data)
    successors = statistics.likely_successors(dataset, model.config.vocab_size)
    pairs = f"{successors.pairs:,} pairs of the training text, at even distances"
    page.facts["next tokens"] = f"{data}, the most frequent successor in {pairs}"
    return lambda label: int(successors.ids[label]) if label >= 0 else -1


class _Pairs(NamedTuple):
    """Those K keys of a layer whose top trigger has a next token, with their values' predictions.

    labels_Kt: of the triggers.  top_K, p_K: a value's top token and its probability.  next_K: the next token of the top
    trigger.  other_K: that of another key.  rank_K, other_rank_K: their ranks under the value.
    """

    keys_K: np.ndarray
    sign_K: np.ndarray
    labels_Kt: np.ndarray
    top_K: np.ndarray
    p_K: np.ndarray
    next_K: np.ndarray
    other_K: np.ndarray
    rank_K: np.ndarray
    other_rank_K: np.ndarray


def _pairs(model, ffn, layer, keys_K, triggers: topk.Triggers, following, draw) -> _Pairs:
    next_K = np.array([following(label) for label in triggers.labels_Kt[:, 0]])
    there = np.flatnonzero(next_K >= 0)
    other_K = np.zeros_like(next_K)
    other_K[there] = others(draw, next_K[there])
    # The values of all keys, also of those that are then left out: one shape for all layers, which compiles once.
    v_KD = model.values(ffn, layer)[keys_K] * triggers.sign_K[:, None]
    says = values.top_tokens(model, v_KD, 1)
    rank_K, other_rank_K = values.ranks(model, v_KD, np.maximum(next_K, 0), other_K)
    top_K, p_K = says.ids_Nk[:, 0], says.p_Nk[:, 0]
    all_keys = _Pairs(keys_K, triggers.sign_K, triggers.labels_Kt, top_K, p_K, next_K, other_K, rank_K, other_rank_K)
    return _Pairs(*(x_K[there] for x_K in all_keys))


def others(draw: np.random.Generator, x_K: np.ndarray) -> np.ndarray:
    """Each element replaced by another one, drawn at random; each is used once."""
    order = draw.permutation(len(x_K))
    out_K = np.empty_like(x_K)
    out_K[order] = x_K[np.roll(order, 1)]
    return out_K


def _csv_lines(layer: int, pairs: _Pairs):
    probabilities = [f"{p:.4g}" for p in pairs.p_K]
    columns = pairs.keys_K, pairs.sign_K, pairs.top_K, probabilities, pairs.next_K, pairs.rank_K
    return ([layer, *line] for line in zip(*columns))


def _measures(pairs: _Pairs) -> dict[str, float]:
    """NaN where there is nothing to measure: chance takes two keys."""
    out = dict.fromkeys(("agreement", "chance", "median_rank", "chance_rank"), np.nan)
    if len(pairs.keys_K):
        out["agreement"] = float((pairs.top_K == pairs.next_K).mean())
        out["median_rank"] = float(np.median(pairs.rank_K))
    if len(pairs.keys_K) > 1:
        out["chance"] = float((pairs.top_K == pairs.other_K).mean())
        out["chance_rank"] = float(np.median(pairs.other_rank_K))
    return out


class _Peaked(NamedTuple):
    """A value with a large maximum probability p, its top token, and the labels of its key's triggers."""

    p: float
    layer: int
    key: int
    token: int
    labels: list[int]


def _most_peaked(layer: int, pairs: _Pairs, count: int) -> list[_Peaked]:
    """The values of a layer with the largest maximum probabilities."""
    strongest = np.argsort(-pairs.p_K, kind="stable")[:count]
    return [
        _Peaked(float(pairs.p_K[k]), layer, int(pairs.keys_K[k]), int(pairs.top_K[k]), pairs.labels_Kt[k].tolist())
        for k in strongest
    ]


def _matches(value: _Peaked, texts, following) -> list:
    """A line of the page: how many of the key's triggers the value's top token follows, of those with a next token."""
    nexts = [following(label) for label in value.labels]
    matched = sum(token == value.token for token in nexts)
    return [value.layer, value.key, value.p, texts[value.token], matched, sum(token >= 0 for token in nexts)]


def _draw(model, page, ffn, layers):
    at = [row["layer"] for row in layers]
    series = {
        "value and its own trigger": [100 * row["agreement"] for row in layers],
        "value and another's (chance)": [100 * row["chance"] for row in layers],
    }
    page.figure(
        "agreement",
        plots.by_layer(series, "agreement, % of keys", layers=at),
        f"Share of {model.label(ffn)}'s keys whose value's top token follows the key's top trigger.",
    )
    series = {
        "own trigger": [row["median_rank"] for row in layers],
        "another's (chance)": [row["chance_rank"] for row in layers],
    }
    page.figure(
        "rank",
        plots.by_layer(series, "median rank", log=True, layers=at),
        f"Rank, among {model.config.vocab_size:,} tokens, of the trigger's next token under the value; 1 is the top.",
    )
