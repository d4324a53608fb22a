"""Looks at one token, one key or one position of a text: what the analyses compute, for a page that asks on demand.

Vectors say the tokens that softmax(E Norm_f(x)) makes likeliest, as in `values`. Those of the residual stream are taken
as they are; what is added to it (rows, values, the outputs of attention and FFNs) is first brought to root mean square
1. Every function compiles once for each number of tokens that is asked for, whatever the token or the key; `position`
once for each power of two of the text's length.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.corpus import State, TokenVectors, positions, states
from memoryllm_jax.analysis.key_values import KeyValueModel, coefficients, weighted_sum
from memoryllm_jax.analysis.values import top_tokens
from memoryllm_jax.analysis.vocabulary import StrongestKeys, strongest_keys
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.model import memories

MOST = 20  # tokens and keys that a view can be asked for
_LAYERS = 0.5  # share of the work that the layers are; the rest is what their vectors say

Report = Callable[[float], None]  # takes the share that is done, from 0 to 1; an exception of it ends the work


class Says(NamedTuple):
    """The likeliest tokens of a vector, likeliest first, and their probabilities.

    p_final: the probability of the token that the model predicts at the position; None where there is no position.
    """

    ids: list[int]
    p: list[float]
    p_final: float | None = None


class Key(NamedTuple):
    """A key that adds c v to the residual stream.

    Attributes:
      key: its number in the layer.
      c: its coefficient.
      share: |c| |v| over its sum over all keys of the layer.
      says: what sign(c) v says, which is what the key adds.
    """

    key: int
    c: float
    share: float
    says: Says


class TokenLayer(NamedTuple):
    """One layer's row of a token: its norm, what it says, and the keys of FFN-M that add most to it."""

    norm: float
    says: Says | None
    keys: list[Key]


class PositionLayer(NamedTuple):
    """What one layer does at a position of a text.

    Attributes:
      parts: by name, what each says: "residual" (r = X_l + Attn_l, as in `residual`), "attention", "memory" (what the
        token memory adds), "compute" (FFN-C or base's FFN) and "output" (X_{l+1}). Those that a model lacks are absent.
      keys: the keys of FFN-C or of base's FFN that add most.
    """

    parts: dict[str, Says]
    keys: list[Key]


class Position(NamedTuple):
    """The token that the model predicts at a position, and what each layer does there."""

    final: int
    layers: list[PositionLayer]


_STREAM = ("residual", "output")  # parts that are the residual stream itself


def token(model: KeyValueModel, source: TokenVectors, number: int, top: int, report: Report) -> list[TokenLayer]:
    """Looks at the rows of a token, layer by layer.

    Args:
      source: where rows come from. Coefficients are always computed.
      number: id of the token.
      top: tokens and keys to list, at most MOST.
      report: called after each layer.
    """
    config, ids_1 = model.config, np.array([number], np.int32)
    rows, found, values = [], [], []
    for layer in range(config.layers):
        has_row = layer in config.row_layers
        rows.append(source.rows(layer, ids_1) if has_row else jnp.zeros((1, config.row_dim)))
        if config.memory_dim:
            c_1F = model.token_coefficients(layer, ids_1)
            keys, values_KD = _strongest(model, "memory", layer, c_1F, top)
            found.append(keys)
            values.append(values_KD)
        report(_LAYERS * (layer + 1) / config.layers)
    norms_L = np.asarray(jnp.linalg.norm(jnp.concatenate(rows).astype(jnp.float32), axis=1))
    if not memories.of(config).adds_rows:  # rows that do not lie in the residual stream say nothing
        return [TokenLayer(float(norm), None, []) for norm in norms_L]
    says = iter(_say(model, [*rows, *values], top, unit=True))
    of_rows = list(itertools.islice(says, config.layers))
    keys = _keys(found, says) if found else [[] for _ in of_rows]
    return [TokenLayer(float(norm), *rest) for norm, *rest in zip(norms_L, of_rows, keys)]


def position(model: KeyValueModel, source: TokenVectors, ids: list[int], at: int, top: int, report: Report) -> Position:
    """Looks at what each layer does at a position of a text.

    Args:
      source: where embeddings and rows come from.
      ids: token ids of the text, of which those after the position do not matter.
      at: the position, from 0 on.
      top: tokens and keys to list, at most MOST.
      report: called after each layer.
    """
    config = model.config
    # Padding lies after the position, where causal attention does not let it be seen.
    size = bucket(at + 1, model.trained.context)
    tokens_1T = np.pad(np.array(ids[: at + 1], np.int32), (0, size - at - 1), "edge")[None]
    parts: list[dict[str, jax.Array]] = []
    found, values = [], []
    for layer, state in enumerate(states(model, tokens_1T, source)):
        here = positions(state, np.array([at]))
        compute_1D = None
        if config.compute_dim:
            weights = model.weights("compute", layer)
            c_1F = coefficients(here.queries["compute"], weights)
            compute_1D = weighted_sum(c_1F, weights["down"])
            keys, values_KD = _strongest(model, "compute", layer, c_1F, top)
            found.append(keys)
            values.append(values_KD)
        parts.append(_parts(config, here, compute_1D))
        report(_LAYERS * (layer + 1) / config.layers)
    final = int(top_tokens(model, parts[-1]["output"], 1, unit=False).ids_Nk[0, 0])
    stream = [part[name] for part in parts for name in part if name in _STREAM]
    added = [part[name] for part in parts for name in part if name not in _STREAM]
    of_stream = iter(_say(model, stream, top, unit=False, final=final))
    of_added = iter(_say(model, [*added, *values], top, unit=True, final=final))
    said = [{name: next(of_stream if name in _STREAM else of_added) for name in part} for part in parts]
    keys = _keys(found, of_added) if found else [[] for _ in parts]
    return Position(final, list(map(PositionLayer, said, keys)))


def _parts(config, state: State, compute_1D) -> dict[str, jax.Array]:
    """The vectors [1, D] of a layer's parts, in the order in which they are shown."""
    parts = {"residual": state.residual_ND, "attention": state.attended_ND}
    memory = memories.of(config)
    if memory.adds_rows:
        parts["memory"] = state.row_ND
    elif memory.gate_weights:  # what the gate lets through of the row, and projects to the stream
        parts["memory"] = state.output_ND - state.residual_ND - compute_1D
    if compute_1D is not None:
        parts["compute"] = compute_1D
    return parts | {"output": state.output_ND}


def _strongest(model, ffn, layer, c_1F, top) -> tuple[StrongestKeys, jax.Array]:
    """The keys that add most, [1, K], and what they add apart from its size: sign(c) v, [K, D]."""
    keys = strongest_keys(c_1F, model.value_norms(ffn, layer), min(top, c_1F.shape[1]))
    return keys, _signed(model.values(ffn, layer), keys.keys[0], keys.c[0])


@jax.jit
def _signed(v_FD, keys_K, c_K):
    return v_FD[keys_K] * jnp.where(c_K < 0, -1, 1)[:, None].astype(v_FD.dtype)


def _say(model, vectors: list[jax.Array], top: int, unit: bool, final: int | None = None) -> list[Says]:
    """What each row of some arrays [N, D] says; with `final` also the probability of that token."""
    x_ND = jnp.concatenate(vectors)
    found = top_tokens(model, x_ND, top, unit, None if final is None else np.full(len(x_ND), final, np.int32))
    of_final = [None] * len(x_ND) if found.p_of_N is None else found.p_of_N.tolist()
    return list(map(Says, found.ids_Nk.tolist(), found.p_Nk.tolist(), of_final))


def _keys(found: list[StrongestKeys], says: Iterator[Says]) -> list[list[Key]]:
    """The keys of each layer; `says` gives what their values say."""
    of_layers = [zip(*(x_1K[0].tolist() for x_1K in keys)) for keys in jax.device_get(found)]
    return [[Key(key, c, share, next(says)) for key, c, share in keys] for keys in of_layers]
