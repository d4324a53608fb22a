"""Cross entropy with z-loss over a large vocabulary, in chunks, so that logits [B, T, V] never exist whole.

Shapes: S batch shards, N positions of a shard, C positions of a chunk, D model width, V token ids as stored.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.model.modules import softcap
from memoryllm_jax.model.sharding import constrain, parts, spec, unpadded_embed


class Options(NamedTuple):
    """How the loss is computed.

    Attributes:
      vocab_size: number of token ids. The head may store more, as padding, and these get no probability.
      z_loss: weight of the squared log-partition.
      chunk: positions of each batch shard whose logits exist at one time.
      dtype: dtype of the product with the head; sums and the loss are float32.
      softcap: `model.logit_softcap`. Loss and z-loss are those of the capped logits.
    """

    vocab_size: int
    z_loss: float
    chunk: int
    dtype: str
    softcap: float


class TargetScores(NamedTuple):
    """How likely the model finds each target.

    Attributes:
      log_probs: float32, in nats.
      is_likeliest: bool, whether no other id is more likely.
    """

    log_probs: jax.Array
    is_likeliest: jax.Array


def cross_entropy(x_SND, head_VD, targets_SN, weights_SN, options: Options):
    """Sums of the loss over positions. The caller divides them by the sum of weights of the whole step.

    The forward pass computes the gradients too, chunk by chunk, so that logits are computed once.

    Args:
      x_SND: final hidden states of the N positions of each batch shard.
      head_VD: output embedding as stored, float32.
      targets_SN: int32 token ids.
      weights_SN: float32 weight of each position.
    Returns:
      (total, nll): sum of weight * (nll + z_loss * log-partition^2), and of weight * nll, in nats, float32.
      Only the total has a gradient.
    """
    x = _chunks(x_SND, options.chunk)
    targets = _chunks(targets_SN, options.chunk)
    weights = _chunks(weights_SN, options.chunk)
    return _loss_sums(options, x, head_VD, targets, weights)


def log_probs(x_SND, head_VD, targets_SN, options: Options) -> TargetScores:
    """Scores each target: both results are [S, N]. The arguments are those of `cross_entropy`."""
    head = _compute_head(options, x_SND, head_VD)

    def score_chunk(chunk):
        x_SCD, targets_SC = chunk
        logits = _logits(options, x_SCD, head)
        is_target = jnp.arange(head.shape[0]) == targets_SC[..., None]
        target_SC = jnp.where(is_target, logits, 0).sum(-1)
        return target_SC - jax.nn.logsumexp(logits, -1), logits.argmax(-1) == targets_SC

    found = jax.lax.map(score_chunk, (_chunks(x_SND, options.chunk), _chunks(targets_SN, options.chunk)))
    S, N = targets_SN.shape
    return TargetScores(*(a.swapaxes(0, 1).reshape(S, -1)[:, :N] for a in found))


def _chunks(a, size):
    """[S, N, ...] -> [chunks, S, size, ...]. Zeros fill the last chunk, so padded positions have weight zero."""
    size = min(size, a.shape[1])
    padding = -a.shape[1] % size
    a = jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2))
    return a.reshape(a.shape[0], -1, size, *a.shape[2:]).swapaxes(0, 1)


def _logits(options, x_SCD, head_VD):
    """Logits [S, C, V] in float32, -inf for ids that only pad the vocabulary."""
    logits = jnp.einsum("scd,vd->scv", x_SCD, head_VD, preferred_element_type=jnp.float32)
    logits = softcap(logits, options.softcap)
    if head_VD.shape[0] > options.vocab_size:
        logits = jnp.where(jnp.arange(head_VD.shape[0]) < options.vocab_size, logits, -jnp.inf)
    return constrain(logits, "shard", None, "vocab")


def _chunk_loss(options, x_SCD, head_VD, targets_SC, weights_SC):
    """The loss of one chunk and its gradient.

    Returns: ([sum of the loss, sum of its nll part], gradient of the loss with respect to the product with the head,
      which are the logits before the cap, [S, C, V]).
    """
    z_loss = options.z_loss
    logits = _logits(options, x_SCD, head_VD)
    top = logits.max(-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = exp.sum(-1, keepdims=True)
    lse_SC = (top + jnp.log(total))[..., 0]
    is_target = jnp.arange(head_VD.shape[0]) == targets_SC[..., None]
    nll = (lse_SC - jnp.where(is_target, logits, 0).sum(-1)) * weights_SC
    loss = nll + z_loss * jnp.square(lse_SC) * weights_SC
    # The gradient of lse is the softmax and that of the target's logit is one-hot, so that of the loss is
    # softmax * (1 + 2 z_loss lse) - one-hot.
    factor_SC = (1 + 2 * z_loss * lse_SC) * weights_SC
    d_logits = exp * (factor_SC[..., None] / total) - jnp.where(is_target, weights_SC[..., None], 0)
    if options.softcap:
        # The slope of c tanh(z / c) is 1 - tanh^2. -1 in place of the -inf of padding makes it 0 there, and not NaN.
        tanh = jnp.maximum(logits / options.softcap, -1)
        d_logits *= (1 + tanh) * (1 - tanh)
    return jnp.stack([loss.sum(), nll.sum()]), d_logits


def _compute_head(options, x, head_VD):
    """The head in the dtype of the product, its width whole on every device."""
    head_VD = unpadded_embed(head_VD.astype(options.dtype), x.shape[-1], ("vocab", "embed"))
    return constrain(head_VD, "vocab", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(options, x, head_VD, targets, weights):
    """`cross_entropy` of arrays cut by `_chunks`. This body runs where no gradient is asked for."""
    head = _compute_head(options, x, head_VD)
    sums = jax.lax.map(lambda c: _chunk_loss(options, c[0], head, c[1], c[2])[0], (x, targets, weights))
    return tuple(sums.sum(0))


def _loss_sums_forward(options, x, head_VD, targets, weights):
    head = _compute_head(options, x, head_VD)

    def step(d_head_SVD, chunk):
        x_SCD, targets_SC, weights_SC = chunk
        # The sum keeps the shard axis, so that each device adds up its own chunks and one reduction after the loop adds
        # up the devices. Without it XLA would reduce over the devices after each chunk.
        sums, d_logits = _chunk_loss(options, x_SCD, head, targets_SC, weights_SC)
        d_logits = d_logits.astype(x_SCD.dtype)
        dx_SCD = jnp.einsum("scv,vd->scd", d_logits, head)
        d_head_SVD += jnp.einsum("scv,scd->svd", d_logits, x_SCD, preferred_element_type=jnp.float32)
        return constrain(d_head_SVD, "shard", "vocab", None), (sums, dx_SCD)

    zeros = constrain(jnp.zeros((x.shape[1], *head.shape), jnp.float32), "shard", "vocab", None)
    d_head_SVD, (sums, dx) = jax.lax.scan(step, zeros, (x, targets, weights))
    d_head_SVD = jnp.pad(d_head_SVD, [(0, 0), (0, 0), (0, head_VD.shape[1] - head.shape[1])])
    return tuple(sums.sum(0)), (dx, _sum_of_shards(d_head_SVD))


def _sum_of_shards(d_head_SVD):
    """The gradient of the head, summed over the batch shards: [V, D], sharded as the head.

    Scatters the sums within fsdp groups before it sums over data: of the network between nodes or slices, this asks for
    1/fsdp of the bytes that one all-reduce over both axes would send. Left to choose, XLA for TPUs takes the one
    all-reduce, and so does XLA for GPUs where the vocabulary is split too.
    """

    if parts("embed") == 1:
        # Nothing to scatter. XLA for CPUs would run the scatter all the same: with micro-batches, a fifth of the step.
        return constrain(d_head_SVD.sum(0), "vocab", "embed")

    def local(d_svd):
        return jax.lax.psum(jax.lax.psum_scatter(d_svd[0], "fsdp", scatter_dimension=1, tiled=True), "data")

    return jax.shard_map(local, in_specs=spec("shard", "vocab", None), out_specs=spec("vocab", "embed"))(d_head_SVD)


def _loss_sums_backward(options, residuals, cotangents):
    dx, d_head = residuals
    scale = cotangents[0]  # of the total; the nll has no gradient
    return (dx * scale).astype(dx.dtype), d_head * scale, None, None


_loss_sums.defvjp(_loss_sums_forward, _loss_sums_backward)


def quality(loss: float, tokens: int, text_bytes: int) -> dict:
    """Loss, perplexity and bits per byte of a text.

    Args:
      loss: mean over the predicted tokens, in nats.
      tokens: number of predicted tokens.
      text_bytes: length in bytes of the text that these tokens make up.
    Returns: {"loss", "perplexity", "bits_per_byte"}.
    """
    bits = loss / math.log(2) * tokens / text_bytes
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a float from 710 on
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits}
