"""Causal self-attention: the backends for whole sequences, and attention of one position over a key-value cache.

Shapes: B sequences, T positions, H heads, K head size, C positions of a cache, G query heads for each key head.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryllm_jax.common import devices
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model.blocked_attention import MASKED, SAVED, blocked, einsum_float32
from memoryllm_jax.model.sharding import spec

SPLASH_BLOCK = 512  # positions of a tile of the splash kernel
# Up to so many positions splash's backward pass is one kernel, which holds T / SPLASH_BLOCK copies of the queries'
# gradients: 2.3 GB for four heads at 32,768 positions. Above, it is two kernels.
_MOST_FUSED = 4096


class Accelerator(NamedTuple):
    """What decides which attention kernels run.

    Attributes:
      platform: "cuda" for NVIDIA's GPUs, else JAX's name, such as "cpu", "tpu" and "gpu" for other makers' GPUs.
      title: its name in error messages.
      capability: CUDA compute capability, (major, minor); None if it has none.
    """

    platform: str
    title: str
    capability: tuple[int, int] | None = None

    @property
    def has_cudnn(self) -> bool:
        """Whether cuDNN's attention runs on it."""
        return self.platform == "cuda" and self.capability >= (8, 0)

    @property
    def largest_cudnn_head(self) -> int:
        """The largest head size that cuDNN's attention can train with, by NVIDIA's support matrix."""
        # https://docs.nvidia.com/cudnn/operations/Attention, rows "Bprop": 256 on Hopper alone. JAX checks the same.
        return 256 if self.capability[0] == 9 else 128


def this_accelerator() -> Accelerator:
    """The first of this machine's devices."""
    device = devices.find()[0]
    # JAX calls AMD's GPUs "gpu" too. Their compute_capability is a name such as gfx942.
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return Accelerator(device.platform, device.device_kind)
    major, minor = device.compute_capability.split(".")
    return Accelerator("cuda", device.device_kind, (int(major), int(minor)))


def resolve_backend(name: str, dtype: str, head_dim: int, accelerator: Accelerator | None = None) -> str:
    """Checks that a backend runs on an accelerator, and replaces `auto` by the fastest one that does.

    Args:
      name: one of config.ATTENTION_BACKENDS.
      dtype: dtype of the computation.
      head_dim: numbers of a head.
      accelerator: where it shall run; None: on this machine.
    Returns: the name of a backend other than `auto`.
    Raises: UserError if the backend does not run there, or not with such heads.
    """
    where = accelerator or this_accelerator()
    if name == "auto":
        if where.platform == "tpu":
            return "splash"
        name = "cudnn" if where.has_cudnn and dtype == "bfloat16" else "blocked"
    if name == "splash" and where.platform != "tpu":
        raise UserError(f"config.model.attention: splash needs a TPU, found {where.title}")
    if name == "cudnn":
        _check_cudnn(where, dtype, head_dim)
    return name


def _check_cudnn(where, dtype, head_dim):
    if not where.has_cudnn:
        raise UserError(
            f"config.model.attention: cudnn needs an NVIDIA GPU of compute capability 8 or more, found {where.title}"
        )
    if dtype != "bfloat16":
        raise UserError(f"config.model.attention: cudnn needs config.model.dtype bfloat16, found {dtype}")
    if head_dim > where.largest_cudnn_head:
        # No fallback: the other backend is several times slower on a GPU, which must be the user's choice.
        raise UserError(
            f"config.model.heads: expected heads of at most {where.largest_cudnn_head} numbers for cuDNN's attention "
            f"on {where.title}, found {head_dim}; config.model.attention=blocked or the dtype float32 does without "
            "cuDNN, more slowly"
        )


def causal_attention(q_BTHK, k_BTHK, v_BTHK, backend: str):
    """softmax(q k^T / sqrt(K)) v, where each position attends to itself and to earlier ones. Call it inside a mesh.

    Args:
      q_BTHK, k_BTHK, v_BTHK: queries, keys and values, with as many key heads as query heads.
      backend: as `resolve_backend` returns it, or `auto`.
    Returns: [B, T, H, K] in the dtype of q.
    """
    if backend == "auto":
        backend = resolve_backend(backend, q_BTHK.dtype.name, q_BTHK.shape[-1])
    kernel = {"plain": plain, "blocked": blocked, "cudnn": cudnn, "splash": splash}[backend]
    qkv = spec("batch", None, "heads", None)
    # Each device computes its own sequences and heads. Without shard_map XLA would gather them, as it cannot split a
    # kernel. check_vma is off because the splash kernel does not say over which axes its results vary.
    return jax.shard_map(kernel, in_specs=(qkv, qkv, qkv), out_specs=qkv, check_vma=False)(q_BTHK, k_BTHK, v_BTHK)


def keep_results(primitive, *args, **params) -> bool:
    """The rule of remat policy `dots`: whether the backward pass keeps this primitive's results.

    It keeps products with weights and attention, and recomputes the rest.
    """
    named = jax.checkpoint_policies.save_only_these_names(SAVED)
    # JAX gives the results of its cuDNN call no checkpoint name, so the call is recognised by its own name.
    # tests/model/test_attention.py fails if JAX renames it.
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *args, **params)


class Cache(NamedTuple):
    """Keys and values of one layer's positions, for attention of one new position of each sequence.

    Call `write` first and `attend` on its result: XLA then updates a donated cache in place. It would copy the cache if
    a function read the earlier one after `write`.
    """

    k_BHCK: jax.Array
    v_BHCK: jax.Array

    def write(self, new: "Cache", position_B) -> "Cache":
        """The cache with one more position of each sequence.

        Args:
          new: the keys and values of that position, [B, H, 1, K].
          position_B: int32, where each sequence's go.
        """

        def put(cache_HCK, new_H1K, position):
            return jax.lax.dynamic_update_slice(cache_HCK, new_H1K, (0, position, 0))

        return Cache(*(jax.vmap(put)(old, added, position_B) for old, added in zip(self, new)))

    def attend(self, q_BHK, position_B):
        """Attention of one position of each sequence over itself and over the cache's earlier positions.

        Args:
          q_BHK: queries; their heads are G times the cache's.
          position_B: int32, the positions of the queries, whose keys and values are in the cache.
        Returns: in the shape and dtype of q_BHK.
        """
        B, H, C, K = self.k_BHCK.shape
        q_BHGK = (q_BHK * K**-0.5).reshape(B, H, -1, K)
        is_past = jnp.arange(C) <= position_B[:, None, None, None]
        s_BHGC = jnp.where(is_past, einsum_float32("bhgk,bhck->bhgc", q_BHGK, self.k_BHCK), MASKED)
        p_BHGC = jnp.exp(s_BHGC - s_BHGC.max(-1, keepdims=True))
        y_BHGK = einsum_float32("bhgc,bhck->bhgk", p_BHGC.astype(self.v_BHCK.dtype), self.v_BHCK)
        return (y_BHGK / p_BHGC.sum(-1, keepdims=True)).astype(q_BHK.dtype).reshape(q_BHK.shape)


def plain(q_BTHK, k_BTHK, v_BTHK):
    """JAX's own attention, which holds all scores [B, H, T, T] at once."""
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="xla")


def cudnn(q_BTHK, k_BTHK, v_BTHK):
    """cuDNN's flash attention. It needs head sizes that are multiples of 8, so heads are padded with zeros."""
    K = q_BTHK.shape[-1]
    q = _pad_head_size(q_BTHK, 8)
    k = _pad_head_size(k_BTHK, 8)
    v = _pad_head_size(v_BTHK, 8)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", scale=K**-0.5)
    return out[..., :K]


def splash(q_BTHK, k_BTHK, v_BTHK, block: int = SPLASH_BLOCK, interpret: bool = False):
    """JAX's flash attention for TPUs.

    Sequences are padded at their end, where no real position attends. Head sizes are padded to a multiple of 64, which
    costs nothing, as a TPU stores rows of 128 numbers.

    Args:
      block: most positions of a tile, of its queries and of its keys.
      interpret: whether to run in Pallas' interpreter, which works on any platform.
    """
    # Imported here because the import takes half a second, which only TPUs need.
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, T, H, K = q_BTHK.shape
    length = -(-T // 128) * 128  # the kernel needs a multiple of 128
    block = math.gcd(length, block)  # and tiles that divide it
    is_fused = length <= _MOST_FUSED
    tiles = ["block_q", "block_kv", "block_q_dkv", "block_kv_dkv"]
    if not is_fused:
        tiles += ["block_q_dq", "block_kv_dq"]
    # The kernel takes the heads of one sequence. Heads do not see each other, so those of all sequences are passed as
    # heads of one.
    attend = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * (B * H)),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(tiles, block), use_fused_bwd_kernel=is_fused),
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
