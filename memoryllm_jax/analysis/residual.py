"""How early the residual stream holds the final prediction, and what a layer changes of it.

Geva et al. 2021, "Transformer Feed-Forward Layers Are Key-Value Memories", arXiv 2012.14913, section 5.2. r_l is the
residual that the outputs of a layer's FFNs are added to, X_l + Attn_l; y_l is what they add (in flex, FFN-C and FFN-M
together); o_l = r_l + y_l; o_L is that of the last layer. top(x) is the likeliest token that the final norm and the
output head make of x.
"""

import numpy as np

from memoryllm_jax.analysis.corpus import ExampleOptions, State, example_states
from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.analysis.values import top_tokens
from memoryllm_jax.common import plots
from memoryllm_jax.common.report import Report

# Where a layer's top prediction comes from; every example belongs to one.
_CASES = ("residual", "agreement", "FFN", "composition")


def top_of(model: KeyValueModel, x_ND) -> np.ndarray:
    """top(x) of vectors of the residual stream, [N]."""
    return np.concatenate([np.asarray(logits_NV.argmax(-1)) for _, logits_NV in model.logits(x_ND, unit=False)])


def top_of_update(model: KeyValueModel, state: State) -> np.ndarray:
    """top(y_l) of the updates y_l, brought to root mean square 1 before the norm, [N]."""
    update_ND = state.output_ND - state.residual_ND
    return np.concatenate([np.asarray(logits_NV.argmax(-1)) for _, logits_NV in model.logits(update_ND, unit=True)])


def residual(model: KeyValueModel, page: Report, *, text: ExampleOptions) -> dict:
    """How early the residual holds the final prediction, and what each layer's update does to the top prediction.

    Here r_l = X_l + Attn_l is the residual that the outputs of a layer's FFNs are added to, y_l is what they add, o_l
    is the sum of both, and o_L is that of the last layer. top(x) is the likeliest token that the output head makes of
    x. The final norm is applied to all, and y_l is brought to root mean square 1 before it. The attention of the same
    layer is part of r_l, in memory and flex as in base.

    Geva et al. 2021, section 5.2. Figure 9: how often top(r_l) = top(o_L). Figure 10: the probability of the token
    top(o_L) under r_l. Figure 11: where top(o_l) comes from. It is residual, if it equals top(r_l) and not top(y_l);
    agreement, if it equals both; FFN, if it equals top(y_l) alone; composition, if it equals neither.
    """
    corpus, examples = text.draw(model, page)
    L = model.config.layers
    measured: list[list] = [[] for _ in range(L)]
    for labels, layers in example_states(model, corpus, examples, "residual"):
        last_N = top_of(model, layers[-1].output_ND)
        for layer, state in enumerate(layers):
            # The positions after the examples fill up the batch.
            measured[layer].append(_measure(model, state, last_N)[:, : len(labels)])
    means_LM = 100 * np.array([np.concatenate(parts, 1).mean(1) for parts in measured])
    names = ["settled", "probability", *_CASES]  # in the order of `_measure`
    percent = {name: means_LM[:, number].tolist() for number, name in enumerate(names)}
    series = {"top(r) is the final token": percent["settled"], "mean probability of that token": percent["probability"]}
    page.figure(
        "settled",
        plots.by_layer(series, "share or probability, %"),
        f"How often, and how surely, the residual before a layer's FFNs holds the final prediction; {len(examples):,} "
        "examples.",
    )
    cases = {name: percent[name] for name in _CASES}
    page.figure("wins", plots.stacked_by_layer(cases, "examples, %"), "Where the layer's top prediction comes from.")
    rows = list(zip(range(L), *percent.values()))
    with page.csv("layers", ["layer", *names]) as write:
        write(rows)
    page.table(["layer", *(f"{name}, %" for name in names)], rows)
    return {"examples": len(examples), "percent": percent}


def _measure(model, state: State, last_N: np.ndarray) -> np.ndarray:
    """What is measured of each example, [6, N].

    The rows are: 1 if top(r_l) is the final token last_N, else 0; the probability of last_N under r_l; and for each of
    _CASES, 1 if the example belongs to it.
    """
    of_r = top_tokens(model, state.residual_ND, 1, unit=False, tokens_N=last_N)
    top_r_N = of_r.ids_Nk[:, 0]
    top_y_N = top_of_update(model, state)
    top_o_N = top_of(model, state.output_ND)
    is_r_N = top_o_N == top_r_N
    is_y_N = top_o_N == top_y_N
    cases = [is_r_N & ~is_y_N, is_r_N & is_y_N, is_y_N & ~is_r_N, ~(is_r_N | is_y_N)]  # in the order of _CASES
    # Stacked with probabilities, truth values become 0 and 1, whose means are shares.
    return np.stack([top_r_N == last_N, of_r.p_of_N, *cases])
