"""How many of a layer's memories take part in its output, and whether its prediction is that of one of them.

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
    sizes. Scaling a key up and its value down leaves the model unchanged. It leaves this measure unchanged too, but
    would change how many |c_i| are above a threshold.
    If all memories added the same, 90% would be active. FFN-C and base's FFN are measured over prefixes drawn at random
    from the text; FFN-M over every token of the vocabulary, each counted once.
    """
    ffn = model.ffn(ffn)
    if not 0 < mass < 1:
        raise ArgumentError("mass", f"expected a share between 0 and 1, found {mass}")
    L, F = model.config.layers, model.width(ffn)
    over_tokens = ffn == "memory"
    counts = _active_of_tokens(model, page, mass) if over_tokens else _active_of_text(model, page, text, ffn, mass)
    shares = [100 * count / F for count in counts]
    series = {
        "mean": [float(share.mean()) for share in shares],
        "lowest tenth of queries": [float(np.quantile(share, 0.1)) for share in shares],
        "highest tenth": [float(np.quantile(share, 0.9)) for share in shares],
    }
    page.figure(
        "share",
        plots.by_layer(series, "active memories, %"),
        f"Fewest of {model.label(ffn)}'s {F} memories with {mass:.0%} of all |c| |v|; {len(shares[0]):,} queries.",
    )
    rows = list(zip(range(L), *series.values()))
    with page.csv("layers", ["layer", *series]) as write:
        write(rows)
    page.table(["layer", *(f"{name}, %" for name in series)], rows)
    return {"ffn": ffn, "mass": mass, "queries": len(shares[0]), "width": F, "percent_active": series}


def _active_of_tokens(model, page, mass) -> list[np.ndarray]:
    """Active memories of FFN-M for every token [V], of each layer."""
    page.facts["data"] = f"the whole vocabulary, {model.config.vocab_size:,} tokens"
    progress = Progress("active", model.config.layers * model.chunk_count(model.config.vocab_size), "chunk")
    counts = []
    for layer, norms_F in enumerate(_norms(model, "memory")):
        found = []
        for ids_C, is_real_C in model.chunks(model.every_id):
            count_C = active_count(model.token_coefficients(layer, ids_C), norms_F, mass)
            found.append(np.asarray(count_C)[is_real_C])
            progress.update(progress.done + 1)
        counts.append(np.concatenate(found))
    progress.close()
    return counts


def _active_of_text(model, page, text: ExampleOptions, ffn, mass) -> list[np.ndarray]:
    """Active memories for every example, of each layer."""
    corpus, examples = text.draw(model, page)
    norms = _norms(model, ffn)
    counts: list[list] = [[] for _ in norms]
    for labels, layers in example_states(model, corpus, examples, "active"):
        for layer, state in enumerate(layers):
            c_NF = coefficients(state.queries[ffn], model.weights(ffn, layer))
            counts[layer].append(np.asarray(active_count(c_NF, norms[layer], mass))[: len(labels)])
    return [np.concatenate(found) for found in counts]


def _norms(model, ffn) -> list[jax.Array]:
    """|v_i| [F] of each layer."""
    return [jnp.linalg.norm(model.values(ffn, layer), axis=1) for layer in range(model.config.layers)]


@jax.jit
def active_count(c_NF, norms_F, mass):
    """The fewest memories whose |c_i| |v_i| make `mass` of the sum over all, [N]."""
    # In float32, as sums of thousands of bfloat16 numbers stop growing. Twice negated, as jnp.sort sorts upwards.
    size_NF = -jnp.sort(-jnp.abs(c_NF.astype(jnp.float32)) * norms_F, axis=1)
    held_NF = jnp.cumsum(size_NF, 1)
    return (held_NF < mass * held_NF[:, -1:]).sum(1) + 1


def compose(model: KeyValueModel, page: Report, *, text: ExampleOptions) -> dict:
    """How often a layer's top prediction differs from that of every single one of its memories.

    Geva et al. 2021, section 5.1 and figure 8: top(y_l) against top(v_i) of all memories i, where y_l is what the
    layer's memories add and top(x) the likeliest token that the output head makes of x. Here memory i adds c_i v_i and
    c_i may be negative, so it is top(v_i) or top(-v_i) by the sign of c_i; in flex, the memories are those of FFN-C and
    FFN-M together. Among the rest, where some memory has the layer's prediction: how many predictions are stop words
    (scikit-learn's English list), and how many prefixes have fewer than 5 tokens; both also over all examples.
    """
    corpus, examples = text.draw(model, page)
    L, kinds = model.config.layers, [ffn for ffn in ("memory", "compute") if model.width(ffn)]
    is_stop_word_V = stop_words(model.texts)
    tops = _tops_of_values(model, kinds)
    composed, stop_word, short = [[] for _ in range(L)], [[] for _ in range(L)], []
    for labels, layers in example_states(model, corpus, examples, "compose"):
        count = len(labels)
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
    """{FFN: `values.both_tops`} of each layer."""
    progress = Progress("values", model.config.layers, "layer")
    tops = []
    for layer in range(model.config.layers):
        tops.append({kind: values.both_tops(model, kind, layer) for kind in kinds})
        progress.update(layer + 1)
    progress.close()
    return tops


def _is_of_one_memory(c_NF, tops_2F, top_N) -> np.ndarray:
    """Whether one memory's own top token is the layer's, [N]."""
    of_value_NF = (tops_2F[0] == top_N[:, None]) & (c_NF > 0)
    of_negated_NF = (tops_2F[1] == top_N[:, None]) & (c_NF < 0)
    return (of_value_NF | of_negated_NF).any(1)


def _shares(is_composed, is_stop_word, is_short) -> dict[str, float]:
    """In percent; NaN where there are no examples."""
    is_rest = ~is_composed
    return {
        "composed": 100 * float(is_composed.mean()),
        "stop words of the rest": 100 * float(is_stop_word[is_rest].mean()) if is_rest.any() else np.nan,
        "short prefixes of the rest": 100 * float(is_short[is_rest].mean()) if is_rest.any() else np.nan,
        "stop words of all": 100 * float(is_stop_word.mean()),
        "short prefixes of all": 100 * float(is_short.mean()),
    }


def _show(page, rows, examples):
    names = list(rows[0])[1:]  # without the layer
    series = {name: [row[name] for row in rows] for name in names}
    page.figure(
        "composed",
        plots.by_layer({"composed": series.pop("composed")}, "examples, %"),
        f"Share of {examples:,} examples in which the layer's top token is that of none of its memories.",
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
