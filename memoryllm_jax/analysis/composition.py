"""How many of a layer's memories take part in its output, and whether one memory alone makes its prediction.

Geva et al. 2021, "Transformer Feed-Forward Layers Are Key-Value Memories", arXiv 2012.14913, section 5.1.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import values
from memoryllm_jax.analysis.corpus import ExampleOptions, example_states
from memoryllm_jax.analysis.key_values import FFN, KeyValueModel, coefficients
from memoryllm_jax.analysis.residual import top_of_update
from memoryllm_jax.analysis.triggers import note_unread
from memoryllm_jax.common import errors, plots
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report

_SHORT = 5  # a prefix with fewer tokens is short, as in the paper


def active(
    model: KeyValueModel,
    page: Report,
    *,
    text: ExampleOptions,
    ffn: FFN = "",
    mass: Annotated[float, Option("share of the sum of |c| |v| that the active memories hold")] = 0.9,
) -> dict:
    """Share of a layer's memories that are active.

    Geva et al. 2021, section 5.1 and figure 7, count coefficients above zero, as ReLU makes the others zero. SwiGLU
    makes none zero, and its coefficients have two signs, so that threshold does not carry over. Here memory i adds
    c_i v_i, of size |c_i| |v_i|, and the active memories are the fewest that hold `mass` (90%) of the sum of these
    sizes. If all sizes were the same, 90% of the memories would be active. Scaling a key up and its value down leaves
    the model unchanged. It leaves this measure unchanged too, but would change how many |c_i| are above a threshold.

    FFN-C and base's FFN are measured over prefixes drawn at random from the text; FFN-M over every token of the
    vocabulary, each counted once.
    """
    ffn = model.ffn(ffn)
    note_unread(ffn, text)
    if not 0 < mass < 1:
        raise ArgumentError("mass", f"expected a share between 0 and 1, found {mass}")
    L, F = model.config.layers, model.width(ffn)
    counts = _active_of_tokens(model, page, mass) if ffn == "memory" else _active_of_text(model, page, text, ffn, mass)
    shares = [100 * count / F for count in counts]
    series = {
        "mean": [float(share.mean()) for share in shares],
        "lowest tenth of queries": [float(np.quantile(share, 0.1)) for share in shares],
        "highest tenth": [float(np.quantile(share, 0.9)) for share in shares],
    }
    page.figure(
        "share",
        plots.by_layer(series, "active memories, %"),
        f"The fewest of {model.label(ffn)}'s {F} memories that hold {mass:.0%} of the sum of |c| |v|; "
        f"{len(shares[0]):,} queries.",
    )
    rows = list(zip(range(L), *series.values()))
    with page.csv("layers", ["layer", *series]) as write:
        write(rows)
    page.table(["layer", *(f"{name}, %" for name in series)], rows)
    return {"ffn": ffn, "mass": mass, "queries": len(shares[0]), "width": F, "percent_active": series}


def _active_of_tokens(model, page, mass) -> list[np.ndarray]:
    """For each layer, the number of FFN-M's active memories for every token, [V]."""
    page.facts["data"] = f"the whole vocabulary, {model.config.vocab_size:,} tokens"
    progress = Progress("active", model.config.layers * model.chunk_count(model.config.vocab_size), "chunk")
    counts = []
    for layer in range(model.config.layers):
        norms_F = model.value_norms("memory", layer)
        found = []
        for ids_C, is_real_C in model.chunks(model.every_id):
            count_C = active_count(model.token_coefficients(layer, ids_C), norms_F, mass)
            found.append(np.asarray(count_C)[is_real_C])
            progress.update(progress.done + 1)
        counts.append(np.concatenate(found))
    progress.close()
    return counts


def _active_of_text(model, page, text: ExampleOptions, ffn, mass) -> list[np.ndarray]:
    """For each layer, the number of active memories for every example, [N]."""
    corpus, examples = text.draw(model, page)
    counts: list[list] = [[] for _ in range(model.config.layers)]
    for labels, layers in example_states(model, corpus, examples, "active"):
        for layer, state in enumerate(layers):
            c_NF = coefficients(state.queries[ffn], model.weights(ffn, layer))
            count_N = np.asarray(active_count(c_NF, model.value_norms(ffn, layer), mass))
            counts[layer].append(count_N[: len(labels)])  # without the positions that fill up the batch
    return [np.concatenate(found) for found in counts]


@jax.jit
def active_count(c_NF, norms_F, mass):
    """Counts the fewest memories that hold a share of the sum of |c_i| |v_i|.

    Args:
      c_NF: coefficients.
      norms_F: |v_i|.
      mass: the share, between 0 and 1.
    Returns: int32 [N].
    """
    # In float32, because a running sum of thousands of bfloat16 numbers stops growing.
    # Negated twice, because jnp.sort sorts in rising order.
    size_NF = -jnp.sort(-jnp.abs(c_NF.astype(jnp.float32)) * norms_F, axis=1)
    held_NF = jnp.cumsum(size_NF, 1)
    # The total is the last running sum: a sum in another order rounds differently, and might never be reached.
    return (held_NF < mass * held_NF[:, -1:]).sum(1) + 1


def compose(model: KeyValueModel, page: Report, *, text: ExampleOptions) -> dict:
    """How often a layer's top prediction differs from that of every single one of its memories.

    Geva et al. 2021, section 5.1 and figure 8: a prediction is composed if top(y_l) differs from top(v_i) of all
    memories i, where y_l is the sum that the layer's memories add and top(x) is the likeliest token that the output
    head makes of x. Here memory i adds c_i v_i and c_i may be negative, so top(v_i) or top(-v_i) counts, by the sign of
    c_i. In flex, the memories are those of FFN-C and FFN-M together.

    Among the rest, where some memory has the layer's prediction: how many predictions are stop words (scikit-learn's
    English list), and how many prefixes have fewer than 5 tokens. Both are also given over all examples.
    """
    corpus, examples = text.draw(model, page)
    L = model.config.layers
    kinds = [ffn for ffn in ("memory", "compute") if model.width(ffn)]
    is_stop_word_V = stop_words(model.texts)
    tops = _tops_of_values(model, kinds)
    composed: list[list] = [[] for _ in range(L)]
    stop_word: list[list] = [[] for _ in range(L)]
    short = []
    for labels, layers in example_states(model, corpus, examples, "compose"):
        count = len(labels)  # the positions after these fill up the batch
        short.append(labels % corpus.length + 1 < _SHORT)
        for layer, state in enumerate(layers):
            top_N = top_of_update(model, state)
            single_N = np.zeros(len(top_N), bool)
            for kind in kinds:
                c_NF = np.asarray(coefficients(state.queries[kind], model.weights(kind, layer)))
                single_N |= _is_of_one_memory(c_NF, tops[layer][kind], top_N)
            composed[layer].append(~single_N[:count])
            stop_word[layer].append(is_stop_word_V[top_N[:count]])
    is_short = np.concatenate(short)
    rows = []
    for layer in range(L):
        shares = _shares(np.concatenate(composed[layer]), np.concatenate(stop_word[layer]), is_short)
        rows.append({"layer": layer} | shares)
    _show(page, rows, len(examples))
    return {"examples": len(examples), "percent_by_layer": rows}


def _tops_of_values(model, kinds) -> list[dict[str, np.ndarray]]:
    """For each layer, {FFN: top tokens of its values and of their negatives, as `values.both_tops` returns them}."""
    # Found once, because they are the same for every batch of text.
    progress = Progress("values", model.config.layers, "layer")
    tops = []
    for layer in range(model.config.layers):
        tops.append({kind: values.both_tops(model, kind, layer) for kind in kinds})
        progress.update(layer + 1)
    progress.close()
    return tops


def _is_of_one_memory(c_NF, tops_2F, top_N) -> np.ndarray:
    """Whether the top token of any single memory is the layer's, [N].

    Args:
      c_NF: coefficients. A memory adds c_i v_i, whose top token is that of v_i or of -v_i by the sign of c_i.
      tops_2F: top tokens of v_i and of -v_i.
      top_N: the layer's top tokens.
    """
    of_value_NF = (tops_2F[0] == top_N[:, None]) & (c_NF > 0)
    of_negated_NF = (tops_2F[1] == top_N[:, None]) & (c_NF < 0)
    return (of_value_NF | of_negated_NF).any(1)


def _shares(is_composed, is_stop_word, is_short) -> dict[str, float]:
    """A layer's shares of examples, in percent; NaN if there are no examples to take a share of."""

    def percent(is_true):
        return 100 * float(is_true.mean()) if len(is_true) else np.nan

    is_rest = ~is_composed
    return {
        "composed": percent(is_composed),
        "stop words of the rest": percent(is_stop_word[is_rest]),
        "short prefixes of the rest": percent(is_short[is_rest]),
        "stop words of all": percent(is_stop_word),
        "short prefixes of all": percent(is_short),
    }


def _show(page, rows, examples):
    """Writes the figures, the CSV file and the table of `compose`."""
    names = list(rows[0])[1:]  # without the layer
    series = {name: [row[name] for row in rows] for name in names}
    page.figure(
        "composed",
        plots.by_layer({"composed": series.pop("composed")}, "examples, %"),
        f"Share of {examples:,} examples in which no single memory of the layer has the layer's top token.",
    )
    page.figure(
        "rest",
        plots.by_layer(series, "share, %"),
        f"Stop words and prefixes of fewer than {_SHORT} tokens, among the rest and among all examples.",
    )
    lines = [list(row.values()) for row in rows]
    with page.csv("layers", ["layer", *names]) as write:
        write(lines)
    page.table(["layer", *(f"{name}, %" for name in names)], lines)


def stop_words(texts: list[str]) -> np.ndarray:
    """Whether each token is an English stop word by scikit-learn's list, [V]. Raises: UserError."""
    words = errors.require("sklearn.feature_extraction.text", "analyze", "stop words").ENGLISH_STOP_WORDS
    return np.array([text.strip("␣").lower() in words for text in texts])
