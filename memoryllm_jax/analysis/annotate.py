"""Sheets for people who look for the pattern in a key's triggers, and automatic proxies of what they would find."""

import html
import itertools

import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import token_classes
from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.analysis.triggers import find, open_corpus, sample_keys, tokens_of, trigger_rows
from memoryllm_jax.common import plots

_LAST = 8  # tokens of a prefix that the proxies look at


def annotate(
    inside: Inside,
    page,
    ffn: str = "",
    keys: int = 10,
    key: list[str] = (),
    top: int = 25,
    data: str = "",
    split: str = "train",
    length: int = 64,
    limit: int = 1 << 20,
    seed: int = 0,
) -> dict:
    """A sheet to annotate a key's triggers by hand, with automatic proxies.

    Geva et al. 2021, section 3.1: people name patterns that at least three of a key's 25 triggers share, and call each
    shallow (such as the same last word) or semantic. The sheet as CSV has a line for each trigger, with columns for the
    pattern and its kind; the page has a box for each key, beside the last 16 tokens of its triggers. The proxies are
    not such judgements, and stand beside what they give for as many triggers drawn from all keys of the layer. Shared
    last token: share of the triggers that end with the commonest last token; of FFN-M, whose triggers are tokens, share
    of the commonest surface class. N-gram overlap: mean over pairs of the Jaccard index of 1- and 2-grams of the last 8
    tokens; of FFN-M, of the characters. Embedding similarity: mean over pairs of the cosine of mean input embeddings of
    the last 8 tokens, centred on the vocabulary.
    """
    ffn = inside.ffn_name(ffn)
    chosen = sample_keys(inside, ffn, keys, key, seed)
    corpus = open_corpus(inside, ffn, data, split, length, limit, page)
    found = find(inside, ffn, chosen, top, corpus)
    sheet: dict[tuple, list] = {}
    for layer, i, _, rank, label, c in trigger_rows(chosen, found):
        sheet.setdefault((layer, i), []).append((rank, c, tokens_of(corpus, label)))
    proxies, draw = [], np.random.default_rng(seed)
    table_VD = np.asarray(inside.params["embedding"])
    centre_D = np.asarray(jnp.mean(inside.params["embedding"], 0, dtype=jnp.float32))
    embed = lambda ids: table_VD[ids].astype(np.float32).mean(0) - centre_D  # noqa: E731
    pools = {layer: [ids for (at, _), rows in sheet.items() if at == layer for *_, ids in rows] for layer in found}
    for (layer, i), rows in sheet.items():
        own = [ids for *_, ids in rows]
        pool = pools[layer]
        other = [pool[k] for k in draw.choice(len(pool), min(len(own), len(pool)), replace=False)]
        texts = inside.texts if corpus is None else None
        proxies.append([layer, i, *measures(own, embed, texts), *measures(other, embed, texts)])
    names = ["shared_class" if corpus is None else "shared_last_token", "ngram_overlap", "embedding_similarity"]
    head = ["layer", "key", *names, *(f"{name}_at_random" for name in names)]
    with page.csv("proxies", head) as write:
        write([*row[:2], *(f"{x:.4f}" for x in row[2:])] for row in proxies)
    with page.csv("sheet", ["layer", "key", "rank", "coefficient", "prefix", "pattern", "kind"]) as write:
        for (layer, i), rows in sheet.items():
            write([layer, i, rank, f"{c:.6g}", " ".join(inside.texts[t] for t in ids), "", ""] for rank, c, ids in rows)
    layers = sorted(found)
    mean = {name: [_mean(proxies, layer, 2 + k) for layer in layers] for k, name in enumerate(head[2:])}
    for name in names:
        title = name.replace("_", " ").replace("ngram", "n-gram")
        series = {"a key's triggers": mean[name], "triggers of all keys mixed": mean[f"{name}_at_random"]}
        page.figure(
            name, plots.by_layer(series, title, layers=layers), f"Proxy: {title}; {inside.label(ffn)}, mean of keys."
        )
    page.heading("The sheet")
    page.text(
        "Write what at least three triggers share, and whether it is shallow or semantic; the button copies all as CSV."
    )
    page.raw(_sheet_markup(inside, sheet))
    return {"ffn": ffn, "layers": layers, "proxies": mean, "keys": len(sheet)}


def _mean(rows, layer, column) -> float:
    return float(np.mean([row[column] for row in rows if row[0] == layer] or [np.nan]))


def measures(triggers: list[list[int]], embed, texts: list[str] | None) -> tuple[float, float, float]:
    """The three proxies of some triggers, each a list of token ids; the last two are NaN for fewer than two.

    Args:
      embed: token ids -> their mean embedding [D], centred.
      texts: of every id, where triggers are single tokens and not prefixes.
    """
    if texts:
        ends = [token_classes.kind(ids[0], texts[ids[0]]) for ids in triggers]
        grams = [_grams(texts[ids[0]].lower()) for ids in triggers]
    else:
        ends = [ids[-1] for ids in triggers]
        grams = [_grams(ids[-_LAST:]) for ids in triggers]
    shared = max(map(ends.count, ends)) / len(ends)
    if len(triggers) < 2:
        return shared, np.nan, np.nan
    overlap = np.mean([len(a & b) / len(a | b) for a, b in itertools.combinations(grams, 2)])
    x_ND = np.stack([embed(ids[-_LAST:]) for ids in triggers])
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    pairs = np.triu_indices(len(x_ND), 1)
    return shared, float(overlap), float((x_ND @ x_ND.T)[pairs].mean())


def _grams(items) -> set:
    items = list(items)
    return set(items) | set(itertools.pairwise(items))


def _sheet_markup(inside, sheet) -> str:
    lines = []
    for (layer, i), rows in sheet.items():
        items = "".join(
            f"<li>{''.join(f'<span class=t>{html.escape(inside.texts[t])}</span>' for t in ids[-16:])}</li>"
            for *_, ids in rows
        )
        lines.append(
            f'<h3>layer {layer}, key {i}</h3><ol>{items}</ol><label>pattern <input size="60" data-layer="{layer}" '
            f'data-key="{i}"></label> <select><option><option>shallow<option>semantic<option>both</select>'
        )
    script = """<button onclick="copySheet()">copy as CSV</button><script>
function copySheet() {
  const lines = [...document.querySelectorAll('input')].map(e => [e.dataset.layer, e.dataset.key,
    '"' + e.value.replaceAll('"', '""') + '"', e.parentNode.nextElementSibling.value].join(','));
  navigator.clipboard.writeText(['layer,key,pattern,kind', ...lines].join('\\n'));
}
</script>"""
    return "\n".join([*lines, script])
