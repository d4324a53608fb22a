"""Gradients of the loss of sequences with respect to rows of the token memory. The weights stay as they are.

Each layer is one call of a jitted function, as in sequences.py. The forward pass keeps the residual stream before each
layer, [L, B, T, D], and the backward pass computes the rest of a layer again. Shapes are those of decoder.py.
"""

import functools
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.inference import sequences
from memoryllm_jax.inference.sequences import layer_of_rows, loss_options, normalised, rows_of_layer
from memoryllm_jax.model import loss
from memoryllm_jax.model.token_memory import TokenRows


class RowGradients(NamedTuple):
    """The result of `row_gradients`.

    Attributes:
      scores: of the target after each position, [B, T].
      by_layer: {layer: float32 [U, D], the gradient of the loss with respect to the layer's rows}.
    """

    scores: loss.TargetScores
    by_layer: dict[int, jax.Array]


def row_gradients(
    config: ModelConfig,
    params: dict,
    rows: TokenRows,
    index_SN,
    targets_SN,
    weights_SN,
    length: int,
    layers: Collection[int],
) -> RowGradients:
    """The gradient of the sum of weight * negative log-probability of the target, in nats, with respect to rows.

    Args:
      params: those of `Decoder`.
      index_SN, targets_SN, weights_SN, length: as of `sequences.score`.
      layers: layers whose rows the gradient is computed for; none of them may be None in `rows`.
    """
    x_BTD, where = sequences.embed(config, rows.x0_SUD, index_SN, length)
    inputs = []
    for layer, layer_params in enumerate(params["layers"]):
        inputs.append(x_BTD)
        x_BTD = _layer(config, layer_params, x_BTD, rows_of_layer(rows, params, layer), where)
    g_BTD, scores = _head(config, params["final_norm"], params["head"], x_BTD, targets_SN, weights_SN)
    by_layer = {}
    for layer in reversed(range(min(layers), config.layers)):
        rows_and_factors = rows_of_layer(rows, params, layer)
        g_BTD, g_1UD = _layer_backward(config, params["layers"][layer], inputs.pop(), rows_and_factors, where, g_BTD)
        if layer in layers:
            by_layer[layer] = g_1UD[0]
    return RowGradients(scores, by_layer)


@functools.partial(jax.jit, static_argnames="config")
def _layer(config, layer_params, x_BTD, rows_and_factors, where):
    return layer_of_rows(config, layer_params, x_BTD, rows_and_factors, where).x_BTD


@functools.partial(jax.jit, static_argnames="config")
def _head(config, final_norm, head_VD, x_BTD, targets_SN, weights_SN):
    """Returns: (gradient of the loss with respect to the residual stream, `loss.TargetScores` [B, T])."""
    options = loss_options(config, head_VD, targets_SN)

    def total(x_BTD):
        x_SND = normalised(config, final_norm, x_BTD).reshape(*targets_SN.shape, -1)
        summed, _ = loss.cross_entropy(x_SND, head_VD, targets_SN, weights_SN, options)
        return summed, loss.log_probs(x_SND, head_VD, targets_SN, options)

    g_BTD, found = jax.grad(total, has_aux=True)(x_BTD)
    return g_BTD, loss.TargetScores(*(x_SN.reshape(x_BTD.shape[:2]) for x_SN in found))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="g_BTD")
def _layer_backward(config, layer_params, x_BTD, rows_and_factors, where, g_BTD):
    """Returns: the gradient with respect to (the residual stream before the layer, the rows or None)."""
    ffn_SUD, factors = rows_and_factors

    def forward(x_BTD, ffn_SUD):
        if ffn_SUD is not None:
            # `take_rows` has no gradient where one set of rows serves several batch shards.
            ffn_SUD = jnp.broadcast_to(ffn_SUD, (len(where.index_SN), *ffn_SUD.shape[1:]))
        return layer_of_rows(config, layer_params, x_BTD, (ffn_SUD, factors), where).x_BTD

    if ffn_SUD is not None:
        ffn_SUD = ffn_SUD.astype(jnp.float32)
    _, backward = jax.vjp(forward, x_BTD, ffn_SUD)
    return backward(g_BTD)
