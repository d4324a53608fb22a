"""Causal self-attention by backend name. An unavailable backend is an error, never a fallback."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model.blocked_attention import MASKED, SAVED, blocked, einsum
from memoryllm_jax.model.sharding import spec

SPLASH_BLOCK = 512


def resolve_backend(name: str, dtype: str, platform: str | None = None) -> str:
    """The backend that `auto` stands for, here or on another platform; a backend that cannot run there is refused.

    Args:
      platform: "cpu", "cuda" (an NVIDIA GPU that cuDNN attends on) or "tpu"; None: the one of this machine.
    Raises: UserError.
    """
    platform = _this_platform() if platform is None else platform
    if name == "auto":
        flash = {"tpu": "splash", "cuda": "cudnn" if dtype == "bfloat16" else "blocked"}
        return flash.get(platform, "blocked")
    needs = {"cudnn": ("cuda", "an NVIDIA GPU of compute capability 8 or more"), "splash": ("tpu", "a TPU")}
    if name in needs and platform != needs[name][0]:
        raise UserError(f"config.model.attention: {name} needs {needs[name][1]}, found {platform}")
    if name == "cudnn" and dtype != "bfloat16":
        raise UserError(f"config.model.attention: cudnn needs config.model.dtype bfloat16, found {dtype}")
    return name


def _this_platform():
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    is_cuda = "cuda" in device.client.platform_version
    return "cuda" if is_cuda and float(device.compute_capability) >= 8 else device.device_kind


def causal_attention(q_BTHK, k_BTHK, v_BTHK, backend: str):
    """softmax(q k^T / sqrt(K)) v over earlier positions and itself; each device works on its rows and heads.

    backend: one that `resolve_backend` gave, or `auto`, which is asked for here.
    """
    if backend == "auto":
        backend = resolve_backend(backend, q_BTHK.dtype.name)
    kernel = {"plain": plain, "blocked": blocked, "cudnn": cudnn, "splash": splash}[backend]
    qkv = spec("batch", None, "heads", None)
    return jax.shard_map(kernel, in_specs=(qkv, qkv, qkv), out_specs=qkv, check_vma=False)(q_BTHK, k_BTHK, v_BTHK)


def keep_results(primitive, *args, **params) -> bool:
    """Remat policy `dots`: the backward pass has every product and attention's results, so that none is made twice."""
    named = jax.checkpoint_policies.save_only_these_names(SAVED)
    # cuDNN's own results bear no name; the test of the lowered step fails should JAX rename the call.
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *args, **params)


class Cache(NamedTuple):
    """Keys and values of one layer's earlier positions, for attention of one new position a sequence.

    Each of its heads serves G of the query's.

    Attending and writing are for two jitted functions: in one, XLA copies a cache that it reads and updates.
    """

    k_BHSK: jax.Array
    v_BHSK: jax.Array

    def attend(self, q_BHK, k_BHK, v_BHK, position_B):
        """Attention of the new positions over what came before, in the cache, and over themselves: as q_BHK."""
        B, H, S, K = self.k_BHSK.shape
        q_BHGK = (q_BHK * K**-0.5).reshape(B, H, -1, K)
        k_BH1K, v_BH1K = k_BHK[:, :, None], v_BHK[:, :, None]
        earlier = jnp.arange(S) < position_B[:, None, None, None]
        s_BHGS = jnp.where(earlier, einsum("bhgk,bhsk->bhgs", q_BHGK, self.k_BHSK), MASKED)
        own_BHG1 = (q_BHGK * k_BH1K).sum(-1, keepdims=True, dtype=jnp.float32)
        top = jnp.maximum(s_BHGS.max(-1, keepdims=True), own_BHG1)
        p_BHGS, p_own = jnp.exp(s_BHGS - top), jnp.exp(own_BHG1 - top)
        y = einsum("bhgs,bhsk->bhgk", p_BHGS.astype(self.v_BHSK.dtype), self.v_BHSK) + p_own * v_BH1K
        return (y / (p_BHGS.sum(-1, keepdims=True) + p_own)).astype(q_BHK.dtype).reshape(q_BHK.shape)

    def write(self, new: "Cache", position_B) -> "Cache":
        """With the keys and values [B, H, 1, K] of each sequence's new position."""

        def put(cache_HSK, new_H1K, position):
            return jax.lax.dynamic_update_slice(cache_HSK, new_H1K, (0, position, 0))

        return Cache(*(jax.vmap(put)(old, added, position_B) for old, added in zip(self, new)))


def plain(q_BTHK, k_BTHK, v_BTHK):
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="xla")


def _pad_heads(x, multiple):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def cudnn(q_BTHK, k_BTHK, v_BTHK):
    """cuDNN flash attention; it wants head sizes that are multiples of 8, so zeros fill the rest."""
    K = q_BTHK.shape[-1]
    q, k, v = (_pad_heads(x, 8) for x in (q_BTHK, k_BTHK, v_BTHK))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", scale=K**-0.5)
    return out[..., :K]


def splash(q_BTHK, k_BTHK, v_BTHK):
    """JAX's flash attention for TPUs, with the heads of all sequences as those of one.

    Zeros fill the sequence up to whole blocks, which no earlier position sees, and heads up to a multiple of 64,
    which is free: a TPU's memory holds them in rows of 128.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # half a second that only a TPU needs

    B, T, H, K = q_BTHK.shape
    length = T + -T % 128
    block = math.gcd(length, SPLASH_BLOCK)
    blocks = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), block)
    attend = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * (B * H)),
        block_sizes=splash_attention.BlockSizes(**blocks, use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
    )

    def heads(x):
        x = _pad_heads(x, 64).swapaxes(1, 2).reshape(B * H, T, -1)
        return jnp.pad(x, [(0, 0), (0, length - T), (0, 0)])

    out = attend(heads(q_BTHK * K**-0.5), heads(k_BTHK), heads(v_BTHK))[:, :T, :K]
    return out.reshape(B, H, T, K).swapaxes(1, 2)
