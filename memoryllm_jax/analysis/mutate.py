"""How a key's coefficient changes without a token of its trigger prefix (Geva et al. 2021, section 3.2)."""

import itertools
from typing import NamedTuple

import numpy as np

from memoryllm_jax.analysis.corpus import Corpus, CorpusOptions, states
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
    text: CorpusOptions,
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
    by_layer = [_changes_of_layer(changes, layer) for layer in layers]
    # The median too, because single triggers with a small coefficient have large relative changes.
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
    """How the coefficient of one trigger changes when a token is removed.

    length: tokens of the whole prefix.  change: (c' - c) / c for each of REMOVED.
    """

    trigger: Trigger
    length: int
    change: np.ndarray


def _changes_of_layer(changes: list[Change], layer: int) -> np.ndarray:
    """The relative changes [N, 3] of a layer's triggers, in the order of REMOVED."""
    return np.array([change.change for change in changes if change.trigger.layer == layer])


class _Shortened(NamedTuple):
    """A trigger prefix without one of its tokens."""

    trigger: Trigger
    length: int  # tokens of the whole prefix
    tokens: np.ndarray  # ids of the tokens that are left


def removals(model: KeyValueModel, corpus: Corpus, triggers: list[Trigger], seed: int) -> list[Change]:
    """Measures what removing a token does to each trigger that has more than one token.

    Args:
      seed: seed of the draw of the random tokens.
    """
    draw = np.random.default_rng(seed)
    work: list[_Shortened] = []
    for trigger in triggers:
        prefix = corpus.prefix(trigger.label)
        length = len(prefix)
        if length > 1:
            places = (0, length - 1, int(draw.integers(length)))  # in the order of REMOVED
            work += [_Shortened(trigger, length, np.delete(prefix, place)) for place in places]
    c = _coefficients_of_last(model, corpus.length, work)
    changes = []
    # Every trigger has as many shortened prefixes, one after the other, as there are REMOVED.
    for first in range(0, len(work), len(REMOVED)):
        trigger, length, _ = work[first]
        changed = c[first : first + len(REMOVED)]
        changes.append(Change(trigger, length, (changed - trigger.c) / trigger.c))
    return changes


def _coefficients_of_last(model, window: int, work: list[_Shortened]) -> np.ndarray:
    """For each shortened prefix, the coefficient of its trigger's key at its last token, [N]."""
    c = np.empty(len(work))
    # A batch has prefixes of one layer, so that the layers above need not run, and of similar lengths, so that padding
    # is short.
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
    """The coefficient of each prefix's key at its last token, for prefixes of one layer."""
    # The batch is filled up to `size` sequences, and to a power of two of tokens, so that few shapes compile.
    T = bucket(max(len(item.tokens) for item in batch), window)
    tokens_BT = np.zeros((size, T), np.int32)
    last_B = np.zeros(size, np.int32)  # positions are numbered through the batch, as in State
    keys_B = np.zeros(size, np.int32)
    for number, item in enumerate(batch):
        # Padding lies after the prefix, where causal attention does not let the prefix see it.
        tokens_BT[number, : len(item.tokens)] = item.tokens
        last_B[number] = number * T + len(item.tokens) - 1
        keys_B[number] = item.trigger.key
    state = next(itertools.islice(states(model, tokens_BT), layer, None))  # runs no layers above this one
    # One product of all positions and all keys; the key of each prefix itself is on the diagonal.
    c_BB = coefficients(state.queries["compute"][last_B], model.weights("compute", layer), keys_B)
    return np.diagonal(np.asarray(c_BB))[: len(batch)]
