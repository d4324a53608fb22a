"""Whether a value predicts what follows its key's triggers (Geva et al. 2021, arXiv 2012.14913, section 4)."""

import collections
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import numpy as np

from memoryllm_jax.analysis import topk, values
from memoryllm_jax.analysis.corpus import Corpus, CorpusOptions
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
    text: CorpusOptions,
    ffn: FFN = "",
    keys: Keys = 0,
    top: Top = 50,
    predictive: Annotated[
        int, Option("values to look at one by one: those with the largest maximum probability", least=1)
    ] = 100,
) -> dict:
    """How often a value's top token is the next token of its key's top trigger, by layer, and that token's rank.

    Geva et al. 2021, section 4 and figure 4: value i agrees if argmax p_i = w_i. Here p_i is its distribution (as in
    `values`, of v_i with the sign of the key's strongest coefficient), and w_i is the token that follows the key's
    top-1 trigger in the text. Figure 5: the rank of w_i under p_i. Then, of the values with the largest max p_i: how
    many have their top token after at least one of their key's top-t triggers. Chance is measured by pairing values
    with other keys' triggers.

    The triggers of FFN-M are tokens, exact over the vocabulary, and w_i is the token that most often follows the
    trigger in the training text, counted in up to 4 million pairs at even distances. Keys whose trigger has no
    successor there are left out.
    """
    ffn = model.ffn(ffn)
    chosen = sample_keys(model, ffn, keys, (), text.seed)  # (): this analysis has no option that names keys
    corpus = open_corpus(model, ffn, text, page)
    following = next_tokens(model, page, corpus, text.data)
    found = find(model, ffn, chosen, top, corpus)
    progress = Progress("values", len(found), "layer")
    draw = np.random.default_rng(text.seed)
    layers: list[dict] = []
    peaked: list[_Peaked] = []
    with page.csv("keys", ["layer", "key", "sign", "top_token", "max_p", "next_token", "rank"]) as write:
        for layer, triggers in found.items():
            pairs = _pairs(model, ffn, layer, chosen[layer], triggers, following, draw)
            write(_csv_lines(layer, pairs))
            layers.append({"layer": layer, "keys": len(pairs.keys_K)} | _measures(pairs))
            # All of the most predictive values may be of one layer, so each layer offers as many as are shown.
            peaked += _most_peaked(layer, pairs, predictive)
            progress.update(progress.done + 1)
    progress.close()
    peaked.sort(key=lambda value: -value.p)  # the sort is stable: of equal ones, lower layers come first
    shown = [_match(value, model.texts, following) for value in peaked[:predictive]]
    matched = len([line for line in shown if line.matched])
    shown_of_layer = collections.Counter(line.layer for line in shown)
    _draw(model, page, ffn, layers)
    page.heading(f"The {len(shown)} most predictive values")
    page.text(f"{matched} of {len(shown)} have their top token after at least one of the key's top {top} triggers.")
    page.table(["layer", "key", "max p", "top token", "triggers it follows", "of"], shown)
    by_layer = {row["layer"]: shown_of_layer[row["layer"]] for row in layers}
    return {
        "ffn": ffn,
        "layers": layers,
        "predictive": {"values": shown, "matched": matched, "by_layer": by_layer},
    }


def next_tokens(model: KeyValueModel, page: Report, corpus: Corpus | None, data: str) -> Callable[[int], int]:
    """Returns a function from a trigger's label to the id of the token that follows the trigger, or -1 if none does.

    Args:
      page: its facts say where next tokens come from, if that is not the corpus.
      corpus: the text of the triggers; None for FFN-M, whose triggers are token ids.
      data: prepared data, in which the successors of token ids are counted; "": that of the model's run.
    Raises: UserError if `data` is needed and cannot be opened.
    """
    if corpus is not None:
        return lambda label: corpus.next(label) if label >= 0 else -1
    dataset = model.open_data(data)
    successors = statistics.likely_successors(dataset, model.config.vocab_size)
    pairs = f"{successors.pairs:,} pairs of the training text, at even distances"
    page.facts["next tokens"] = f"{dataset.path}, the most frequent successor in {pairs}"
    return lambda label: int(successors.ids[label]) if label >= 0 else -1


class _Pairs(NamedTuple):
    """The K keys of a layer whose top trigger has a next token, with what their values predict.

    keys_K: numbers of the keys.
    sign_K: 1 or -1, the sign of a key's strongest coefficient, with which its value is read.
    labels_Kt: labels of the key's triggers, strongest first.
    top_K, p_K: the value's top token and its probability.
    next_K: the token that follows the key's top trigger.
    other_K: the token that follows another key's top trigger, to measure chance.
    rank_K, other_rank_K: the ranks of next_K and other_K under the value; 1 is the likeliest token.
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
    """Pairs each key's value with the token that follows the key's top trigger, and with that of another key."""
    next_K = np.array([following(label) for label in triggers.labels_Kt[:, 0]])
    there = np.flatnonzero(next_K >= 0)
    other_K = np.zeros_like(next_K)
    other_K[there] = others(draw, next_K[there])
    # Keys without a next token are dropped only at the end: until then all layers have one shape, which compiles once.
    v_KD = model.values(ffn, layer)[keys_K] * triggers.sign_K[:, None]
    says = values.top_tokens(model, v_KD, 1)
    # Where there is no next token, token 0 takes its place; its ranks are dropped below.
    rank_K, other_rank_K = values.ranks(model, v_KD, np.maximum(next_K, 0), other_K)
    top_K, p_K = says.ids_Nk[:, 0], says.p_Nk[:, 0]
    all_keys = _Pairs(keys_K, triggers.sign_K, triggers.labels_Kt, top_K, p_K, next_K, other_K, rank_K, other_rank_K)
    return _Pairs(*(x_K[there] for x_K in all_keys))


def others(draw: np.random.Generator, x_K: np.ndarray) -> np.ndarray:
    """Replaces each element by another one, drawn at random. Each element is used once.

    Args:
      x_K: any values; a single one has no other and stays.
    """
    # Each place in a random order gives to the next: a plain permutation would leave some elements where they are.
    order = draw.permutation(len(x_K))
    out_K = np.empty_like(x_K)
    out_K[order] = x_K[np.roll(order, 1)]
    return out_K


def _csv_lines(layer: int, pairs: _Pairs) -> Iterator[list]:
    """Lines of the CSV file, one for each key."""
    probabilities = [f"{p:.4g}" for p in pairs.p_K]
    columns = pairs.keys_K, pairs.sign_K, pairs.top_K, probabilities, pairs.next_K, pairs.rank_K
    return ([layer, *line] for line in zip(*columns))


def _measures(pairs: _Pairs) -> dict[str, float]:
    """A layer's agreement and median rank, each beside its value by chance.

    NaN stands for what cannot be measured: all of them without keys, and chance with a single key.
    """
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
    """The `count` values of a layer with the largest maximum probabilities, largest first."""
    strongest = np.argsort(-pairs.p_K, kind="stable")[:count]
    return [
        _Peaked(float(pairs.p_K[k]), layer, int(pairs.keys_K[k]), int(pairs.top_K[k]), pairs.labels_Kt[k].tolist())
        for k in strongest
    ]


class _Match(NamedTuple):
    """A line of the page's table of predictive values.

    matched: triggers of the key that the value's top token follows.  of: triggers that have a next token.
    """

    layer: int
    key: int
    p: float
    top_token: str
    matched: int
    of: int


def _match(value: _Peaked, texts, following) -> _Match:
    """Counts the triggers of a value's key that its top token follows."""
    nexts = [following(label) for label in value.labels]
    known = [token for token in nexts if token >= 0]
    return _Match(value.layer, value.key, value.p, texts[value.token], known.count(value.token), len(known))


def _draw(model, page, ffn, layers):
    """Figures of agreement and of ranks by layer."""
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
        plots.by_layer(series, "median rank", "log", layers=at),
        f"Rank, among {model.config.vocab_size:,} tokens, of the trigger's next token under the value; 1 is the top.",
    )
