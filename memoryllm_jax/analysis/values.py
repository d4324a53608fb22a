"""Value vectors as distributions over the output vocabulary (Geva et al. 2021, arXiv 2012.14913, section 4)."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.key_values import FFN, KeyValueModel
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.common.report import Report

_PEAKED = 5  # values that the page shows of each layer and sign


class TopTokens(NamedTuple):
    """The k likeliest tokens of each of N vectors, likeliest first.

    ids_Nk: token ids.  p_Nk: probabilities.
    """

    ids_Nk: np.ndarray
    p_Nk: np.ndarray


def top_tokens(model: KeyValueModel, x_ND, k: int) -> TopTokens:
    """The k likeliest tokens of each vector x by softmax(E Norm_f(x)), with the model's final norm and output head."""
    return _top_tokens_by_sign(model, x_ND, k, (1,))[1]


def _top_tokens_by_sign(model, x_ND, k: int, signs: Sequence[int]) -> dict[int, TopTokens]:
    """{sign: the k likeliest tokens of sign * x}"""
    # Results stay on the device until the end, so that no block waits for the host to read those of the one before.
    ids: dict[int, list] = {sign: [] for sign in signs}
    p: dict[int, list] = {sign: [] for sign in signs}
    for _, logits_NV in model.logits(x_ND, unit=True):
        for sign in signs:
            signed_NV = sign * logits_NV  # norms and head have no bias, so the logits of -x are minus those of x
            top_Nk, at_Nk = jax.lax.top_k(signed_NV, k)
            ids[sign].append(at_Nk)
            p[sign].append(jnp.exp(top_Nk - jax.nn.logsumexp(signed_NV, axis=-1, keepdims=True)))
    return {sign: TopTokens(np.concatenate(ids[sign]), np.concatenate(p[sign])) for sign in signs}


def both_tops(model: KeyValueModel, ffn: str, layer: int) -> np.ndarray:
    """The top token of each value v, and of -v, which a memory with a negative coefficient adds: token ids [2, F]."""
    tops = []
    for _, logits_NV in model.logits(model.values(ffn, layer), unit=True):
        tops.append(np.stack([logits_NV.argmax(-1), logits_NV.argmin(-1)]))  # the logits of -v are minus those of v
    return np.concatenate(tops, 1)


def ranks(model: KeyValueModel, x_ND, *targets_N: np.ndarray) -> list[np.ndarray]:
    """Ranks of target tokens in the distributions of vectors; 1 is the likeliest token.

    Args:
      x_ND: the vectors.
      targets_N: arrays of token ids, one for each vector.
    Returns: the ranks [N] for each of the arrays.
    """
    out: list[list] = [[] for _ in targets_N]
    for part, logits_NV in model.logits(x_ND, unit=True):
        for found, target_N in zip(out, targets_N):
            own_N = logits_NV[jnp.arange(len(logits_NV)), target_N[part]]
            found.append(np.asarray((logits_NV > own_N[:, None]).sum(-1) + 1))
    return [np.concatenate(found) for found in out]


def values(
    model: KeyValueModel,
    page: Report,
    *,
    ffn: FFN = "",
    top: Annotated[int, Option("tokens to list for each value", least=1)] = 5,
) -> dict:
    """Each value vector as a distribution over the output vocabulary: its top tokens and its maximum probability.

    p = softmax(E Norm_f(v)) with the output embedding E (Geva et al. 2021, section 4, where p = softmax(v E)). The
    final norm Norm_f and its scale are applied, because the model's output head only sees vectors that passed it. First
    v is brought to root mean square 1, so that p does not depend on the size of v or of its coefficient. Flipping both
    a key and its value leaves the model unchanged, so the sign of a value means nothing without the sign of a
    coefficient: both v (+) and -v (-) are given.
    """
    ffn = model.ffn(ffn)
    if top > model.config.vocab_size:
        raise ArgumentError("top", f"expected from 1 to the {model.config.vocab_size} tokens, found {top}")
    L = model.config.layers
    progress = Progress("values", L, "layer")
    most_LF = np.empty((L, model.width(ffn)))  # the larger maximum probability of v and -v
    peaked = []
    with page.csv("values", ["layer", "key", "sign", "tokens", "texts", "probabilities"]) as write:
        for layer in range(L):
            by_sign = _top_tokens_by_sign(model, model.values(ffn, layer), top, (1, -1))
            most_LF[layer] = np.maximum(by_sign[1].p_Nk[:, 0], by_sign[-1].p_Nk[:, 0])
            for sign, found in (("+", by_sign[1]), ("-", by_sign[-1])):
                write(_value_lines(layer, sign, found, model.texts))
                for i in np.argsort(-found.p_Nk[:, 0])[:_PEAKED]:
                    tokens = [model.texts[t] for t in found.ids_Nk[i]]
                    peaked.append([layer, int(i), sign, float(found.p_Nk[i, 0]), tokens])
            progress.update(layer + 1)
    progress.close()
    by_layer = {
        "median of keys": np.quantile(most_LF, 0.5, 1),
        "top 10% of keys": np.quantile(most_LF, 0.9, 1),
        "largest": most_LF.max(1),
        # The maximum cannot be lower than in a uniform distribution.
        "uniform": np.full(L, 1 / model.config.vocab_size),
    }
    page.figure(
        "max_p",
        plots.by_layer(by_layer, "maximum probability", log=True),
        f"Probability of the top token of {model.label(ffn)}'s values: the larger one of v's and -v's.",
    )
    page.heading("The most peaked values of each layer")
    page.table(["layer", "key", "sign", "max p", "top tokens"], peaked)
    return {"ffn": ffn, "max_probability": by_layer, "peaked": peaked}


def _value_lines(layer: int, sign: str, found: TopTokens, texts):
    """Lines of the CSV file, one for each value of a layer; spaces separate the tokens of a value."""
    for i, (ids, p) in enumerate(zip(found.ids_Nk, found.p_Nk)):
        tokens = " ".join(map(str, ids))
        names = " ".join(texts[t] for t in ids)
        probabilities = " ".join(f"{x:.4g}" for x in p)
        yield [layer, i, sign, tokens, names, probabilities]
