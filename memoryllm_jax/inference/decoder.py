"""A trained model's decoder over token rows: prefill, decode steps with a key-value cache, and scoring of text.

It holds attention, FFN-C and the output head. Rows of the token memory come from outside as `TokenRows`, so it does not
know whether they were computed a moment ago or read from a disk. Shapes as in model.py; C is the cache's capacity.
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
    """The power of two, from 16 on, that `size` is padded to, so that few shapes compile; at most `most`."""
    return min(most, max(_SMALLEST_BUCKET, 1 << (size - 1).bit_length()))


class Decoder:
    """Compiled functions of one model, each compiled once for each shape bucket.

    Args:
      params: what `TrainedModel.load` returns; "memory" and an untied "embedding" are not used.
    """

    def __init__(self, config: ModelConfig, params: dict, mesh):
        self.config, self.mesh = config, mesh
        self.shards = sharding.batch_shards(mesh)
        self._params = {name: params[name] for name in ("layers", "final_norm")}
        self._params["head"] = params["embedding" if config.tie_embeddings else "head"]
        self._prefill = jax.jit(self._prefill_body, static_argnames="length")
        self._place = jax.jit(self._place_body, donate_argnums=0)
        self._step = jax.jit(self._step_body)
        self._append = jax.jit(
            lambda cache, new, position_B: [old.write(n, position_B) for old, n in zip(cache, new)], donate_argnums=0
        )
        self._score = jax.jit(self._score_body, static_argnames="length")
        self._log_probs = jax.jit(self._log_probs_body, static_argnames="length")

    @property
    def weights_bytes(self) -> int:
        """Bytes of the decoder's weights, which one decode step reads once."""
        return sum(x.nbytes for x in jax.tree.leaves(self._params))

    def scaled(self, memory_L: np.ndarray, compute_L: np.ndarray) -> "Decoder":
        """This decoder with the token memory and FFN-C of each layer times a factor, by the same compiled functions."""
        layers = [dict(layer) for layer in self._params["layers"]]
        for layer, factor in zip(layers, compute_L.astype(np.float32)):
            if "ffn" in layer:
                layer["ffn"] = layer["ffn"] | {"down": _times(layer["ffn"]["down"], factor)}
        return self.changed(layers=layers, memory_scale=memory_L.astype(np.float32))

    def changed(self, **params) -> "Decoder":
        """This decoder with other parameters, such as layers, by the same compiled functions."""
        other = copy.copy(self)
        other._params = self._params | params
        return other

    def empty_cache(self, batch: int, capacity: int) -> list[attention.Cache]:
        c = self.config
        with jax.set_mesh(self.mesh):
            axes = ("batch", "heads", None, None)
            shape = sharding.padded((batch, c.key_heads, capacity, c.head_dim), axes)
            where = jax.sharding.NamedSharding(self.mesh, sharding.spec(*axes))
            zeros = jax.jit(lambda: jnp.zeros(shape, c.dtype), out_shardings=where)
            return [attention.Cache(zeros(), zeros()) for _ in range(c.layers)]

    def prefill(self, rows: TokenRows, index_BT: np.ndarray, lengths_b: np.ndarray, slots_b, cache):
        """Reads prompts, padded on the right to T, into the cache's sequences `slots_b` (past its end: nowhere).

        Returns: (logits [b, V] of the token after each prompt, float32; cache). The old cache is donated.
        """
        with jax.set_mesh(self.mesh):
            index_SN = self._by_shard(index_BT)
            logits, kept = self._prefill(self._params, rows, index_SN, lengths_b, length=index_BT.shape[1])
            return logits, self._place(cache, kept, slots_b)

    def step(self, rows: TokenRows, index_B, position_B, cache):
        """One token a sequence, at its position. Returns: (logits [B, V], cache). The old cache is donated."""
        with jax.set_mesh(self.mesh):
            logits, new = self._step(self._params, rows, self._by_shard(index_B), position_B, cache)
            return logits, self._append(cache, new, position_B)

    def score(self, rows: TokenRows, index_BT, targets_BT, weights_BT):
        """Sum of weight * nats over the targets."""
        with jax.set_mesh(self.mesh):
            batch = tuple(self._by_shard(x) for x in (index_BT, targets_BT, weights_BT))
            return self._score(self._params, rows, *batch, length=index_BT.shape[1])

    def log_probs(self, rows: TokenRows, index_BT, targets_BT):
        """(log-probability [B, T] of each target in nats, float32; whether it is the likeliest id)."""
        with jax.set_mesh(self.mesh):
            batch = self._by_shard(index_BT), self._by_shard(targets_BT)
            return self._log_probs(self._params, rows, *batch, length=index_BT.shape[1])

    def _by_shard(self, x):
        return x.reshape(self.shards, -1)

    def _hidden(self, params, rows, index_SN, positions, past=None):
        """Final states [B, T, D] and what each layer keeps; positions [T] or [B, T]."""
        c = self.config
        x_BTD = take_rows(rows.x0_SUD, index_SN).reshape(-1, positions.shape[-1], c.dim).astype(c.dtype)
        x_BTD = constrain(x_BTD, "batch", None, None)
        rope, kept = transformer.rope_table(c, positions), []
        for layer, layer_params in enumerate(params["layers"]):
            ffn = None if rows.ffn_LSUD is None else rows.ffn_LSUD[layer]
            if ffn is not None:
                scale = params.get("memory_scale")
                ffn = (ffn if scale is None else ffn.astype(jnp.float32) * scale[layer]).astype(c.dtype)
            at = None if past is None else (past[0][layer], past[1])
            out = transformer.apply_layer(c, layer_params, x_BTD, ffn, index_SN, rope, at)
            x_BTD = out.x_BTD
            kept.append(out.keys_values)
        return transformer.Norm(c).apply({"params": params["final_norm"]}, x_BTD), kept

    def _logits(self, params, x_BD):
        head_VD = unpadded_embed(params["head"], self.config.dim, ("vocab", "embed"))
        logits_BV = jnp.einsum("bd,vd->bv", x_BD, head_VD, preferred_element_type=jnp.float32)
        return constrain(logits_BV, None, None)  # whole on every device, so that every host draws the same

    def _prefill_body(self, params, rows, index_SN, lengths_B, length):
        x_BTD, kept = self._hidden(params, rows, index_SN, jnp.arange(length))
        return self._logits(params, x_BTD[jnp.arange(len(lengths_B)), lengths_B - 1]), kept

    def _place_body(self, cache, kept, slots_B):
        def put(cache_BHCK, new_bHTK):
            return cache_BHCK.at[slots_B, :, : new_bHTK.shape[2]].set(new_bHTK, mode="drop")

        return jax.tree.map(put, cache, kept)

    def _step_body(self, params, rows, index_SN, position_B, cache):
        x_BTD, new = self._hidden(params, rows, index_SN, position_B[:, None], (cache, position_B))
        return self._logits(params, x_BTD[:, 0]), new

    def _score_body(self, params, rows, index_SN, targets_SN, weights_SN, length):
        scored = self._to_score(params, rows, index_SN, length)
        return loss.cross_entropy(*scored, targets_SN, weights_SN, self._loss_options)[1]

    def _log_probs_body(self, params, rows, index_SN, targets_SN, length):
        found = loss.log_probs(*self._to_score(params, rows, index_SN, length), targets_SN, self._loss_options)
        return tuple(x.reshape(-1, length) for x in found)

    def _to_score(self, params, rows, index_SN, length):
        """(final states [S, N, D], head)."""
        x_BTD, _ = self._hidden(params, rows, index_SN, jnp.arange(length))
        return x_BTD.reshape(*index_SN.shape, -1), params["head"]

    @property
    def _loss_options(self):
        return loss.Options(self.config.vocab_size, 0.0, self.config.loss_chunk, self.config.dtype)


@jax.jit
def _times(w, factor):
    return (w.astype(jnp.float32) * factor).astype(w.dtype)
