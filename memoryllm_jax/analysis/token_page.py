"""The searchable part of the page of `coefficients`, which shows a token's keys, neighbours and rows by layer."""

from typing import NamedTuple

import numpy as np

from memoryllm_jax.analysis.neighbours import Neighbours
from memoryllm_jax.analysis.vocabulary import StrongestKeys
from memoryllm_jax.common import report

# The script is part of the page, which has to work as one file. CONTENT stands for the JSON of what `content` returns.
_MARKUP = """<p><label>Token:
<input id="q" list="all" size="30" autocomplete="off" placeholder="text, ␣text or #ID"></label>
<datalist id="all"></datalist> <span id="note"></span></p><div id="out"></div>
<script type="application/json" id="content">CONTENT</script>
<script>
const byId = id => document.getElementById(id);
const data = JSON.parse(byId('content').textContent);
const query = byId('q'), note = byId('note'), out = byId('out');

function add(parent, tag, text) {
  const element = document.createElement(tag);
  element.textContent = text ?? '';
  parent.appendChild(element);
  return element;
}

// Tokens that the page knows more of are links to it. The notes are shown when the mouse rests on a token.
function addTokens(parent, ids, notes) {
  ids.forEach((id, n) => {
    const span = add(parent, 'span', data.texts[id]);
    span.className = 't';
    span.title = '#' + id + (notes ? ' ' + notes[n] : '');
    if (id in data.tokens) {
      span.style.cursor = 'pointer';
      span.style.textDecoration = 'underline dotted';
      span.onclick = () => show(id);
    }
  });
}

function addKey(cell, layer, key, coefficient, share) {
  const [sign, triggers, coefficients, tokens, probabilities] = data.keys[layer + ':' + key];
  const details = add(cell, 'details');
  add(details, 'summary', key + ': ' + coefficient + ', ' + (100 * share).toFixed(1) + '%');
  addTokens(add(details, 'div', 'used most by '), triggers, coefficients);
  addTokens(add(details, 'div', (sign > 0 ? 'value' : 'minus the value') + ' says '), tokens, probabilities);
}

function show(id) {
  const token = data.tokens[id];
  query.value = data.texts[id];
  note.textContent = '#' + id;
  out.replaceChildren();
  addTokens(add(out, 'p', 'Nearest over all layers: '), token.near[data.layers], token.cosine[data.layers]);
  const table = add(out, 'table'), head = add(table, 'tr');
  for (const name of ['layer', 'strongest keys: c, share of the row', 'nearest tokens', 'norm of the row', 'row says'])
    add(head, 'th', name);
  for (let layer = 0; layer < data.layers; layer++) {
    const line = add(table, 'tr');
    add(line, 'td', layer);
    const keys = add(line, 'td');
    token.keys[layer].forEach((key, n) => addKey(keys, layer, key, token.c[layer][n], token.share[layer][n]));
    addTokens(add(line, 'td'), token.near[layer], token.cosine[layer]);
    add(line, 'td', token.norm[layer]).className = 'n';
    addTokens(add(line, 'td'), token.says[layer]);
  }
}

// Without a prototype, because a token may have a text such as "constructor".
const byText = Object.create(null);
for (const id in data.tokens) {
  byText[data.texts[id]] ??= id;  // the first of several tokens that look alike
  add(byId('all'), 'option').value = data.texts[id];
}

function find(name) {
  const id = byText[name] ?? byText['␣' + name.trim()] ?? byText[name.replaceAll(' ', '␣')];
  if (id != null) return id;
  const number = name.slice(1);
  return name[0] == '#' && number in data.tokens ? number : null;
}

query.onchange = () => {
  const id = find(query.value);
  if (id != null) return show(id);
  note.textContent = 'not on this page';
  out.replaceChildren();
};
show(data.first);
</script>"""


class Key(NamedTuple):
    """What the page shows of a key.

    sign: 1 or -1, the sign of the coefficients of its triggers.
    triggers, coefficients: ids of the tokens that use the key most, and their c.
    tokens, probabilities: ids of the top tokens of sign * value, and their probabilities.
    """

    sign: int
    triggers: np.ndarray
    coefficients: np.ndarray
    tokens: np.ndarray
    probabilities: np.ndarray


class Rows(NamedTuple):
    """What the page shows of the memory rows of Q tokens.

    norms_LQ: their norms.  tokens_LQk: ids of the top tokens that the output head makes of each row.
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
      shown_Q: ids of the tokens that the page shows.
      strongest: the tokens' strongest keys, [L, Q, k].
      keys: {(layer, key): what the page shows of it}, for all keys in `strongest`.
      near: the tokens' neighbours, [L + 1, Q, k].
      rows: the tokens' memory rows.
      texts: the text of every token id.
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
    # The page has the texts only of ids that occur in it: a whole vocabulary would take megabytes.
    ids = {int(t) for t in shown_Q} | set(near.ids.ravel().tolist()) | set(rows.tokens_LQk.ravel().tolist())
    for (layer, number), key in keys.items():
        # A list, because names of fields would be repeated for thousands of keys.
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
    """Rounds numbers to three significant digits, to keep the page small."""
    values = np.asarray(values, np.float64)
    if values.ndim > 1:
        return [_rounded(v) for v in values]
    return [float(f"{v:.3g}") for v in values]


def markup(content: dict) -> str:
    """The HTML of the searchable part, for the data that `content` returns."""
    return _MARKUP.replace("CONTENT", report.embedded_json(content))
