"""Value vectors as distributions over the output vocabulary (Geva et al. 2021, arXiv 2012.14913, section 4)."""

import functools
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

    ids_Nk: token ids.  p_Nk: probabilities.  p_of_N: probability of the token that was asked about; None if none was.
    """

    ids_Nk: np.ndarray
    p_Nk: np.ndarray
    p_of_N: np.ndarray | None = None


def top_tokens(model: KeyValueModel, x_ND, k: int, unit: bool = True, tokens_N=None) -> TopTokens:
    """The k likeliest tokens of each vector x by softmax(E Norm_f(x)), with the model's final norm and output head.

    Args:
      unit: as of `KeyValueModel.logits`; False for the residual stream itself.
      tokens_N: for each vector a token to give the probability of, or None.
    """
    return _top_tokens_by_sign(model, x_ND, k, (1,), unit, tokens_N)[1]


def _top_tokens_by_sign(
    model, x_ND, k: int, signs: Sequence[int], unit: bool = True, tokens_N=None
) -> dict[int, TopTokens]:
    """{sign: the k likeliest tokens of sign * x}"""
    # Results stay on the device until the end, so that no block waits for the host to read those of the one before.
    blocks: dict[int, list] = {sign: [] for sign in signs}
    for part, logits_NV in model.logits(x_ND, unit=unit):
        of_N = None if tokens_N is None else np.asarray(tokens_N)[part]
        for sign in signs:
            blocks[sign].append(_top(logits_NV, of_N, sign, k))
    return {
        sign: TopTokens(*(None if parts[0] is None else np.concatenate(parts) for parts in zip(*found)))
        for sign, found in blocks.items()
    }


@functools.partial(jax.jit, static_argnames=("sign", "k"))
def _top(logits_NV, of_N, sign, k):
    """The fields of the TopTokens of sign * x, on the device."""
    logits_NV = sign * logits_NV  # norms and head have no bias, so the logits of -x are minus those of x
    top_Nk, ids_Nk = jax.lax.top_k(logits_NV, k)
    log_sum_N1 = jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
    p_of_N = None
    if of_N is not None:
        p_of_N = jnp.exp(jnp.take_along_axis(logits_NV, of_N[:, None], 1) - log_sum_N1)[:, 0]
    return ids_Nk, jnp.exp(top_Nk - log_sum_N1), p_of_N


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
        plots.by_layer(by_layer, "maximum probability", "log"),
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
