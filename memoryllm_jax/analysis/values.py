"""Value vectors as distributions over the output vocabulary (Geva et al. 2021, arXiv 2012.14913, section 4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress


class Top(NamedTuple):
    """The likeliest tokens of N vectors, likeliest first: ids and probabilities [N, k]."""

    ids_Nk: np.ndarray
    p_Nk: np.ndarray


def top_tokens(inside: Inside, x_ND, k: int) -> Top:
    """softmax(E Norm_f(x)): what the model's own output, its final norm applied, would make of each vector alone."""
    return _tops(inside, x_ND, k, (1,))[0]


def _tops(inside, x_ND, k, signs) -> list[Top]:
    """Of each sign * x; norms have no bias, so the logits of -x are minus those of x."""
    found = [([], []) for _ in signs]
    for _, logits in inside.logits(x_ND, True):
        for sign, (ids, p) in zip(signs, found):
            top, at = jax.lax.top_k(sign * logits, k)
            ids.append(at)
            p.append(jnp.exp(top - jax.nn.logsumexp(sign * logits, axis=-1, keepdims=True)))
    return [Top(*(np.concatenate([np.asarray(x) for x in parts]) for parts in of)) for of in found]


def both_tops(inside: Inside, ffn: str, layer: int) -> np.ndarray:
    """[2, F]: the top token of each value v, and of -v, which is what a memory of negative coefficient adds."""
    tops = []
    for _, logits in inside.logits(inside.values(ffn, layer), True):
        tops.append(np.stack([logits.argmax(-1), logits.argmin(-1)]))  # -v has minus the logits, as in _tops
    return np.concatenate(tops, 1)


def ranks(inside: Inside, x_ND, *targets_N: np.ndarray) -> list[np.ndarray]:
    """For each of the targets, its place in each vector's distribution [N], 1 for the likeliest."""
    out: list[list] = [[] for _ in targets_N]
    for part, logits in inside.logits(x_ND, True):
        for places, target_N in zip(out, targets_N):
            own = logits[jnp.arange(len(logits)), target_N[part]]
            places.append(np.asarray((logits > own[:, None]).sum(-1) + 1))
    return [np.concatenate(places) for places in out]


def values(inside: Inside, page, ffn: str = "", top: int = 5) -> dict:
    """Each value vector as a distribution over the output vocabulary: its top tokens and maximum probability.

    p = softmax(E Norm_f(v)), E the output embedding (Geva et al. 2021, section 4, as p = softmax(v E)). The final norm
    Norm_f is applied, with its scale, as the model's head never sees a vector without it; v is brought to root mean
    square 1 first, so p does not depend on the size of v or of its coefficient. To flip a key and its value changes
    nothing of the model, so a value's sign has no meaning without a coefficient's: both v (+) and -v (-) are given.
    """
    ffn = inside.ffn_name(ffn)
    L, F, texts = inside.config.layers, inside.width(ffn), inside.texts
    if not 1 <= top <= inside.config.vocab_size:
        raise UserError(f"--top: expected from 1 to the {inside.config.vocab_size} tokens, found {top}")
    progress = Progress("values", L, "layer")
    most_LF, best = np.empty((L, 2, F)), []
    with page.csv("values", ["layer", "key", "sign", "tokens", "texts", "probabilities"]) as write:
        for layer in range(L):
            v_FD = inside.values(ffn, layer)
            tops = _tops(inside, v_FD, top, (1, -1))
            for side, (sign, (ids, p)) in enumerate(zip("+-", tops)):
                most_LF[layer, side] = p[:, 0]
                for i in range(F):
                    columns = ids[i], [texts[t] for t in ids[i]], [f"{x:.4g}" for x in p[i]]
                    write([[layer, i, sign, *(" ".join(map(str, x)) for x in columns)]])
                for i in np.argsort(-p[:, 0])[:5]:
                    best.append([layer, int(i), sign, float(p[i, 0]), [texts[t] for t in ids[i]]])
            progress.update(layer + 1)
    progress.close()
    most_LF = most_LF.max(1)
    quantiles = {f"{name} of keys": np.quantile(most_LF, q, 1) for name, q in (("median", 0.5), ("top 10%", 0.9))}
    quantiles |= {"largest": most_LF.max(1), "uniform": np.full(L, 1 / inside.config.vocab_size)}
    page.figure(
        "max_p",
        plots.by_layer(quantiles, "maximum probability", log=True),
        f"Probability of the top token of {inside.label(ffn)}'s values, the larger of v and -v.",
    )
    page.heading("The most peaked values of each layer")
    page.table(["layer", "key", "sign", "max p", "top tokens"], best)
    return {"ffn": ffn, "max_probability": quantiles, "peaked": best}
