"""Base, MemoryLLM and Flex-MemoryLLM as one decoder (Jaiswal et al. 2026, arXiv 2602.00398, section 2).

    base    A = X_l + Attn(N1(X_l));   X_{l+1} = A + FFN(N2(A))
    memory  X_{l+1} = X_l + Attn(N1(X_l)) + FFN-M(NM(X_0))
    flex-b  X_{l+1} = X_l + Attn(N1(X_l)) + FFN-C(N2(X_l)) + FFN-M(NM(X_0))

There are more architectures to compare with. Each is base with a smaller FFN, so that it has as many active parameters
as flex-b, and in each layer a table E_l of token embeddings in place of FFN-M, or nothing:

    rows-b       X_{l+1} = Y + E_l[token], where Y is base's X_{l+1}
    bigram-b     such a row of a hash of the token and the one before, in place of E_l[token]
    value-b      Attn's values are N1(X_l) W_V + E_l[token]
    bov-b        in the last third of the layers, Attn's values are gamma_l E_l[token]
    ple-b        X_{l+1} = Y + (GELU(NG(Y) W_gate) * NM(E_l[token])) W_out
    no-memory-b  nothing

Shapes: B sequences, T positions, D model width, H heads, K head size, F FFN width, V token ids, L layers,
S batch shards, U distinct token ids of a shard, N = B T / S positions of a shard, P width of a table's rows.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.config import MeshConfig, ModelConfig
from memoryllm_jax.model import attention, memories
from memoryllm_jax.model.modules import ADDED, Norm, SwiGLU, matmul, note, output_std, parameter, weight
from memoryllm_jax.model.sharding import batch_shards, constrain, make_mesh, padded, shardings
from memoryllm_jax.model.token_memory import TokenRows, embed, take_rows

# The groups of parameters that are stacked over decoder layers, from the first layer on. The second group is only there
# where some layers have other parameters than those below them, as they look up rows in place of values.
LAYERS = ("layers", "upper_layers")


def rope_table(config: ModelConfig, positions):
    """cos and sin [..., T, K/2] of the rotary embedding (Su et al. 2021), for the half-split layout of Llama.

    Args:
      positions: int [T], or [B, T] where sequences differ.
    """
    angle = positions.astype(jnp.float32)[..., None] * _rope_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def _rope_frequencies(c: ModelConfig):
    """Rotary frequencies in radians per position, float32 [K/2].

    For contexts longer than in the original training, `linear` divides all frequencies by rope_factor (Chen et al.
    2023). `llama3` keeps frequencies with many turns within the original context, divides those with few, and
    interpolates between the two (Llama Team 2024).
    """
    half = c.head_dim // 2
    frequency = c.rope_theta ** (-np.arange(half) / half)
    if c.rope_scaling == "none":
        return frequency.astype(np.float32)
    kept_share = 0.0
    if c.rope_scaling == "llama3":
        turns = frequency * c.rope_original_context / (2 * np.pi)
        kept_share = (turns - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor)
        kept_share = np.clip(kept_share, 0, 1)
    return (frequency * (kept_share + (1 - kept_share) / c.rope_factor)).astype(np.float32)


def _rotate(x_BTHK, rope):
    cos, sin = rope
    cos, sin = cos[..., None, :], sin[..., None, :]  # an axis for the heads, which all turn alike
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHK.dtype)


class AttentionOutput(NamedTuple):
    """What `Attention` computes.

    Attributes:
      attended_BTD: Attn(x).
      mixed_BTHK: the heads' results, which the output projection reads.
      keys_values: the keys and values of x, [B, H, T, K], for a cache; with `past`, that cache with those of x.
    """

    attended_BTD: jax.Array
    mixed_BTHK: jax.Array
    keys_values: attention.Cache


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and, where there are fewer key heads, grouped queries.

    With `model.qk_norm`, queries and keys are normalised over the K components of each head, so that their scores stay
    bounded (Henry et al. 2020, arXiv 2010.04245). A layer has two scales [K], one of its queries and one of its keys,
    as in Qwen3 (arXiv 2505.09388); OLMo 2 normalises all heads together. The norm is that of the model: RMSNorm, or
    LayerNorm as in ViT-22B (Dehghani et al. 2023, arXiv 2302.05442).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, rope, past: attention.Past | None = None, row_BTP=None, start_BT=None) -> AttentionOutput:
        """Attends over x itself or, with `past`, over a cache and over x.

        Args:
          x_BTD: normalised input.
          rope: `rope_table` of the positions of x.
          past: where x lies in a cache of the earlier positions, or None.
          row_BTP: the rows of the positions' tokens, which the values of some token memories take; or None.
          start_BT: as of `attention.causal_attention`; without `past` only.
        """
        c = self.config
        B, T, D = x_BTD.shape
        K = c.head_dim

        def project(name, heads):
            w_DHK = weight(self, name, (D, heads, K), ("embed", "heads", "head_dim"), c.init_std)
            return matmul(x_BTD, w_DHK.reshape(D, -1)).reshape(B, T, -1, K)

        def normalised(name, x_BTHK):
            return Norm(c, name=name)(x_BTHK) if c.qk_norm else x_BTHK

        q = _rotate(normalised("q_norm", project("q", c.heads)), rope)
        k = _rotate(normalised("k_norm", project("k", c.key_heads)), rope)
        values = functools.partial(project, "v", c.key_heads)
        v = values() if row_BTP is None else memories.of(c).values(values, row_BTP, k.shape[2])
        out_HKD = weight(self, "out", (c.heads, K, D), ("heads", "head_dim", "embed"), output_std(c))
        keys_values = attention.Cache(k.swapaxes(1, 2), v.swapaxes(1, 2))
        if past is None:
            group = c.heads // c.key_heads
            if group > 1:  # the kernels need a key head for each query head
                k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
            y = attention.causal_attention(q, k, v, c.attention, start_BT)
        else:
            y, keys_values = past.attend(q, keys_values)  # it takes grouped heads as they are
        return AttentionOutput(matmul(y.reshape(B, T, -1), out_HKD.reshape(-1, D)), y, keys_values)


class Factors(NamedTuple):
    """Factors of what a layer's FFNs add to the residual stream.

    Attributes:
      memory: of the token memory; a float32 scalar, or [B] with one for each sequence.
      compute: of FFN-C, or of base's FFN.
    """

    memory: jax.Array | np.ndarray
    compute: jax.Array | np.ndarray


def _times(x_BTD, factor):
    """x times a factor, or times a factor for each sequence, in the dtype of x."""
    return (x_BTD.astype(jnp.float32) * jnp.asarray(factor)[..., None, None]).astype(x_BTD.dtype)


class LayerOutput(NamedTuple):
    """What one decoder layer computes for B sequences of T positions.

    Attributes:
      x_BTD: the residual stream after the layer.
      keys_values: the keys and values of these positions, [B, H, T, K], for a cache; with `past`, the cache with them.
      attention_input_BTD: N1(X_l), which the projections to queries, keys and values read.
      mixed_BTHK: the heads' results, which attention's output projection reads.
      attended_BTD: Attn(N1(X_l)).
      ffn_input_BTD: the normalised stream that FFN-C, or base's FFN, reads; None if the layer has neither.
    """

    x_BTD: jax.Array
    keys_values: attention.Cache
    attention_input_BTD: jax.Array
    mixed_BTHK: jax.Array
    attended_BTD: jax.Array
    ffn_input_BTD: jax.Array | None


class DecoderLayer(nn.Module):
    """One decoder layer. It is given its rows of the token memory, and does not know where they come from."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, ffn_SUD, index_SN, rope, past=None, factors=None, start_BT=None) -> LayerOutput:
        """The arguments are those of `apply_layer`, and `start_BT` as of `attention.causal_attention`."""
        c = self.config
        shards = 1 if index_SN is None else len(index_SN)  # a layer of base needs no index
        row_BTP = None
        if ffn_SUD is not None:
            row_BTP = take_rows(ffn_SUD, index_SN).reshape(*x_BTD.shape[:2], -1)
            if factors is not None:
                row_BTP = _times(row_BTP, factors.memory)
            row_BTP = row_BTP.astype(c.dtype)
        attention_input = Norm(c, name="attention_norm")(x_BTD)
        attended, mixed, keys_values = Attention(c, name="attention")(attention_input, rope, past, row_BTP, start_BT)
        note(self, "attention", attended, shards)
        y = x_BTD + attended
        ffn_input = None
        if c.compute_dim:
            source = y if c.compute_input == "after_attention" else x_BTD
            ffn_input = Norm(c, name="ffn_norm")(source)
            computed = SwiGLU(c, c.compute_dim, name="ffn")(ffn_input)
            note(self, "ffn", computed, shards)
            y = y + (computed if factors is None else _times(computed, factors.compute))
        if row_BTP is not None:
            y = memories.of(c).stream(self, y, row_BTP, shards)
        y = constrain(y, "batch", None, None)
        return LayerOutput(y, keys_values, attention_input, mixed, attended, ffn_input)


def apply_layer(
    config: ModelConfig,
    params,
    x_BTD,
    ffn_SUD,
    index_SN,
    rope,
    past: attention.Past | None = None,
    factors: Factors | None = None,
    start_BT=None,
) -> LayerOutput:
    """Applies one decoder layer to the residual stream. Call it inside jit and a mesh.

    XLA drops the computation of results that the caller does not use.

    Args:
      params: the layer's parameters, as `TrainedModel.load` gives them.
      x_BTD: the residual stream before the layer.
      ffn_SUD: the layer's rows of the token memory in any dtype, or None.
      index_SN: int32, the row of each position: position n of shard s takes ffn[s, index[s, n]].
      rope: `rope_table` of the positions.
      past: where x lies in a cache, to attend over that too; None to attend over x alone.
      factors: of what the FFNs add; None instead of ones.
      start_BT: as of `attention.causal_attention`; without `past` only.
    """
    return DecoderLayer(config).apply({"params": params}, x_BTD, ffn_SUD, index_SN, rope, past, factors, start_BT)


class ScannedDecoderLayer(DecoderLayer):
    """A decoder layer for `nn.scan`, which expects (carry, what to stack over layers): here nothing is stacked."""

    def __call__(self, x_BTD, ffn_SUD, index_SN, rope, start_BT):
        return super().__call__(x_BTD, ffn_SUD, index_SN, rope, start_BT=start_BT).x_BTD, None


class ScannedMemoryLayer(memories.MemoryLayer):
    """A token memory's layer for `nn.scan`. The carry is what all layers read; the rows are stacked."""

    def __call__(self, source_SU, number=None):
        def take(table_VP, ids_SU):
            return embed(table_VP, ids_SU, self.config.dtype)

        row_SUP = super().__call__(source_SU, take, number)
        row_SUP = constrain(row_SUP, "shard", None, None)
        if memories.of(self.config).adds_rows:
            # Here and not after the loop: the rows of all layers would be in memory for longer.
            note(self, "memory", row_SUP, *row_SUP.shape[:2])
        return source_SU, row_SUP


def _over_layers(layer, config, in_axes, length):
    """Scans a layer over `length` layers, with the config's remat.

    It compiles once, and its parameters get a leading axis for the layers.
    """
    if config.remat != "none":
        policy = attention.keep_results if config.remat == "dots" else None
        # prevent_cse keeps XLA from merging the recomputation with the forward pass, which it cannot do within a scan.
        layer = nn.remat(layer, policy=policy, prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0, ADDED: 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class LanguageModel(nn.Module):
    """Token ids -> rows of the token memory -> hidden states. loss.py computes logits from these, chunk by chunk.

    Attributes:
      recompute_memory: whether the backward pass recomputes each layer's token memory, whatever config.remat says.
    """

    config: ModelConfig
    recompute_memory: bool = False

    def setup(self):
        c = self.config
        shape, axes = (c.vocab_size, c.dim), ("vocab", "embed")
        self.embedding_VD = parameter(self, "embedding", shape, axes, c.init_std)
        if not c.tie_embeddings:
            self.head_VD = parameter(self, "head", shape, axes, c.init_std)
        in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        lower = c.row_layers.start  # layers without rows, below those that have them
        self.layers = _over_layers(ScannedDecoderLayer, c, in_axes, lower or c.layers)(c)
        if lower:
            self.upper_layers = _over_layers(ScannedDecoderLayer, c, in_axes, c.layers - lower)(c)
        if c.row_dim:
            remat = "full" if self.recompute_memory else c.remat
            of_memory = dataclasses.replace(c, remat=remat)
            in_axes = (0,) if c.rows == "frozen" else ()
            self.memory = _over_layers(ScannedMemoryLayer, of_memory, in_axes, len(c.row_layers))(c)
        self.final_norm = Norm(c)

    def __call__(self, ids_SU, index_SN, length):
        """Uses all parameters, so that Linen's `init` creates them. Training and inference call the methods below."""
        return self.hidden(self.token_rows(ids_SU), index_SN, length), self.output_embedding()

    def token_rows(self, ids_SU, row_ids_SU=None) -> TokenRows:
        """Embeddings and token memory of the distinct ids of each batch shard.

        Args:
          ids_SU: int32. Padding may hold any id: a row that no position takes has no gradient.
          row_ids_SU: int32, the rows of the token memory, where these are not those of the ids.
        """
        c, x0_SUD, rows_LSUP = self.config, self._x0(ids_SU), None
        if c.row_dim:
            row_ids_SU = ids_SU if row_ids_SU is None else row_ids_SU
            source_SU = memories.of(c).source(row_ids_SU, x0_SUD, self._x0)
            numbers = [jnp.arange(c.row_layers.start, c.layers)] if c.rows == "frozen" else []
            _, rows_LSUP = self.memory(source_SU, *numbers)
        return TokenRows(x0_SUD, rows_LSUP)

    def _x0(self, ids_SU):
        x0_SUD = embed(self.embedding_VD, ids_SU, self.config.dtype)[..., : self.config.dim]
        return constrain(x0_SUD, "shard", None, None)

    def hidden(self, rows: TokenRows, index_SN, length: int, start_SN=None):
        """Runs all decoder layers.

        Args:
          rows: the result of `token_rows`.
          index_SN: int32, the row of each position: position n of shard s takes row index[s, n] of its shard.
          length: T, the positions of a sequence.
          start_SN: int32, the position in its sequence at which each position's document begins: attention stays inside
            a document, and positions count from its beginning. None: a sequence is one document.
        Returns: the normalised final states [B, T, D].
        """
        x_BTD = take_rows(rows.x0_SUD, index_SN).reshape(-1, length, self.config.dim)
        x_BTD = constrain(x_BTD, "batch", None, None)
        positions, start_BT = jnp.arange(length), None
        if start_SN is not None:
            start_BT = constrain(start_SN.reshape(-1, length), "batch", None)
            positions = positions - start_BT
        where = index_SN, rope_table(self.config, positions), start_BT
        if self.config.row_layers.start:
            x_BTD, _ = self.layers(x_BTD, None, *where)
            x_BTD, _ = self.upper_layers(x_BTD, rows.rows_LSUP, *where)
        else:
            x_BTD, _ = self.layers(x_BTD, rows.rows_LSUP, *where)
        return self.final_norm(x_BTD)

    def output_embedding(self):
        """The output head [V, D], float32, as stored with its padding."""
        return self.embedding_VD if self.config.tie_embeddings else self.head_VD


def init(model: LanguageModel, key, shards: int = 1, multiple: int = 1):
    """New parameters, each boxed with its logical axes. Call it inside a mesh.

    Args:
      key: jax.random key.
      shards: batch shards of the mesh.
      multiple: as in `sharding.padded`.
    """
    # Two positions for each shard, of token id 0: the values of the parameters do not depend on the ids.
    ids = jnp.zeros((shards, 2), jnp.int32)
    boxed = model.init(key, ids, ids, 2)["params"]

    def pad(box):
        shape = padded(box.value.shape, box.names, multiple)
        return box.replace_boxed(jnp.pad(box.value, [(0, b - a) for a, b in zip(box.value.shape, shape)]))

    return jax.tree.map(pad, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))


def abstract_params(model: LanguageModel, mesh, multiple: int = 1):
    """Shapes, dtypes and shardings of the parameters on the mesh, as a tree of `jax.ShapeDtypeStruct`.

    Args:
      multiple: as in `sharding.padded`.
    """
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(lambda: init(model, jax.random.key(0), batch_shards(mesh), multiple))
    placed = shardings(mesh, nn.get_partition_spec(boxed))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), placed)


@functools.cache
def unpadded_params(config: ModelConfig, device: jax.Device):
    """Shapes and dtypes of the parameters without padding, as `abstract_params` returns them for one device."""
    one = make_mesh(MeshConfig(1, 1, 1), [device])
    # The kernel of attention decides no shape, and this machine may lack that of the config.
    return abstract_params(LanguageModel(dataclasses.replace(config, attention="plain")), one)
