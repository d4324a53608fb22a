"""How a key's coefficient changes without a token of its trigger prefix (Geva et al. 2021, section 3.2)."""

import itertools
from typing import NamedTuple

import numpy as np

from memoryllm_jax.analysis.corpus import Corpus, TextOptions, states
from memoryllm_jax.analysis.key_values import KeyValueModel, coefficients
from memoryllm_jax.analysis.triggers import Key, Keys, Top, Trigger, each_trigger, find, open_corpus, sample_keys
from memoryllm_jax.common import plots
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report
from memoryllm_jax.inference.decoder import bucket

REMOVED = ("first", "last", "random")  # the token that is removed


def mutate(
    model: KeyValueModel,
    page: Report,
    *,
    text: TextOptions,
    keys: Keys = 10,
    key: Key = (),
    top: Top = 25,
) -> dict:
    """How a key's coefficient changes when a token of its trigger prefix is removed: the first, the last, a random one.

    Geva et al. 2021, section 3.2, figure 3: (c' - c) / c at the last position of the shortened prefix, over the top-t
    triggers of sampled keys; at -100% the key no longer fires. Prefixes of one token are left out. This applies to
    FFN-C and base's FFN alone, as FFN-M reads single tokens.
    """
    model.require_compute("mutate")
    chosen = sample_keys(model, "compute", keys, key, text.seed)
    corpus = open_corpus(model, "compute", text, page)
    found = find(model, "compute", chosen, top, corpus)
    changes = removals(model, corpus, list(each_trigger(chosen, found)), text.seed)
    with page.csv("prefixes", ["layer", "key", "rank", "prefix_length", *REMOVED]) as write:
        for trigger, length, change in changes:
            write([[trigger.layer, trigger.key, trigger.rank, length, *(f"{x:.5f}" for x in change)]])
    layers = sorted({change.trigger.layer for change in changes})
    by_layer = [np.array([c.change for c in changes if c.trigger.layer == layer]) for layer in layers]
    mean, median = {}, {}
    for number, name in enumerate(REMOVED):
        mean[name] = [100 * float(of_layer[:, number].mean()) for of_layer in by_layer]
        median[name] = [100 * float(np.median(of_layer[:, number])) for of_layer in by_layer]
    for name, by_token in (("mean", mean), ("median", median)):
        series = {f"{removed} token": values for removed, values in by_token.items()}
        page.figure(
            name,
            plots.by_layer(series, "change of c, %", layers=layers),
            f"{name.capitalize()} relative change when a token is removed; {len(changes):,} prefixes.",
        )
    head = ["layer", "prefixes"]
    head += [f"{removed}, {statistic} %" for statistic in ("mean", "median") for removed in REMOVED]
    page.table(head, list(zip(layers, map(len, by_layer), *mean.values(), *median.values())))
    return {"layers": layers, "mean_percent": mean, "median_percent": median, "prefixes": len(changes)}


class Change(NamedTuple):
    """What removing a token does to the coefficient of one trigger.

    length: tokens of the prefix.  change: (c' - c) / c for each of REMOVED.
    """

    trigger: Trigger
    length: int
    change: np.ndarray


class _Shortened(NamedTuple):
    trigger: Trigger
    length: int  # of the whole prefix
    tokens: np.ndarray  # without one


def removals(model: KeyValueModel, corpus: Corpus, triggers: list[Trigger], seed: int) -> list[Change]:
    """The changes of those triggers that have more than one token."""
    draw, work = np.random.default_rng(seed), []
    for trigger in triggers:
        prefix = corpus.prefix(trigger.label)
        length = len(prefix)
        if length > 1:
            places = (0, length - 1, int(draw.integers(length)))  # as in REMOVED
            work += [_Shortened(trigger, length, np.delete(prefix, place)) for place in places]
    c = _coefficients_of_last(model, corpus.length, work)
    changes = []
    for first in range(0, len(work), len(REMOVED)):
        trigger, length, _ = work[first]
        changed = c[first : first + len(REMOVED)]
        changes.append(Change(trigger, length, (changed - trigger.c) / trigger.c))
    return changes


def _coefficients_of_last(model, window: int, work: list[_Shortened]) -> np.ndarray:
    """The coefficient of each one's key at the last of its tokens."""
    c = np.empty(len(work))
    # A batch has prefixes of one layer, so that the layers above are not run, and of like length, to be padded little.
    order = sorted(range(len(work)), key=lambda k: (work[k].trigger.layer, work[k].length))
    size = max(1, model.sizes.removals // window)
    progress = Progress("mutate", len(work), "prefix")
    done = 0
    while done < len(order):
        layer = work[order[done]].trigger.layer
        batch = [k for k in order[done : done + size] if work[k].trigger.layer == layer]
        c[batch] = _coefficients_of_batch(model, layer, [work[k] for k in batch], window, size)
        done += len(batch)
        progress.update(done)
    progress.close()
    return c


def _coefficients_of_batch(model, layer: int, batch: list[_Shortened], window: int, size: int) -> np.ndarray:
    # Filled up to `size` sequences of a power of two of tokens, so that few shapes compile.
    T = bucket(max(len(item.tokens) for item in batch), window)
    tokens_BT = np.zeros((size, T), np.int32)
    last_B, keys_B = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for row, item in enumerate(batch):
        tokens_BT[row, : len(item.tokens)] = item.tokens
        last_B[row] = row * T + len(item.tokens) - 1
        keys_B[row] = item.trigger.key
    state = next(itertools.islice(states(model, tokens_BT), layer, None))  # layers above are not run
    # Every position is asked for every key, as one product; each prefix needs only its own key, on the diagonal.
    c_BB = coefficients(state.queries["compute"][last_B], model.weights("compute", layer), keys_B)
    return np.diagonal(np.asarray(c_BB))[: len(batch)]
