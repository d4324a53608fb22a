"""Sheets for people who look for the pattern in a key's triggers, and automatic proxies of what they would find."""

import html
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import token_classes
from memoryllm_jax.analysis.corpus import TextOptions
from memoryllm_jax.analysis.key_values import FFN, KeyValueModel
from memoryllm_jax.analysis.triggers import Key, Keys, Top, each_trigger, find, open_corpus, sample_keys, tokens_of
from memoryllm_jax.common import plots
from memoryllm_jax.common.report import Report

_LAST = 8  # tokens of a prefix that the proxies look at
_SHOWN = 16  # tokens of a prefix that the page shows


def annotate(
    model: KeyValueModel,
    page: Report,
    *,
    text: TextOptions,
    ffn: FFN = "",
    keys: Keys = 10,
    key: Key = (),
    top: Top = 25,
) -> dict:
    """A sheet to annotate a key's triggers by hand, with automatic proxies.

    Geva et al. 2021, section 3.1: people name patterns that at least three of a key's 25 triggers share, and call each
    shallow (such as the same last word) or semantic. The sheet as CSV has a line for each trigger, with columns for the
    pattern and its kind; the page has a box for each key, beside the last 16 tokens of its triggers. The proxies do not
    replace such judgements. Each is compared with its value for as many triggers drawn from all keys of the layer.
    Shared last token: share of the triggers that end with the commonest last token; for FFN-M, whose triggers are
    tokens, the share of the commonest class by text, such as digits. N-gram overlap: mean over pairs of triggers of the
    Jaccard index of 1- and 2-grams of the last 8 tokens; for FFN-M, of the characters. Embedding similarity: mean over
    pairs of the cosine of the mean input embeddings of the last 8 tokens, less the mean embedding of the vocabulary.
    """
    ffn = model.ffn(ffn)
    chosen = sample_keys(model, ffn, keys, key, text.seed)
    corpus = open_corpus(model, ffn, text, page)
    found = find(model, ffn, chosen, top, corpus)
    sheet: Sheet = {}
    for trigger in each_trigger(chosen, found):
        row = SheetRow(trigger.rank, trigger.c, tokens_of(corpus, trigger.label))
        sheet.setdefault((trigger.layer, trigger.key), []).append(row)
    proxies = _proxies(model, sheet, single_tokens=corpus is None, seed=text.seed)
    kinds = ["shared_class" if corpus is None else "shared_last_token", "ngram_overlap", "embedding_similarity"]
    names = [*kinds, *(f"{kind}_at_random" for kind in kinds)]
    with page.csv("proxies", ["layer", "key", *names]) as write:
        write([layer, i, *(f"{x:.4f}" for x in values)] for (layer, i), values in proxies.items())
    with page.csv("sheet", ["layer", "key", "rank", "coefficient", "prefix", "pattern", "kind"]) as write:
        for (layer, i), rows in sheet.items():
            for rank, c, ids in rows:
                write([[layer, i, rank, f"{c:.6g}", " ".join(model.texts[t] for t in ids), "", ""]])
    layers = sorted(found)
    means = {name: [_mean(proxies, layer, number) for layer in layers] for number, name in enumerate(names)}
    _draw(model, page, ffn, layers, kinds, means)
    page.heading("The sheet")
    page.text(
        "Write what at least three triggers share, and whether it is shallow or semantic; the button copies all as CSV."
    )
    page.raw(_sheet_markup(model.texts, sheet))
    return {"ffn": ffn, "layers": layers, "proxies": means, "keys": len(sheet)}


class SheetRow(NamedTuple):
    """A trigger of a key, with its coefficient c and its tokens."""

    rank: int
    c: float
    ids: list[int]


Sheet = dict[tuple[int, int], list[SheetRow]]  # of each (layer, key)


def _proxies(model, sheet: Sheet, single_tokens: bool, seed: int) -> dict[tuple[int, int], list[float]]:
    """{(layer, key): the three proxies of its triggers, and those of as many triggers of all keys of the layer}"""
    draw = np.random.default_rng(seed)
    # On the host: many short lists of tokens would each be a small call to the device.
    table_VD = np.asarray(model.params["embedding"])
    centre_D = np.asarray(jnp.mean(model.params["embedding"], 0, dtype=jnp.float32))

    def embed(ids):
        return table_VD[ids].astype(np.float32).mean(0) - centre_D

    pools: dict[int, list] = {}
    for (layer, _), rows in sheet.items():
        pools.setdefault(layer, []).extend(row.ids for row in rows)
    texts = model.texts if single_tokens else None
    proxies = {}
    for (layer, i), rows in sheet.items():
        own, pool = [row.ids for row in rows], pools[layer]
        drawn = [pool[k] for k in draw.choice(len(pool), min(len(own), len(pool)), replace=False)]
        proxies[layer, i] = [*measures(own, embed, texts), *measures(drawn, embed, texts)]
    return proxies


class Proxies(NamedTuple):
    """Of some triggers; the last two are NaN for fewer than two triggers."""

    shared: float
    overlap: float
    similarity: float


def measures(triggers: list[list[int]], embed: Callable[[list[int]], np.ndarray], texts: list[str] | None) -> Proxies:
    """The proxies of some triggers, each a list of token ids.

    Args:
      embed: token ids -> their mean embedding [D], less that of the vocabulary.
      texts: of every token id, where triggers are single tokens; None where they are prefixes.
    """
    if texts:
        ends = [token_classes.kind(ids[0], texts[ids[0]]) for ids in triggers]
        grams = [_grams(texts[ids[0]].lower()) for ids in triggers]
    else:
        ends = [ids[-1] for ids in triggers]
        grams = [_grams(ids[-_LAST:]) for ids in triggers]
    shared = max(map(ends.count, ends)) / len(ends)
    if len(triggers) < 2:
        return Proxies(shared, np.nan, np.nan)
    overlap = np.mean([len(a & b) / len(a | b) for a, b in itertools.combinations(grams, 2)])
    x_ND = np.stack([embed(ids[-_LAST:]) for ids in triggers])
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    pairs = np.triu_indices(len(x_ND), 1)
    return Proxies(shared, float(overlap), float((x_ND @ x_ND.T)[pairs].mean()))


def _grams(items) -> set:
    """1- and 2-grams of tokens or characters."""
    items = list(items)
    return set(items) | set(itertools.pairwise(items))


def _mean(proxies, layer, number) -> float:
    """Mean of one proxy over the keys of a layer; NaN where no key of it fires."""
    return float(np.mean([values[number] for (at, _), values in proxies.items() if at == layer] or [np.nan]))


def _draw(model, page, ffn, layers, kinds, means):
    for kind in kinds:
        title = kind.replace("_", " ").replace("ngram", "n-gram")
        series = {"a key's triggers": means[kind], "triggers of all keys mixed": means[f"{kind}_at_random"]}
        figure = plots.by_layer(series, title, layers=layers)
        page.figure(kind, figure, f"Proxy: {title}; {model.label(ffn)}, mean of keys.")


_COPY_BUTTON = """<button onclick="copySheet()">copy as CSV</button><script>
function copySheet() {
  const lines = [...document.querySelectorAll('input')].map(e => [e.dataset.layer, e.dataset.key,
    '"' + e.value.replaceAll('"', '""') + '"', e.parentNode.nextElementSibling.value].join(','));
  navigator.clipboard.writeText(['layer,key,pattern,kind', ...lines].join('\\n'));
}
</script>"""


def _sheet_markup(texts: list[str], sheet: Sheet) -> str:
    """HTML with a list of triggers and an input box for each key."""
    parts = []
    for (layer, i), rows in sheet.items():
        items = []
        for row in rows:
            tokens = "".join(f"<span class=t>{html.escape(texts[t])}</span>" for t in row.ids[-_SHOWN:])
            items.append(f"<li>{tokens}</li>")
        parts.append(
            f'<h3>layer {layer}, key {i}</h3><ol>{"".join(items)}</ol><label>pattern <input size="60" '
            f'data-layer="{layer}" data-key="{i}"></label> '
            "<select><option><option>shallow<option>semantic<option>both</select>"
        )
    return "\n".join([*parts, _COPY_BUTTON])
