"""What fires a key: its trigger prefixes, and what becomes of its coefficient without one of their tokens.

Geva et al. 2021, "Transformer Feed-Forward Layers Are Key-Value Memories", arXiv 2012.14913, section 3.
"""

import itertools
import re

import numpy as np

from memoryllm_jax.analysis import topk
from memoryllm_jax.analysis.corpus import Corpus, states
from memoryllm_jax.analysis.key_values import Inside, key_coefficients
from memoryllm_jax.analysis.vocabulary import chunk_count, key_triggers
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.legacy import at_least
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference.decoder import bucket

_SHOWN = 12  # tokens of a prefix that a page shows
_LISTED = 5  # triggers of a key likewise
_BATCH = 4096  # positions of changed prefixes that run at a time
REMOVED = ("first", "last", "random")


def sample_keys(inside: Inside, ffn: str, count: int, key: list[str], seed: int) -> dict[int, np.ndarray]:
    """{layer: keys}: those named as LAYER:KEY, else `count` a layer drawn at random, all of them for 0.

    Raises: UserError.
    """
    L, F = inside.config.layers, inside.width(ffn)
    named: dict[int, list[int]] = {}
    for name in key:
        match = re.fullmatch(r"(\d+):(\d+)", name)
        if not match or int(match[1]) >= L or int(match[2]) >= F:
            raise UserError(f"--key={name}: expected LAYER:KEY with a layer below {L} and a key below {F}")
        named.setdefault(int(match[1]), []).append(int(match[2]))
    if named:
        return {layer: np.unique(keys) for layer, keys in sorted(named.items())}
    if count < 0:
        raise UserError(f"--keys: expected a number of keys a layer, or 0 for all, found {count}")
    draw = np.random.default_rng(seed)
    return {layer: np.sort(draw.choice(F, min(count or F, F), replace=False)) for layer in range(L)}


def find(inside: Inside, ffn: str, keys: dict, top: int, corpus: Corpus | None) -> dict[int, topk.Triggers]:
    """The triggers of each layer's keys; labels are token ids for FFN-M, else those of the corpus, read once."""
    at_least({"top": top})
    if ffn == "memory":
        progress = Progress("triggers", len(keys) * chunk_count(inside.config.vocab_size), "chunk")
        found = {}
        for layer in keys:
            found[layer] = key_triggers(inside, layer, keys[layer], top, lambda: progress.update(progress.done + 1))
        progress.close()
        return found
    sides = {layer: topk.TwoSided(len(keys[layer]), top) for layer in keys}
    progress = Progress("triggers", corpus.batches, "batch")
    for number, (tokens_BT, labels, real) in enumerate(corpus, 1):
        for layer, state in enumerate(states(inside, tokens_BT)):
            if layer in keys:
                c_NK = key_coefficients(state.queries[ffn], inside.layer(ffn, layer), keys[layer])
                sides[layer].add(c_NK, labels, real)
        progress.update(number)
    progress.close()
    return {layer: side.result() for layer, side in sides.items()}


def open_corpus(inside: Inside, ffn: str, data: str, split: str, length: int, limit: int, page) -> Corpus | None:
    """The text that keys of FFN-C and base's FFN are asked over; None for FFN-M, which needs none."""
    if ffn == "memory":
        page.facts["data"] = f"the whole vocabulary, {inside.config.vocab_size:,} tokens"
        return None
    corpus = Corpus(inside, data, split, length, limit)
    page.facts |= corpus.facts()
    return corpus


def tokens_of(corpus: Corpus | None, label: int) -> list[int]:
    """The tokens of a trigger."""
    return [label] if corpus is None else corpus.prefix(label).tolist()


def trigger_rows(keys: dict[int, np.ndarray], found: dict[int, topk.Triggers]):
    """Yields (layer, key, sign, rank, label, coefficient) of every trigger."""
    for layer, (sign_K, labels_Kt, c_Kt) in found.items():
        for key, sign, labels, cs in zip(keys[layer], sign_K, labels_Kt, c_Kt):
            for rank, (label, c) in enumerate(zip(labels, cs), 1):
                if label >= 0:
                    yield layer, int(key), int(sign), rank, int(label), float(c)


def triggers(
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
    """The top-t trigger prefixes of a sample of keys: those with the largest memory coefficient.

    Geva et al. 2021, section 3.1: the coefficient of key i for a prefix is that of the prefix's last position. There it
    is ReLU(x k_i); here SwiGLU's c_i = (q k_i) SiLU(q W_gate)_i takes its place, which is signed. To flip a key and its
    value changes nothing of the model, so a key's triggers are those on the side of its strongest. All positions of the
    text are prefixes, its windows' beginnings; FFN-M reads one token, so its triggers are tokens, and exact over the
    whole vocabulary.
    """
    ffn = inside.ffn_name(ffn)
    chosen = sample_keys(inside, ffn, keys, key, seed)
    corpus = open_corpus(inside, ffn, data, split, length, limit, page)
    found = find(inside, ffn, chosen, top, corpus)
    shown = []
    with page.csv("triggers", ["layer", "key", "sign", "rank", "coefficient", "prefix", "next"]) as write:
        for layer, i, sign, rank, label, c in trigger_rows(chosen, found):
            following = "" if corpus is None else inside.texts[corpus.next(label)]
            text = [inside.texts[t] for t in tokens_of(corpus, label)]
            write([[layer, i, sign, rank, f"{c:.6g}", " ".join(text), following]])
            if rank <= _LISTED:
                shown.append([layer, i, rank, c, text[-_SHOWN:], following])
    selectivity = {
        f"trigger {rank}": [float(np.nanmean(_relative(t.c_Kt, rank))) for t in found.values()]
        for rank in sorted({min(5, top), min(10, top), top} - {1})
    }
    if selectivity:
        page.figure(
            "selectivity",
            plots.by_layer(selectivity, "coefficient over the first's", layers=list(found)),
            f"How far the coefficient has fallen at a later trigger; mean of the sampled keys of {inside.label(ffn)}.",
        )
    page.heading("Strongest triggers")
    page.table(["layer", "key", "rank", "coefficient", "the prefix's end" if corpus else "token", "next"], shown)
    return {
        "ffn": ffn,
        "keys": {layer: {"key": chosen[layer], **t._asdict()} for layer, t in found.items()},
        "selectivity": selectivity,
    }


def _relative(c_Kt, rank):
    first = np.where(c_Kt[:, 0] == 0, np.nan, c_Kt[:, 0])
    return c_Kt[:, rank - 1] / first


def mutate(
    inside: Inside,
    page,
    keys: int = 10,
    key: list[str] = (),
    top: int = 25,
    data: str = "",
    split: str = "train",
    length: int = 64,
    limit: int = 1 << 20,
    seed: int = 0,
) -> dict:
    """How a key's coefficient changes when a token of its trigger prefix is removed: the first, the last, a random one.

    Geva et al. 2021, section 3.2, figure 3: (c' - c) / c at the last position of the shortened prefix, over the top-t
    triggers of sampled keys; -100% is a key that no longer fires. Prefixes of one token are left out. It has meaning
    for FFN-C and base's FFN alone: FFN-M reads one token.
    """
    inside.need_compute("mutate")
    chosen = sample_keys(inside, "compute", keys, key, seed)
    corpus = open_corpus(inside, "compute", data, split, length, limit, page)
    found = find(inside, "compute", chosen, top, corpus)
    rows = list(trigger_rows(chosen, found))
    changes = removals(inside, corpus, rows, seed)
    names = ["layer", "key", "rank", "prefix_length", *REMOVED]
    with page.csv("prefixes", names) as write:
        write([r[0], r[1], r[3], n, *(f"{x:.5f}" for x in change)] for r, n, change in changes)
    layers = sorted({r[0] for r, *_ in changes})
    by = {layer: np.array([change for r, _, change in changes if r[0] == layer]) for layer in layers}
    mean = {name: [100 * float(by[layer][:, i].mean()) for layer in layers] for i, name in enumerate(REMOVED)}
    middle = {name: [100 * float(np.median(by[layer][:, i])) for layer in layers] for i, name in enumerate(REMOVED)}
    for name, series in (("mean", mean), ("median", middle)):
        figure = plots.by_layer({f"{k} token": v for k, v in series.items()}, "change of c, %", layers=layers)
        page.figure(
            name, figure, f"{name.capitalize()} relative change when a token is removed; {len(changes):,} prefixes."
        )
    table = zip(layers, map(len, by.values()), *mean.values(), *middle.values())
    page.table(["layer", "prefixes", *(f"{n}, {k} %" for k in ("mean", "median") for n in REMOVED)], list(table))
    return {"layers": layers, "mean_percent": mean, "median_percent": middle, "prefixes": len(changes)}


def removals(inside: Inside, corpus: Corpus, rows: list, seed: int) -> list[tuple]:
    """(row, prefix length, (c' - c) / c for each of REMOVED) of those triggers that have more than one token."""
    draw, work = np.random.default_rng(seed), []
    for row in rows:
        prefix = corpus.prefix(row[4])
        n = len(prefix)
        if n > 1:
            places = (0, n - 1, int(draw.integers(n)))
            work += [(row, n, np.delete(prefix, place)) for place in places]
    out = []
    progress = Progress("mutate", len(work), "prefix")
    # Of like length and layer together: little padding, and layers above are not run.
    order = sorted(range(len(work)), key=lambda k: (work[k][0][0], work[k][1]))
    changed = np.empty(len(work))
    done = 0
    while done < len(order):
        layer = work[order[done]][0][0]
        batch = order[done : done + max(1, _BATCH // corpus.length)]
        batch = [k for k in batch if work[k][0][0] == layer]
        changed[batch] = _last_coefficients(inside, layer, [(work[k][2], work[k][0][1]) for k in batch], corpus.length)
        done += len(batch)
        progress.update(done)
    progress.close()
    for first in range(0, len(work), len(REMOVED)):
        row, n, _ = work[first]
        out.append((row, n, (changed[first : first + len(REMOVED)] - row[5]) / row[5]))
    return out


def _last_coefficients(inside, layer, items, length):
    """The coefficient of each (prefix, key) at the prefix's last position."""
    T = bucket(max(len(prefix) for prefix, _ in items), length)
    B = max(1, _BATCH // length)
    tokens_BT = np.zeros((B, T), np.int32)
    for row, (prefix, _) in enumerate(items):
        tokens_BT[row, : len(prefix)] = prefix
    last, own = np.zeros((2, B), np.int32)
    last[: len(items)] = [row * T + len(prefix) - 1 for row, (prefix, _) in enumerate(items)]
    own[: len(items)] = [key for _, key in items]
    state = next(itertools.islice(states(inside, tokens_BT), layer, None))
    c_BB = key_coefficients(state.queries["compute"][last], inside.layer("compute", layer), own)
    return np.diagonal(np.asarray(c_BB))[: len(items)]
