"""Passes of whole sequences through a decoder: prefill of prompts, and scoring of text.

Each layer is one call of a jitted function that takes the layer's parameters as an argument. It compiles once for each
combination of shapes, so that the time to compile does not grow with the number of layers. `lax.scan` would need the
parameters stacked over the layers, which is a second copy of them.

Call the functions inside a mesh. They return before the device is done. Shapes are those of decoder.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.inference import ahead
from memoryllm_jax.model import attention, loss, modules, transformer
from memoryllm_jax.model.sharding import constrain, parts, spec, unpadded_embed
from memoryllm_jax.model.token_memory import TokenRows, take_rows

# Bytes of the float32 logits that a device holds at a time. Each chunk of positions reads the head once, so that small
# chunks take longer: 128 MiB are 261 positions at 128,256 ids, for which an H100 multiplies about as long as it reads.
LOGITS_BYTES = 128 << 20


def prefill(config: ModelConfig, params: dict, rows: TokenRows, index_SN, lengths_b, slots_b, cache):
    """Runs prompts through the decoder and writes their keys and values to the cache.

    Args:
      params: those of `Decoder`.
      index_SN: int32, the row of each position; the others are those of `Decoder.prefill`.
    Returns: (float32 logits [b, V] of the token after each prompt, the cache with the prompts).
    """
    x_bTD, where = embed(config, rows.x0_SUD, index_SN, index_SN.size // len(lengths_b))
    slots_b = _on_device(slots_b)
    written = []
    for layer, (layer_params, old) in enumerate(zip(params["layers"], cache, strict=True)):
        x_bTD, new = _prefill_layer(
            config, layer_params, x_bTD, rows_of_layer(rows, params, layer), where, old, slots_b
        )
        written.append(new)
    return _last_logits(config, params["final_norm"], params["head"], x_bTD, lengths_b), written


def score(config: ModelConfig, params: dict, rows: TokenRows, index_SN, targets_SN, weights_SN, length: int):
    """Sum over all positions of weight * negative log-probability of the target, in nats.

    Args:
      params: those of `Decoder`.
      index_SN, targets_SN, weights_SN: of each position, as of `Decoder.score`.
      length: T, the positions of a sequence.
    """
    x_BTD = _states(config, params, rows, index_SN, length)
    return _score_states(config, params["final_norm"], params["head"], x_BTD, targets_SN, weights_SN)


def log_probs(config: ModelConfig, params: dict, rows: TokenRows, index_SN, targets_SN, length: int):
    """The `loss.TargetScores` of each position, [B, T]. The arguments are those of `score`."""
    x_BTD = _states(config, params, rows, index_SN, length)
    return _log_probs_of_states(config, params["final_norm"], params["head"], x_BTD, targets_SN)


def logits(config: ModelConfig, head_VD, x_BD):
    """Logits [B, V] in float32, whole on each device, so that all hosts draw the same token. Call it inside jit."""
    head_VD = unpadded_embed(head_VD, config.dim, ("vocab", "embed"))
    logits_BV = jnp.einsum("bd,vd->bv", x_BD, head_VD, preferred_element_type=jnp.float32)
    return constrain(modules.softcap(logits_BV, config.logit_softcap), None, None)


def rows_of_layer(rows: TokenRows, params: dict, layer: int):
    """(rows of a layer or None, the `transformer.Factors` of a `Decoder`'s parameters or None)."""
    ffn_SUD = None if rows.rows_LSUP is None else rows.rows_LSUP[layer]
    factors = params.get("factors")
    return ffn_SUD, None if factors is None else transformer.Factors(*(of_L[layer] for of_L in factors))


def _states(config, params, rows, index_SN, length):
    """The residual stream after the last layer, [B, T, D]."""
    x_BTD, where = embed(config, rows.x0_SUD, index_SN, length)
    for layer, layer_params in enumerate(params["layers"]):
        x_BTD = _score_layer(config, layer_params, x_BTD, rows_of_layer(rows, params, layer), where)
    return x_BTD


class Where(NamedTuple):
    """What all layers need to know about the positions, on the devices.

    Attributes:
      index_SN: int32, the row of each position.
      rope: their `rope_table`.
    """

    index_SN: jax.Array
    rope: tuple[jax.Array, jax.Array]


# Results that a later call takes have one sharding each: with another one that call would compile again.
STREAM = spec("batch", None, None)
CACHE = spec("batch", "heads", None, None)  # as `Decoder.empty_cache` places it


@functools.partial(ahead.jit, static_argnames=("config", "length"), out_shardings=(STREAM, None))
def embed(config, x0_SUD, index_SN, length):
    """Returns: (X_0 of each position [B, T, D], the `Where` of the positions)."""
    x_BTD = take_rows(x0_SUD, index_SN).reshape(-1, length, config.dim).astype(config.dtype)
    where = Where(constrain(index_SN, "shard", None), transformer.rope_table(config, jnp.arange(length)))
    return x_BTD, where


@ahead.jit
def _on_device(x_b):
    """An array of the host, whole on each device. Passed to each layer as it is, it would be copied once a layer."""
    return constrain(x_b, None)


def layer_of_rows(config, layer_params, x_BTD, rows_and_factors, where: Where) -> transformer.LayerOutput:
    """Applies a layer. Call it inside jit. Args: rows_and_factors: as `rows_of_layer` gives them."""
    ffn_SUD, factors = rows_and_factors
    return transformer.apply_layer(config, layer_params, x_BTD, ffn_SUD, where.index_SN, where.rope, factors=factors)


# The residual stream is donated: each layer overwrites that of the layer before.
@functools.partial(ahead.jit, static_argnames="config", donate_argnames="x_BTD", out_shardings=STREAM)
def _score_layer(config, layer_params, x_BTD, rows_and_factors, where):
    return layer_of_rows(config, layer_params, x_BTD, rows_and_factors, where).x_BTD


@functools.partial(
    ahead.jit, static_argnames="config", donate_argnames=("x_bTD", "cache"), out_shardings=(STREAM, CACHE)
)
def _prefill_layer(config, layer_params, x_bTD, rows_and_factors, where, cache, slots_b):
    out = layer_of_rows(config, layer_params, x_bTD, rows_and_factors, where)

    def put(cache_BHCK, new_bHTK):
        return cache_BHCK.at[slots_b, :, : new_bHTK.shape[2]].set(new_bHTK, mode="drop")

    return out.x_BTD, attention.Cache(*map(put, cache, out.keys_values))


@functools.partial(ahead.jit, static_argnames="config")
def _last_logits(config, final_norm, head_VD, x_bTD, lengths_b):
    last_bD = x_bTD[jnp.arange(len(lengths_b)), lengths_b - 1]
    return logits(config, head_VD, normalised(config, final_norm, last_bD))


@functools.partial(ahead.jit, static_argnames="config")
def _score_states(config, final_norm, head_VD, x_BTD, targets_SN, weights_SN):
    x_SND = normalised(config, final_norm, x_BTD).reshape(*targets_SN.shape, -1)
    _, nll = loss.cross_entropy(x_SND, head_VD, targets_SN, weights_SN, loss_options(config, head_VD, targets_SN))
    return nll


@functools.partial(ahead.jit, static_argnames="config")
def _log_probs_of_states(config, final_norm, head_VD, x_BTD, targets_SN):
    x_SND = normalised(config, final_norm, x_BTD).reshape(*targets_SN.shape, -1)
    found = loss.log_probs(x_SND, head_VD, targets_SN, loss_options(config, head_VD, targets_SN))
    # Whole on each device, so that each of several hosts can read them.
    return loss.TargetScores(*(constrain(x_SN.reshape(x_BTD.shape[:2]), None, None) for x_SN in found))


def normalised(config, final_norm, x):
    return modules.Norm(config).apply({"params": final_norm}, x)


def loss_options(config, head_VD, targets_SN):
    """Options with equal chunks of at most LOGITS_BYTES on each device."""
    bytes_of_position = 4 * -(-head_VD.shape[0] // parts("vocab"))
    most = max(1, LOGITS_BYTES // bytes_of_position)
    positions = targets_SN.shape[1]
    chunk = -(-positions // -(-positions // most))
    return loss.Options(config.vocab_size, z_loss=0.0, chunk=chunk, dtype=config.dtype, softcap=config.logit_softcap)
