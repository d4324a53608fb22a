"""The trigger prefixes of keys: what fires them most (Geva et al. 2021, arXiv 2012.14913, section 3.1)."""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import numpy as np

from memoryllm_jax.analysis import topk
from memoryllm_jax.analysis.corpus import Corpus, CorpusOptions, states
from memoryllm_jax.analysis.key_values import FFN, KeyValueModel, coefficients
from memoryllm_jax.analysis.vocabulary import key_triggers
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report

_SHOWN = 12  # tokens of a prefix that the page shows
_LISTED = 5  # triggers of each key that the page shows

# Options that several analyses of keys have.
Keys = Annotated[int, Option("keys of each layer, drawn at random; 0: all", least=0)]
Key = Annotated[tuple[str, ...], Option("LAYER:KEY, a key to look at in place of drawn ones", many=True)]
Top = Annotated[int, Option("triggers of a key to keep, the strongest", least=1)]


def sample_keys(model: KeyValueModel, ffn: str, count: int, key: Sequence[str], seed: int) -> dict[int, np.ndarray]:
    """The keys to look at: those that are named, or keys of each layer that are drawn at random if none are.

    Args:
      count: how many keys of each layer to draw; 0: all.
      key: names of keys, LAYER:KEY.
      seed: seed of the draw.
    Returns: {layer: numbers of keys in rising order}.
    Raises: ArgumentError if the model has no such key.
    """
    L, F = model.config.layers, model.width(ffn)
    if not key:
        count = min(count, F) if count else F
        draw = np.random.default_rng(seed)
        return {layer: np.sort(draw.choice(F, count, replace=False)) for layer in range(L)}
    named: dict[int, list[int]] = {}
    for name in key:
        match = re.fullmatch(r"(\d+):(\d+)", name)
        if not match or int(match[1]) >= L or int(match[2]) >= F:
            raise ArgumentError("key", f"expected LAYER:KEY with a layer below {L} and a key below {F}, found {name}")
        named.setdefault(int(match[1]), []).append(int(match[2]))
    return {layer: np.unique(keys) for layer, keys in sorted(named.items())}


def open_corpus(model: KeyValueModel, ffn: str, text: CorpusOptions, page: Report) -> Corpus | None:
    """Opens the text whose prefixes trigger the keys of an FFN.

    Args:
      ffn: "compute" for FFN-C or base's only FFN, "memory" for FFN-M.
      text: is opened for "compute" alone.
      page: its facts then name the text, or the vocabulary.
    Returns: the text; None for FFN-M, whose keys single tokens trigger.
    Raises: UserError.
    """
    if ffn == "memory":
        page.facts["data"] = f"the whole vocabulary, {model.config.vocab_size:,} tokens"
        return None
    corpus = text.open(model)
    page.facts |= corpus.facts()
    return corpus


def note_unread(ffn: str, text: CorpusOptions) -> None:
    """Prints that `text` is not read, if data is given where none is needed: for FFN-M, whose triggers are tokens."""
    if ffn == "memory" and text.data:
        print(f"data: {text.data} is not read, as FFN-M is looked at, whose keys single tokens trigger", flush=True)


def find(
    model: KeyValueModel, ffn: str, keys: dict[int, np.ndarray], top: int, corpus: Corpus | None
) -> dict[int, topk.Triggers]:
    """Finds the triggers of keys in one pass over the corpus, or for FFN-M over the vocabulary.

    Args:
      keys: {layer: numbers of keys}.
      top: triggers of a key to keep.
      corpus: as `open_corpus` returns it.
    Returns: {layer: the triggers of its keys}, with the corpus's labels, or token ids as labels for FFN-M.
    """
    found = {}
    if corpus is None:
        progress = Progress("triggers", len(keys) * model.chunk_count(model.config.vocab_size), "chunk")
        for layer in keys:
            found[layer] = key_triggers(model, layer, keys[layer], top, lambda: progress.update(progress.done + 1))
        progress.close()
        return found
    # Layers take turns within a batch, so that the text runs through the model once.
    sides = {layer: topk.TwoSidedTopK(len(keys[layer]), top) for layer in keys}
    progress = Progress("triggers", corpus.batches, "batch")
    for number, (tokens_BT, labels, is_real) in enumerate(corpus, 1):
        for layer, state in enumerate(states(model, tokens_BT)):
            if layer in keys:
                c_NK = coefficients(state.queries[ffn], model.weights(ffn, layer), keys[layer])
                sides[layer].add(c_NK, labels, is_real)
        progress.update(number)
    progress.close()
    return {layer: side.triggers() for layer, side in sides.items()}


class Trigger(NamedTuple):
    """One trigger of a key.

    sign: sign of the key's strongest coefficient.  rank: 1 for the strongest trigger.  label: as in `find`'s result.
    c: the trigger's coefficient.
    """

    layer: int
    key: int
    sign: int
    rank: int
    label: int
    c: float


def each_trigger(keys: dict[int, np.ndarray], found: dict[int, topk.Triggers]) -> Iterator[Trigger]:
    """Yields the triggers of all keys, layer by layer and key by key, strongest first."""
    for layer, (sign_K, labels_Kt, c_Kt) in found.items():
        for key, sign, labels_t, c_t in zip(keys[layer], sign_K, labels_Kt, c_Kt):
            for rank, (label, c) in enumerate(zip(labels_t, c_t), 1):
                if label >= 0:  # -1 fills up the list of a key that has few triggers
                    yield Trigger(layer, int(key), int(sign), rank, int(label), float(c))


def tokens_of(corpus: Corpus | None, label: int) -> list[int]:
    """The token ids of a trigger: those of the prefix, or for FFN-M, without a corpus, the single token."""
    return [label] if corpus is None else corpus.prefix(label).tolist()


def triggers(
    model: KeyValueModel,
    page: Report,
    *,
    text: CorpusOptions,
    ffn: FFN = "",
    keys: Keys = 10,
    key: Key = (),
    top: Top = 25,
) -> dict:
    """The top-t trigger prefixes of a sample of keys: those with the largest memory coefficient.

    Geva et al. 2021, section 3.1: the coefficient of key i for a prefix is that of the prefix's last position. There it
    is ReLU(x k_i). Here it is SwiGLU's c_i = (q k_i) SiLU(q W_gate)_i, which has a sign. Flipping both a key and its
    value leaves the model unchanged, so a key's triggers are those on the side of its strongest one. Every position of
    the text ends one prefix, which begins where its window begins. FFN-M reads one token, so its triggers are tokens,
    and exact over the whole vocabulary.
    """
    ffn = model.ffn(ffn)
    note_unread(ffn, text)
    chosen = sample_keys(model, ffn, keys, key, text.seed)
    corpus = open_corpus(model, ffn, text, page)
    found = find(model, ffn, chosen, top, corpus)
    shown = _write_triggers(model, page, corpus, each_trigger(chosen, found))
    selectivity = {}
    # Without rank 1, whose share of itself is always 1.
    for rank in sorted({min(5, top), min(10, top), top} - {1}):
        selectivity[f"trigger {rank}"] = [_relative(triggers.c_Kt, rank) for triggers in found.values()]
    if selectivity:
        page.figure(
            "selectivity",
            plots.by_layer(selectivity, "share of the first's coefficient", layers=list(found)),
            f"Coefficient of a later trigger over that of the first; mean of the sampled keys of {model.label(ffn)}.",
        )
    page.heading("Strongest triggers")
    what = "token" if corpus is None else "the prefix's end"
    page.table(["layer", "key", "rank", "coefficient", what, "next"], shown)
    return {
        "ffn": ffn,
        "keys": {layer: {"key": chosen[layer], **triggers._asdict()} for layer, triggers in found.items()},
        "selectivity": selectivity,
    }


def _write_triggers(model, page, corpus, triggers: Iterator[Trigger]) -> list[list]:
    """Writes all triggers as CSV. Returns: lines of the page's table, with the strongest triggers of each key."""
    shown = []
    with page.csv("triggers", ["layer", "key", "sign", "rank", "coefficient", "prefix", "next"]) as write:
        for layer, key, sign, rank, label, c in triggers:
            following = "" if corpus is None else model.texts[corpus.next(label)]
            prefix = [model.texts[t] for t in tokens_of(corpus, label)]
            write([[layer, key, sign, rank, f"{c:.6g}", " ".join(prefix), following]])
            if rank <= _LISTED:
                shown.append([layer, key, rank, c, prefix[-_SHOWN:], following])
    return shown


def _relative(c_Kt: np.ndarray, rank: int) -> float:
    """The coefficient of the trigger at a rank divided by that of the strongest; mean over keys."""
    first_K = np.where(c_Kt[:, 0] == 0, np.nan, c_Kt[:, 0])  # a key that never fires has no share
    return float(np.nanmean(c_Kt[:, rank - 1] / first_K))
