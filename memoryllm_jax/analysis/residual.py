"""How early the residual stream holds the final prediction, and what a layer changes of it.

Geva et al. 2021, "Transformer Feed-Forward Layers Are Key-Value Memories", arXiv 2012.14913, section 5.2. r_l is the
residual that the outputs of a layer's FFNs are added to, X_l + Attn_l; y_l what they add (in flex, FFN-C and FFN-M
together); o_l = r_l + y_l; o_L the last. top(x) is the likeliest token that the output head, after the final norm,
makes of x.
"""

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.corpus import ExampleOptions, State, example_states
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.common import plots
from memoryllm_jax.common.report import Report

# Where a layer's top prediction comes from; every example belongs to one.
_CASES = ("residual", "agreement", "FFN", "composition")


def top_of(model: KeyValueModel, x_ND) -> np.ndarray:
    """top(x), [N]."""
    return np.concatenate([np.asarray(logits_NV.argmax(-1)) for _, logits_NV in model.logits(x_ND, unit=False)])


def top_of_update(model: KeyValueModel, state: State) -> np.ndarray:
    """top(y_l) of the update y_l, brought to root mean square 1 before the norm, [N]."""
    update_ND = state.output_ND - state.residual_ND
    return np.concatenate([np.asarray(logits_NV.argmax(-1)) for _, logits_NV in model.logits(update_ND, unit=True)])


def _top_and_probability(model, x_ND, tokens_N) -> tuple[np.ndarray, np.ndarray]:
    """top(x), and the probability of the given tokens, [N] each."""
    tops, p = [], []
    for part, logits_NV in model.logits(x_ND, unit=False):
        tops.append(np.asarray(logits_NV.argmax(-1)))
        own_N = logits_NV[jnp.arange(len(logits_NV)), tokens_N[part]]
        p.append(np.asarray(jnp.exp(own_N - jax.nn.logsumexp(logits_NV, axis=-1))))
    return np.concatenate(tops), np.concatenate(p)


def residual(model: KeyValueModel, page: Report, *, text: ExampleOptions) -> dict:
    """How early the residual holds the final prediction, and what each layer's update does to the top prediction.

    Geva et al. 2021, section 5.2. Figure 9: how often top(r_l) = top(o_L). Figure 10: the probability of the token
    top(o_L) under r_l. Figure 11, by top(o_l): residual, if it is top(r_l) and not top(y_l); agreement, if it is both;
    FFN, if it is top(y_l) alone; composition, if it is neither. Here r_l = X_l + Attn_l is the residual that the
    outputs of a layer's FFNs are added to, y_l what they add, o_l their sum and o_L that of the last layer; top(x) is
    the likeliest token that the output head makes of x. The final norm is applied to all, and y_l brought to root mean
    square 1 before it. The attention of the same layer is part of r_l, in memory and flex as in base.
    """
    corpus, examples = text.draw(model, page)
    L = model.config.layers
    measured: list[list] = [[] for _ in range(L)]
    for labels, layers in example_states(model, corpus, examples, "residual"):
        last_N = top_of(model, layers[-1].output_ND)
        for layer, state in enumerate(layers):
            measured[layer].append(_measure(model, state, last_N)[:, : len(labels)])
    means_LM = 100 * np.array([np.concatenate(parts, 1).mean(1) for parts in measured])
    names = ["settled", "probability", *_CASES]
    percent = {name: means_LM[:, number].tolist() for number, name in enumerate(names)}
    series = {"top(r) is the final token": percent["settled"], "mean probability of that token": percent["probability"]}
    page.figure(
        "settled",
        plots.by_layer(series, "share or probability, %"),
        f"How far the residual before each layer's memories holds the final prediction; {len(examples):,} examples.",
    )
    cases = {name: percent[name] for name in _CASES}
    page.figure("wins", plots.stacked_by_layer(cases, "examples, %"), "Where the layer's top prediction comes from.")
    rows = list(zip(range(L), *percent.values()))
    with page.csv("layers", ["layer", *names]) as write:
        write(rows)
    page.table(["layer", *(f"{name}, %" for name in names)], rows)
    return {"examples": len(examples), "percent": percent}


def _measure(model, state: State, last_N: np.ndarray) -> np.ndarray:
    """[6, N]: whether top(r_l) is the final token `last_N`, its probability under r_l, and each of _CASES."""
    top_r_N, p_N = _top_and_probability(model, state.residual_ND, last_N)
    top_y_N = top_of_update(model, state)
    top_o_N = top_of(model, state.output_ND)
    is_r, is_y = top_o_N == top_r_N, top_o_N == top_y_N
    # As numbers, so that their means are shares.
    return np.stack([top_r_N == last_N, p_N, is_r & ~is_y, is_r & is_y, is_y & ~is_r, ~(is_r | is_y)])
