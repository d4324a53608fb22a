"""A sheet on which people note what a key's triggers share, and automatic proxies of their judgement."""

import hashlib
import html
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import token_classes
from memoryllm_jax.analysis.corpus import CorpusOptions
from memoryllm_jax.analysis.key_values import FFN, KeyValueModel
from memoryllm_jax.analysis.triggers import (
    Key,
    Keys,
    Top,
    each_trigger,
    find,
    note_unread,
    open_corpus,
    sample_keys,
    tokens_of,
)
from memoryllm_jax.common import plots
from memoryllm_jax.common.report import Report

_LAST = 8  # tokens of a prefix that the proxies look at
_SHOWN = 16  # tokens of a prefix that the page shows


def annotate(
    model: KeyValueModel,
    page: Report,
    *,
    text: CorpusOptions,
    ffn: FFN = "",
    keys: Keys = 10,
    key: Key = (),
    top: Top = 25,
) -> dict:
    """A sheet to annotate a key's triggers by hand, with automatic proxies.

    Geva et al. 2021, section 3.1: people name patterns that at least three of a key's 25 triggers share, and call each
    shallow (such as the same last word) or semantic. The sheet as CSV has a line for each trigger, with columns for the
    pattern and its kind. The page has a box for each key, beside the last 16 tokens of its triggers.

    The proxies do not replace such judgements. Each is compared with its value for as many triggers drawn from all keys
    of the layer.

    Shared last token: the share of the triggers that end with the commonest last token; for FFN-M, whose triggers are
    tokens, the share of the commonest class by text, such as digits.

    N-gram overlap: the mean, over pairs of triggers, of the Jaccard index of the 1- and 2-grams of their last 8 tokens;
    for FFN-M, of their characters.

    Embedding similarity: the mean, over pairs of triggers, of the cosine of their mean input embeddings, each over the
    last 8 tokens and less the mean embedding of the vocabulary.
    """
    ffn = model.ffn(ffn)
    note_unread(ffn, text)
    chosen = sample_keys(model, ffn, keys, key, text.seed)
    corpus = open_corpus(model, ffn, text, page)
    found = find(model, ffn, chosen, top, corpus)
    sheet: Sheet = {}
    for trigger in each_trigger(chosen, found):
        # The tokens of a prefix are read from the data once, and kept for the steps below.
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
                prefix = " ".join(model.texts[t] for t in ids)
                write([[layer, i, rank, f"{c:.6g}", prefix, "", ""]])  # people fill in pattern and kind
    layers = sorted(found)
    means = {name: [_mean(proxies, layer, number) for layer in layers] for number, name in enumerate(names)}
    _draw(model, page, ffn, layers, kinds, means)
    page.heading("The sheet")
    page.text(
        "Write what at least three triggers share, and choose whether it is shallow or semantic. This browser keeps "
        "the entries; the button at the bottom saves them as CSV."
    )
    page.raw(_sheet_markup(model.texts, sheet, single_tokens=corpus is None))
    return {"ffn": ffn, "layers": layers, "proxies": means, "keys": len(sheet)}


class SheetRow(NamedTuple):
    """A trigger of a key: its rank (1 is the strongest), its coefficient c and its token ids."""

    rank: int
    c: float
    ids: list[int]


Sheet = dict[tuple[int, int], list[SheetRow]]  # {(layer, key): the key's triggers}


def _proxies(model, sheet: Sheet, single_tokens: bool, seed: int) -> dict[tuple[int, int], list[float]]:
    """{(layer, key): the three proxies of its triggers, then those of as many triggers of any key of the layer}

    Args:
      single_tokens: triggers are tokens, as those of FFN-M, and not prefixes.
    """
    draw = np.random.default_rng(seed)
    # Means are taken on the host, because thousands of short lists of tokens would each be a small call to the device.
    table_VD = np.asarray(model.params["embedding"])
    centre_D = np.asarray(jnp.mean(model.params["embedding"], 0, dtype=jnp.float32))

    def embed(ids):
        # Without the common part of all embeddings, which would make any two triggers look alike.
        return table_VD[ids].astype(np.float32).mean(0) - centre_D

    pools: dict[int, list] = {}
    for (layer, _), rows in sheet.items():
        pools.setdefault(layer, []).extend(row.ids for row in rows)
    texts = model.texts if single_tokens else None
    proxies = {}
    for (layer, i), rows in sheet.items():
        own = [row.ids for row in rows]
        pool = pools[layer]
        # Without replacement, because a trigger that is drawn twice would be wholly like itself.
        drawn = [pool[k] for k in draw.choice(len(pool), min(len(own), len(pool)), replace=False)]
        proxies[layer, i] = [*measures(own, embed, texts), *measures(drawn, embed, texts)]
    return proxies


class Proxies(NamedTuple):
    """The proxies that `annotate` defines, of one set of triggers.

    shared: share of triggers in the commonest class: the last token, or for single tokens the kind of text.
    overlap: mean Jaccard index of 1- and 2-grams over pairs of triggers; NaN for fewer than two triggers.
    similarity: mean cosine of mean embeddings over pairs of triggers; NaN for fewer than two triggers.
    """

    shared: float
    overlap: float
    similarity: float


def measures(triggers: list[list[int]], embed: Callable[[list[int]], np.ndarray], texts: list[str] | None) -> Proxies:
    """Measures the proxies of one set of triggers, each a list of token ids.

    Args:
      embed: a function from token ids to their mean embedding [D], less the mean embedding of the vocabulary.
      texts: the text of every token id, if triggers are single tokens; None if they are prefixes.
    """
    if texts:
        ends = [token_classes.kind(ids[0], texts[ids[0]]) for ids in triggers]
        # In lower case, so that "The" and "the" count as alike.
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
    pairs = np.triu_indices(len(x_ND), 1)  # each pair once, and no trigger with itself
    return Proxies(shared, float(overlap), float((x_ND @ x_ND.T)[pairs].mean()))


def _grams(items) -> set:
    """The set of 1- and 2-grams of a sequence of tokens or characters."""
    items = list(items)
    return set(items) | set(itertools.pairwise(items))


def _mean(proxies, layer, number) -> float:
    """Mean of one proxy over the keys of a layer; NaN if none of them fires."""
    of_layer = [values[number] for (at, _), values in proxies.items() if at == layer]
    return float(np.mean(of_layer)) if of_layer else np.nan


def _draw(model, page, ffn, layers, kinds, means):
    """One figure for each proxy, by layer, beside its value by chance."""
    for kind in kinds:
        title = kind.replace("_", " ").replace("ngram", "n-gram")
        series = {"a key's triggers": means[kind], "triggers of all keys mixed": means[f"{kind}_at_random"]}
        figure = plots.by_layer(series, title, layers=layers)
        page.figure(kind, figure, f"Proxy: {title}; {model.label(ffn)}, mean of keys.")


# DIGEST stands for a digest of the sheet, under which the browser keeps what people have written.
_SCRIPT = """<p class="bar"><button id="save">save as CSV</button> <span id="count"></span></p>
<style>
.bar { position: sticky; bottom: 0; margin: 0; padding: .5em 0; background: white; border-top: 1px solid #ccc; }
ol.columns { columns: 9em; }
li { break-inside: avoid; }
</style>
<script>
const fields = [...document.querySelectorAll('.entry')];
const kept = 'annotate DIGEST';

function entries() {
  return fields.map(field => ({layer: field.dataset.layer, key: field.dataset.key,
    pattern: field.querySelector('input').value, kind: field.querySelector('select').value}));
}

function show() {
  const done = entries().filter(entry => entry.pattern || entry.kind).length;
  document.getElementById('count').textContent = done + ' of ' + fields.length + ' keys have an entry';
}

function keep() {
  localStorage.setItem(kept, JSON.stringify(entries()));
  show();
}

for (const entry of JSON.parse(localStorage.getItem(kept) ?? '[]')) {
  const field = fields.find(field => field.dataset.layer == entry.layer && field.dataset.key == entry.key);
  field.querySelector('input').value = entry.pattern;
  field.querySelector('select').value = entry.kind;
}
for (const field of fields) field.oninput = keep;
document.getElementById('save').onclick = () => {
  const quoted = text => '"' + text.replaceAll('"', '""') + '"';
  const lines = entries().map(entry => [entry.layer, entry.key, quoted(entry.pattern), entry.kind].join(','));
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([['layer,key,pattern,kind', ...lines, ''].join('\\n')]));
  link.download = 'patterns.csv';
  link.click();
};
show();
</script>"""


def _sheet_markup(texts: list[str], sheet: Sheet, single_tokens: bool) -> str:
    """HTML with a list of triggers, a box for their pattern and a choice of its kind for each key.

    Args:
      single_tokens: triggers are tokens, which are listed in columns, and not prefixes.
    """
    columns = ' class="columns"' if single_tokens else ""
    parts = []
    for (layer, i), rows in sheet.items():
        items = []
        for row in rows:
            tokens = "".join(f"<span class=t>{html.escape(texts[t])}</span>" for t in row.ids[-_SHOWN:])
            items.append(f"<li>{tokens}</li>")
        parts.append(
            f"<h3>layer {layer}, key {i}</h3><ol{columns}>{''.join(items)}</ol>"
            f'<p class="entry" data-layer="{layer}" data-key="{i}"><label>pattern <input size="60"></label> '
            "<label>kind <select><option><option>shallow<option>semantic<option>both</select></label></p>"
        )
    digest = hashlib.sha256(repr(sheet).encode()).hexdigest()[:16]
    return "\n".join([*parts, _SCRIPT.replace("DIGEST", digest)])
