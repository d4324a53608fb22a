"""The searchable part of the page of `coefficients`: name a token, and see its keys, neighbours and rows by layer."""

from typing import NamedTuple

import numpy as np

from memoryllm_jax.analysis.neighbours import Neighbours
from memoryllm_jax.analysis.vocabulary import StrongestKeys
from memoryllm_jax.common import report

_MARKUP = """<p><label>Token:
<input id="q" list="all" size="30" autocomplete="off" placeholder="text, ␣text or #ID"></label>
<datalist id="all"></datalist> <span id="note"></span></p><div id="out"></div>
<script type="application/json" id="content">%s</script>
<script>
const D = JSON.parse(document.getElementById('content').textContent), out = document.getElementById('out');
const text = i => D.texts[i], add = (e, tag, s) => { const x = document.createElement(tag); x.textContent = s ?? '';
  e.appendChild(x); return x; };
const tokens = (e, ids, notes) => ids.forEach((i, n) => { const x = add(e, 'span', text(i)); x.className = 't';
  x.title = '#' + i + (notes ? ' ' + notes[n] : ''); if (i in D.tokens) { x.style.cursor = 'pointer';
  x.style.textDecoration = 'underline dotted'; x.onclick = () => show(i); } });
const byText = Object.create(null);
for (const i in D.tokens) { byText[text(i)] ??= i; add(document.getElementById('all'), 'option').value = text(i); }
function show(i) {
  const t = D.tokens[i], q = document.getElementById('q');
  q.value = text(i); out.replaceChildren(); document.getElementById('note').textContent = '#' + i;
  const all = add(out, 'p', 'Nearest over all layers: '); tokens(all, t.near[D.layers], t.cosine[D.layers]);
  const table = add(out, 'table'), head = add(table, 'tr');
  for (const name of ['layer', 'strongest keys: c, share of the row', 'nearest tokens', 'norm of the row', 'row says'])
    add(head, 'th', name);
  for (let l = 0; l < D.layers; l++) {
    const line = add(table, 'tr'); add(line, 'td', l); const cell = add(line, 'td');
    t.keys[l].forEach((k, n) => { const more = add(cell, 'details'), use = D.keys[l + ':' + k];
      add(more, 'summary', k + ': ' + t.c[l][n] + ', ' + (100 * t.share[l][n]).toFixed(1) + '%%');
      tokens(add(more, 'div', 'used most by '), use[1], use[2]);
      tokens(add(more, 'div', (use[0] > 0 ? 'value' : 'minus the value') + ' says '), use[3], use[4]); });
    tokens(add(line, 'td'), t.near[l], t.cosine[l]); add(line, 'td', t.norm[l]).className = 'n';
    tokens(add(line, 'td'), t.says[l]);
  }
}
document.getElementById('q').onchange = e => { const v = e.target.value;
  const i = byText[v] ?? byText['␣' + v.trim()] ?? byText[v.replaceAll(' ', '␣')]
    ?? (v[0] == '#' && v.slice(1) in D.tokens ? v.slice(1) : null);
  if (i != null) show(i); else document.getElementById('note').textContent = 'not on this page'; };
show(D.first);
</script>"""


class Key(NamedTuple):
    """What the page holds of a key.

    sign: of the coefficients of its triggers.
    triggers, coefficients: token ids that use the key most, and their c.
    tokens, probabilities: the top tokens of sign * value.
    """

    sign: int
    triggers: np.ndarray
    coefficients: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray


class Rows(NamedTuple):
    """What the page holds of the memory rows of Q tokens.

    norms_LQ: their norms.  tokens_LQk: the top tokens that the output head makes of each.
    """

    norms_LQ: np.ndarray
    tokens_LQk: np.ndarray


def content(
    shown_Q: np.ndarray,
    strongest: StrongestKeys,
    keys: dict[tuple[int, int], Key],
    near: Neighbours,
    rows: Rows,
    texts: list[str],
) -> dict:
    """The data of the page, as its script reads them.

    Args:
      shown_Q: ids of the tokens.
      strongest: their keys, [L, Q, k].
      keys: {(layer, key): what is shown of it} of the keys that are strongest for one of the tokens.
      near: their neighbours, [L + 1, Q, k].
      rows: their rows.
      texts: of every token id.
    """
    tokens = {}
    for q, t in enumerate(shown_Q):
        tokens[int(t)] = {
            "keys": strongest.keys[:, q],
            "c": _rounded(strongest.c[:, q]),
            "share": _rounded(strongest.share[:, q]),
            "near": near.ids[:, q],
            "cosine": _rounded(near.cosines[:, q]),
            "norm": _rounded(rows.norms_LQ[:, q]),
            "says": rows.tokens_LQk[:, q],
        }
    used = {}
    ids = {int(t) for t in shown_Q} | set(near.ids.ravel().tolist()) | set(rows.tokens_LQk.ravel().tolist())
    for (layer, number), key in keys.items():
        used[f"{layer}:{number}"] = [
            key.sign,
            key.triggers,
            _rounded(key.coefficients),
            key.tokens,
            _rounded(key.probabilities),
        ]
        ids |= set(key.triggers.tolist()) | set(key.tokens.tolist())
    return {
        "layers": len(strongest.keys),
        "texts": {i: texts[i] for i in sorted(ids)},
        "tokens": tokens,
        "keys": used,
        "first": int(shown_Q[0]),
    }


def _rounded(values) -> list:
    """Three significant digits, to keep the page small."""
    values = np.asarray(values, np.float64)
    if values.ndim > 1:
        return [_rounded(v) for v in values]
    return [float(f"{v:.3g}") for v in values]


def markup(content: dict) -> str:
    """HTML of the searchable part."""
    return _MARKUP % report.embedded_json(content)
