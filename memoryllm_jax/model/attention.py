"""Causal self-attention by backend name, and over a key-value cache. An unavailable backend is an error.

Shapes: B sequences, T positions, H heads, K head size, C positions of a cache, G query heads of a key head.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model.blocked_attention import MASKED, SAVED, blocked, einsum_float32
from memoryllm_jax.model.sharding import spec

SPLASH_BLOCK = 512  # positions


def resolve_backend(name: str, dtype: str, platform: str | None = None) -> str:
    """The backend's name, with `auto` replaced by the fastest that runs on the platform.

    Args:
      name: one of config.ATTENTION_BACKENDS.
      dtype: of the computation.
      platform: "cpu", "cuda" (an NVIDIA GPU that cuDNN's attention supports) or "tpu"; None: that of this machine.
    Raises: UserError if the backend does not run there.
    """
    platform = _this_platform() if platform is None else platform
    if name == "auto":
        if platform == "tpu":
            return "splash"
        return "cudnn" if platform == "cuda" and dtype == "bfloat16" else "blocked"
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
    # ROCm's devices are "gpu" too, and name architectures where CUDA's have a compute capability.
    is_cuda = "cuda" in device.client.platform_version
    return "cuda" if is_cuda and float(device.compute_capability) >= 8 else device.device_kind


def causal_attention(q_BTHK, k_BTHK, v_BTHK, backend: str):
    """softmax(q k^T / sqrt(K)) v, where each position attends to itself and earlier ones.

    Each device computes its own sequences and heads: XLA cannot split the kernels by itself.

    Args:
      backend: as `resolve_backend` returns it, or `auto`.
    """
    if backend == "auto":
        backend = resolve_backend(backend, q_BTHK.dtype.name)
    kernel = {"plain": plain, "blocked": blocked, "cudnn": cudnn, "splash": splash}[backend]
    qkv = spec("batch", None, "heads", None)
    return jax.shard_map(kernel, in_specs=(qkv, qkv, qkv), out_specs=qkv, check_vma=False)(q_BTHK, k_BTHK, v_BTHK)


def keep_results(primitive, *args, **params) -> bool:
    """Remat policy `dots`: the backward pass recomputes neither products with weights nor attention."""
    named = jax.checkpoint_policies.save_only_these_names(SAVED)
    # cuDNN's own results bear no name; the test of the lowered step fails should JAX rename the call.
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *args, **params)


class Cache(NamedTuple):
    """Keys and values of one layer's earlier positions, for attention of one new position of each sequence.

    Attend and write in two jitted functions: in one, XLA copies a cache that it reads and updates.
    """

    k_BHCK: jax.Array
    v_BHCK: jax.Array

    def attend(self, q_BHK, k_BHK, v_BHK, position_B):
        """Attention of each new position over the cache's earlier positions and over itself.

        Args:
          q_BHK: queries, G of them for each of the cache's heads.
          k_BHK, v_BHK: key and value of the new positions.
          position_B: the cache's positions below it are the earlier ones.
        Returns: as q_BHK.
        """
        B, H, C, K = self.k_BHCK.shape
        q_BHGK = (q_BHK * K**-0.5).reshape(B, H, -1, K)
        k_BH1K, v_BH1K = k_BHK[:, :, None], v_BHK[:, :, None]
        is_earlier = jnp.arange(C) < position_B[:, None, None, None]
        s_BHGC = jnp.where(is_earlier, einsum_float32("bhgk,bhck->bhgc", q_BHGK, self.k_BHCK), MASKED)
        own_BHG1 = (q_BHGK * k_BH1K).sum(-1, keepdims=True, dtype=jnp.float32)
        top_BHG1 = jnp.maximum(s_BHGC.max(-1, keepdims=True), own_BHG1)
        p_BHGC, p_own_BHG1 = jnp.exp(s_BHGC - top_BHG1), jnp.exp(own_BHG1 - top_BHG1)
        y_BHGK = einsum_float32("bhgc,bhck->bhgk", p_BHGC.astype(self.v_BHCK.dtype), self.v_BHCK) + p_own_BHG1 * v_BH1K
        total_BHG1 = p_BHGC.sum(-1, keepdims=True) + p_own_BHG1
        return (y_BHGK / total_BHG1).astype(q_BHK.dtype).reshape(q_BHK.shape)

    def write(self, new: "Cache", position_B) -> "Cache":
        """The cache with the keys and values [B, H, 1, K] of one position of each sequence put in."""

        def put(cache_HCK, new_H1K, position):
            return jax.lax.dynamic_update_slice(cache_HCK, new_H1K, (0, position, 0))

        return Cache(*(jax.vmap(put)(old, added, position_B) for old, added in zip(self, new)))


def plain(q_BTHK, k_BTHK, v_BTHK):
    """JAX's own attention, which holds [B, H, T, T] scores."""
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="xla")


def cudnn(q_BTHK, k_BTHK, v_BTHK):
    """cuDNN's flash attention. It wants head sizes that are multiples of 8, so zeros fill them up."""
    K = q_BTHK.shape[-1]
    q, k, v = (_pad_head_size(x, 8) for x in (q_BTHK, k_BTHK, v_BTHK))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", scale=K**-0.5)
    return out[..., :K]


def splash(q_BTHK, k_BTHK, v_BTHK, block: int = SPLASH_BLOCK, interpret: bool = False):
    """JAX's flash attention for TPUs.

    Zeros fill the sequence up to whole blocks, at its end, where no real position sees them, and the head size up to a
    multiple of 64, which costs nothing, as a TPU's memory holds rows of 128.

    Args:
      block: positions of a tile's queries and keys.
      interpret: run in Pallas' interpreter, on any platform.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # half a second, which only TPUs need

    B, T, H, K = q_BTHK.shape
    length = T + -T % 128
    block = math.gcd(length, block)
    blocks = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), block)
    # The kernel takes one sequence. The heads of all sequences attend apart, so they pass for those of one.
    attend = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * (B * H)),
        block_sizes=splash_attention.BlockSizes(**blocks, use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def as_heads(x_BTHK):
        x = _pad_head_size(x_BTHK, 64).swapaxes(1, 2).reshape(B * H, T, -1)
        return jnp.pad(x, [(0, 0), (0, length - T), (0, 0)])

    out = attend(as_heads(q_BTHK * K**-0.5), as_heads(k_BTHK), as_heads(v_BTHK))[:, :T, :K]
    return out.reshape(B, H, T, K).swapaxes(1, 2)


def _pad_head_size(x_BTHK, multiple):
    return jnp.pad(x_BTHK, [(0, 0), (0, 0), (0, 0), (0, -x_BTHK.shape[-1] % multiple)])
