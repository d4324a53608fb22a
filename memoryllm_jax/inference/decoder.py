"""A trained model's decoder over token rows: prefill, decode steps with a key-value cache, and scoring of text.

It holds attention, FFN-C and the output head. The caller passes the rows of the token memory as `TokenRows`, so the
decoder does not know whether they were computed from weights or looked up.

Shapes: B sequences, T positions, D model width, H heads, K head size, V token ids as the head stores them, L layers,
C positions of the cache, S batch shards, N = B T / S positions of a shard; b sequences of one prefill.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.config import ModelConfig
from memoryllm_jax.model import attention, loss, sharding, transformer
from memoryllm_jax.model.sharding import constrain, unpadded_embed
from memoryllm_jax.model.token_memory import TokenRows, take_rows

_SMALLEST_BUCKET = 16


def bucket(size: int, most: int) -> int:
    """The size to pad to, so that few shapes compile: a power of two of at least 16, or `most` if that is less."""
    return min(most, max(_SMALLEST_BUCKET, next_power_of_two(size)))


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is not less than `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


class Decoder:
    """The compiled functions of one model. Each compiles once for each combination of shapes.

    Methods take arrays of the host or the device, and return before the device is done.

    Args:
      params: parameters as `TrainedModel.load` gives them; "memory" and an untied "embedding" are not used.
      mesh: the mesh that the parameters lie on.
    Attributes:
      shards: batch shards of the mesh. The size of each batch must be a multiple of it.
    """

    def __init__(self, config: ModelConfig, params: dict, mesh):
        self.config, self.mesh = config, mesh
        self.shards = sharding.batch_shards(mesh)
        self._params = {name: params[name] for name in ("layers", "final_norm")}
        self._params["head"] = params["embedding" if config.tie_embeddings else "head"]
        self._prefill = jax.jit(self._prefill_body, static_argnames="length")
        self._place = jax.jit(self._place_body, donate_argnums=0)
        self._step = jax.jit(self._step_body)
        self._append = jax.jit(self._append_body, donate_argnums=0)
        self._score = jax.jit(self._score_body, static_argnames="length")
        self._log_probs = jax.jit(self._log_probs_body, static_argnames="length")

    @property
    def weights_bytes(self) -> int:
        """Bytes of the decoder's weights. A decode step reads each of them once."""
        return sum(x.nbytes for x in jax.tree.leaves(self._params))

    def scaled(self, memory_L: np.ndarray, compute_L: np.ndarray) -> "Decoder":
        """This decoder with each layer's token memory and FFN-C multiplied by a factor.

        The compiled functions are shared, so other factors need no compilation.

        Args:
          memory_L: the factors of the token memory by layer.
          compute_L: the factors of FFN-C by layer, or of base's FFN.
        """
        layers = []
        # FFN-C is scaled once, in its output matrix. Rows come from the caller, so `_layer_rows` scales them each time.
        for layer, factor in zip(self._params["layers"], compute_L.astype(np.float32)):
            if "ffn" in layer:
                layer = layer | {"ffn": layer["ffn"] | {"down": _times(layer["ffn"]["down"], factor)}}
            layers.append(layer)
        return self.with_params(layers=layers, memory_scale=memory_L.astype(np.float32))

    def with_params(self, **params) -> "Decoder":
        """This decoder with some parameters replaced, such as `layers`. The compiled functions are shared."""
        # A shallow copy is enough, because the jitted functions take the parameters as an argument.
        other = copy.copy(self)
        other._params = self._params | params
        return other

    def empty_cache(self, batch: int, capacity: int) -> list[attention.Cache]:
        """A cache for each layer, for `batch` sequences of up to `capacity` positions."""
        c = self.config
        with jax.set_mesh(self.mesh):
            axes = ("batch", "heads", None, None)
            shape = sharding.padded((batch, c.key_heads, capacity, c.head_dim), axes)
            where = jax.sharding.NamedSharding(self.mesh, sharding.spec(*axes))
            zeros = jax.jit(lambda: jnp.zeros(shape, c.dtype), out_shardings=where)
            return [attention.Cache(zeros(), zeros()) for _ in range(c.layers)]

    def prefill(self, rows: TokenRows, index_bT: np.ndarray, lengths_b: np.ndarray, slots_b: np.ndarray, cache):
        """Runs prompts through the decoder and writes their keys and values to the cache.

        Args:
          rows: rows of the prompts' tokens.
          index_bT: int32, the row of each position. Prompts are padded on the right with the index of any row.
          lengths_b: int32, the length of each prompt without padding.
          slots_b: int32, the place in the cache's batch for each prompt. A place past the end is not written, which
            serves prompts that only pad the batch.
          cache: the cache of all sequences. It is donated, so it must not be used afterwards.
        Returns: (float32 logits [b, V] of the token after each prompt, the cache with the prompts).
        """
        with jax.set_mesh(self.mesh):
            index_SN = self._by_shard(index_bT)
            logits_bV, new = self._prefill(self._params, rows, index_SN, lengths_b, length=index_bT.shape[1])
            return logits_bV, self._place(cache, new, slots_b)

    def step(self, rows: TokenRows, index_B, position_B, cache):
        """Runs one token of each sequence through the decoder and writes its keys and values to the cache.

        Args:
          rows: rows of the tokens.
          index_B: int32, the row of each sequence's token.
          position_B: int32, the token's position in its sequence.
          cache: the cache of the earlier positions. It is donated, so it must not be used afterwards.
        Returns: (float32 logits [B, V] of the next token, the cache with these tokens).
        """
        with jax.set_mesh(self.mesh):
            logits_BV, new = self._step(self._params, rows, self._by_shard(index_B), position_B, cache)
            # Not part of the jitted step: if one function reads and updates the cache, XLA copies it.
            return logits_BV, self._append(cache, new, position_B)

    def score(self, rows: TokenRows, index_BT, targets_BT, weights_BT):
        """Sum over all positions of weight * negative log-probability of the target.

        Args:
          rows: rows of the positions' tokens.
          index_BT: int32, the row of each position.
          targets_BT: int32, the token id after each position.
          weights_BT: float32, the weight of each position.
        Returns: the sum in nats, a float32 scalar on the device.
        """
        with jax.set_mesh(self.mesh):
            batch = [self._by_shard(x) for x in (index_BT, targets_BT, weights_BT)]
            return self._score(self._params, rows, *batch, length=index_BT.shape[1])

    def log_probs(self, rows: TokenRows, index_BT, targets_BT) -> loss.TargetScores:
        """The log-probability of each target and whether it is the likeliest id, each [B, T].

        The arguments are those of `score`.
        """
        with jax.set_mesh(self.mesh):
            batch = [self._by_shard(x) for x in (index_BT, targets_BT)]
            return self._log_probs(self._params, rows, *batch, length=index_BT.shape[1])

    def _by_shard(self, x):
        return x.reshape(self.shards, -1)

    def _hidden(self, params, rows, index_SN, positions, past=None):
        """Runs all layers.

        Args:
          positions: int [T], or [B, T] if they differ between sequences.
          past: (caches of all layers, position [B]) for a decode step, or None.
        Returns: (normalised final states [B, T, D], each layer's keys and values of these positions).
        """
        c = self.config
        x_BTD = take_rows(rows.x0_SUD, index_SN).reshape(-1, positions.shape[-1], c.dim).astype(c.dtype)
        x_BTD = constrain(x_BTD, "batch", None, None)
        rope = transformer.rope_table(c, positions)
        keys_values = []
        for layer, layer_params in enumerate(params["layers"]):
            ffn_SUD = _layer_rows(rows, layer, params.get("memory_scale"), c.dtype)
            layer_past = None if past is None else (past[0][layer], past[1])
            out = transformer.apply_layer(c, layer_params, x_BTD, ffn_SUD, index_SN, rope, layer_past)
            x_BTD = out.x_BTD
            keys_values.append(out.keys_values)
        return transformer.Norm(c).apply({"params": params["final_norm"]}, x_BTD), keys_values

    def _logits(self, params, x_BD):
        head_VD = unpadded_embed(params["head"], self.config.dim, ("vocab", "embed"))
        logits_BV = jnp.einsum("bd,vd->bv", x_BD, head_VD, preferred_element_type=jnp.float32)
        return constrain(logits_BV, None, None)  # whole on each device, so that all hosts draw the same token

    def _prefill_body(self, params, rows, index_SN, lengths_b, length):
        x_bTD, keys_values = self._hidden(params, rows, index_SN, jnp.arange(length))
        last_bD = x_bTD[jnp.arange(len(lengths_b)), lengths_b - 1]
        return self._logits(params, last_bD), keys_values

    def _place_body(self, cache, new, slots_b):
        def put(cache_BHCK, new_bHTK):
            return cache_BHCK.at[slots_b, :, : new_bHTK.shape[2]].set(new_bHTK, mode="drop")

        return jax.tree.map(put, cache, new)

    def _step_body(self, params, rows, index_SN, position_B, cache):
        x_BTD, keys_values = self._hidden(params, rows, index_SN, position_B[:, None], (cache, position_B))
        return self._logits(params, x_BTD[:, 0]), keys_values

    def _append_body(self, cache, new, position_B):
        return [layer.write(added, position_B) for layer, added in zip(cache, new)]

    def _score_body(self, params, rows, index_SN, targets_SN, weights_SN, length):
        x_SND = self._states_to_score(params, rows, index_SN, length)
        _, nll = loss.cross_entropy(x_SND, params["head"], targets_SN, weights_SN, self._loss_options)
        return nll

    def _log_probs_body(self, params, rows, index_SN, targets_SN, length):
        x_SND = self._states_to_score(params, rows, index_SN, length)
        found = loss.log_probs(x_SND, params["head"], targets_SN, self._loss_options)
        return loss.TargetScores(*(x_SN.reshape(-1, length) for x_SN in found))

    def _states_to_score(self, params, rows, index_SN, length):
        x_BTD, _ = self._hidden(params, rows, index_SN, jnp.arange(length))
        return x_BTD.reshape(*index_SN.shape, -1)

    @property
    def _loss_options(self):
        c = self.config
        return loss.Options(vocab_size=c.vocab_size, z_loss=0.0, chunk=c.loss_chunk, dtype=c.dtype)


def _layer_rows(rows, layer, memory_scale, dtype):
    """A layer's rows in the dtype of the computation, times the layer's factor unless `memory_scale` is None."""
    if rows.ffn_LSUD is None or rows.ffn_LSUD[layer] is None:
        return None
    ffn_SUD = rows.ffn_LSUD[layer]
    if memory_scale is not None:
        ffn_SUD = ffn_SUD.astype(jnp.float32) * memory_scale[layer]
    return ffn_SUD.astype(dtype)


@jax.jit
def _times(w, factor):
    return (w.astype(jnp.float32) * factor).astype(w.dtype)
