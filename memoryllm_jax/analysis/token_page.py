"""The searchable part of the page of `coefficients`: type a token, see its keys, neighbours and rows, layer by
layer."""

import numpy as np

from memoryllm_jax.common import report

KEY_FIELDS = (
    *("layer", "key", "sign", "tokens", "coefficients", "texts"),
    *("value_tokens", "value_probabilities", "value_texts"),
)

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


def key_rows(layer: int, triggers, says, texts: list[str]) -> list[list]:
    """One line of KEY_FIELDS for each key of a layer."""
    out = []
    for key, (sign, labels, c, ids, p) in enumerate(zip(*triggers, *says)):
        labels, c = labels[labels >= 0], c[labels >= 0]
        out.append([layer, key, int(sign), *_joined(labels, c, texts), *_joined(ids, p, texts)])
    return out


def _joined(ids, numbers, texts):
    return " ".join(map(str, ids)), " ".join(f"{x:.4g}" for x in numbers), " ".join(texts[i] for i in ids)


def content(shown_Q, strongest, keys: dict, near, rows, texts: list[str]) -> dict:
    """What the page holds of the tokens shown, and of the keys that are strongest for one of them.

    Args:
      strongest: (keys, coefficients, shares) [L, Q, k].  keys: {(layer, key): (sign, ids, c, value's ids, p)}.
      near: (cosines, ids) [L + 1, Q, k].  rows: (norms [L, Q], top tokens [L, Q, k]).
    """
    (keys_LQk, c_LQk, share_LQk), (norms_LQ, says_LQk) = strongest, rows
    tokens = {}
    for q, t in enumerate(shown_Q):
        tokens[int(t)] = {
            "keys": keys_LQk[:, q],
            "c": _short(c_LQk[:, q]),
            "share": _short(share_LQk[:, q]),
            "near": near[1][:, q],
            "cosine": _short(near[0][:, q]),
            "norm": _short(norms_LQ[:, q]),
            "says": says_LQk[:, q],
        }
    used = {f"{at}:{i}": [s, a, _short(c), b, _short(p)] for (at, i), (s, a, c, b, p) in keys.items()}
    ids = {int(t) for t in shown_Q} | set(near[1].ravel().tolist()) | set(says_LQk.ravel().tolist())
    for _, fires, _, says, _ in used.values():
        ids |= set(fires.tolist()) | set(says.tolist())
    named = {i: texts[i] for i in sorted(ids)}
    return {"layers": len(keys_LQk), "texts": named, "tokens": tokens, "keys": used, "first": int(shown_Q[0])}


def _short(values) -> list:
    """Three significant digits, to keep the page small."""
    values = np.asarray(values, np.float64)
    if values.ndim > 1:
        return [_short(v) for v in values]
    return [float(f"{v:.3g}") for v in values]


def markup(content: dict) -> str:
    return _MARKUP % report.embedded_json(content)
