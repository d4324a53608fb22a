"""Cross entropy with z-loss over a large vocabulary, in chunks: [B, T, V] never exists."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.sharding import constrain, unpadded_embed


class Options(NamedTuple):
    """vocab_size: ids that exist; the head may hold more, as padding. chunk: positions whose logits exist at once."""

    vocab_size: int
    z_loss: float
    chunk: int
    dtype: str


def cross_entropy(x_SND, head_VD, targets_SN, weights_SN, options: Options):
    """Sums over positions, to be divided by the sum of weights of the whole step.

    Gradients are made in the forward pass, chunk by chunk, so that logits are computed once. The head's gradient
    carries the shard axis until the end: partial sums stay on their device, and one reduction closes them.

    Args:
      x_SND: final hidden states of the N positions of each batch shard.
      head_VD: output embedding as stored, float32; its products are computed in `dtype`.
    Returns:
      (total, nll): sum of weight * (nll + z_loss * log-partition^2), and of weight * nll, in nats, float32.
      Only the total has a gradient.
    """
    N = x_SND.shape[1]
    chunk = min(options.chunk, N)
    pad = -N % chunk

    def chunks(a):
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(a.shape[0], -1, chunk, *a.shape[2:]).swapaxes(0, 1)

    return _summed(options, chunks(x_SND), head_VD, chunks(targets_SN), chunks(weights_SN))


def _chunk_loss(options, x_SCD, head_VD, targets_SC, weights_SC):
    z_loss = options.z_loss
    logits = jnp.einsum("scd,vd->scv", x_SCD, head_VD, preferred_element_type=jnp.float32)
    if head_VD.shape[0] > options.vocab_size:
        logits = jnp.where(jnp.arange(head_VD.shape[0]) < options.vocab_size, logits, -jnp.inf)
    logits = constrain(logits, "shard", None, "vocab")
    top = logits.max(-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = exp.sum(-1, keepdims=True)
    lse_SC = (top + jnp.log(total))[..., 0]
    is_target = jnp.arange(head_VD.shape[0]) == targets_SC[..., None]
    nll = (lse_SC - jnp.where(is_target, logits, 0).sum(-1)) * weights_SC
    loss = nll + z_loss * jnp.square(lse_SC) * weights_SC
    factor_SC = (1 + 2 * z_loss * lse_SC) * weights_SC
    d_logits = exp * (factor_SC[..., None] / total) - jnp.where(is_target, weights_SC[..., None], 0)
    return jnp.stack([loss.sum(), nll.sum()]), d_logits


def _compute_head(options, x, head_VD):
    head_VD = unpadded_embed(head_VD.astype(options.dtype), x.shape[-1], ("vocab", "embed"))
    return constrain(head_VD, "vocab", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(options, x, head_VD, targets, weights):
    head = _compute_head(options, x, head_VD)
    sums = jax.lax.map(lambda c: _chunk_loss(options, c[0], head, c[1], c[2])[0], (x, targets, weights))
    return tuple(sums.sum(0))


def _summed_forward(options, x, head_VD, targets, weights):
    head = _compute_head(options, x, head_VD)

    def step(d_head_SVD, c):
        x_SCD, targets_SC, weights_SC = c
        sums, d_logits = _chunk_loss(options, x_SCD, head, targets_SC, weights_SC)
        d_logits = d_logits.astype(x_SCD.dtype)
        dx_SCD = jnp.einsum("scv,vd->scd", d_logits, head)
        d_head_SVD += jnp.einsum("scv,scd->svd", d_logits, x_SCD, preferred_element_type=jnp.float32)
        return constrain(d_head_SVD, "shard", "vocab", None), (sums, dx_SCD)

    zeros = constrain(jnp.zeros((x.shape[1], *head.shape), jnp.float32), "shard", "vocab", None)
    d_head_SVD, (sums, dx) = jax.lax.scan(step, zeros, (x, targets, weights))
    d_head_VD = jnp.pad(d_head_SVD.sum(0), [(0, 0), (0, head_VD.shape[1] - head.shape[1])])
    d_head_VD = constrain(d_head_VD, "vocab", "embed")
    return tuple(sums.sum(0)), (dx, d_head_VD)


def _summed_backward(options, residuals, cotangents):
    dx, d_head = residuals
    scale = cotangents[0]
    return (dx * scale).astype(dx.dtype), d_head * scale, None, None


_summed.defvjp(_summed_forward, _summed_backward)
