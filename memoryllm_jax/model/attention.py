"""Causal self-attention: the backends for whole sequences, and attention over a key-value cache.

Shapes: B sequences, T positions, H heads, K head size, C positions of a cache, G query heads for each key head,
R queries that share a key head.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import devices
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model.blocked_attention import MASKED, SAVED, blocked, einsum_float32
from memoryllm_jax.model.document_tiles import blocked_in_documents
from memoryllm_jax.model.sharding import spec

SPLASH_BLOCK = 512  # positions of a tile of the splash kernel
# Up to so many positions splash's backward pass is one kernel, which holds T / SPLASH_BLOCK copies of the queries'
# gradients: 2.3 GB for four heads at 32,768 positions. Above, it is two kernels.
_MOST_FUSED = 4096
_FIRST_SEGMENT = 64  # positions of the first segment of a cache that is stored in segments


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


def check_documents(backend: str, length: int) -> None:
    """Refuses sequences in which a backend cannot keep attention inside documents.

    Args:
      backend: as `resolve_backend` returns it.
      length: positions of a sequence.
    Raises: UserError.
    """
    if backend == "cudnn" and length % 2:
        # Of cuDNN's backward pass with a bias, which is how a mask reaches it. JAX checks the same.
        raise UserError(
            f"config.seq_len: expected an even number, as config.data.document_mask asks of cuDNN's attention, "
            f"found {length}"
        )


def skips_other_documents(backend: str) -> bool:
    """Whether a backend leaves out the scores between documents, or computes them and masks them."""
    return backend == "blocked"


def causal_attention(q_BTHK, k_BTHK, v_BTHK, backend: str, start_BT=None):
    """softmax(q k^T / sqrt(K)) v, where each position attends to itself and to earlier ones. Call it inside a mesh.

    Args:
      q_BTHK, k_BTHK, v_BTHK: queries, keys and values, with as many key heads as query heads.
      backend: as `resolve_backend` returns it, or `auto`.
      start_BT: int32, the position at which each position's document begins: earlier ones are masked too. None: 0.
    Returns: [B, T, H, K] in the dtype of q.
    """
    if backend == "auto":
        backend = resolve_backend(backend, q_BTHK.dtype.name, q_BTHK.shape[-1])
    qkv = spec("batch", None, "heads", None)
    if start_BT is None:
        kernel = {"plain": plain, "blocked": blocked, "cudnn": cudnn, "splash": splash}[backend]
        arguments, specs = (q_BTHK, k_BTHK, v_BTHK), (qkv, qkv, qkv)
    else:
        kernel = {"plain": plain, "blocked": blocked_in_documents, "cudnn": cudnn, "splash": splash}[backend]
        arguments, specs = (q_BTHK, k_BTHK, v_BTHK, start_BT), (qkv, qkv, qkv, spec("batch", None))
    # Each device computes its own sequences and heads. Without shard_map XLA would gather them, as it cannot split a
    # kernel. check_vma is off because the splash kernel does not say over which axes its results vary.
    return jax.shard_map(kernel, in_specs=specs, out_specs=qkv, check_vma=False)(*arguments)


def keep_results(primitive, *args, **params) -> bool:
    """The rule of remat policy `dots`: whether the backward pass keeps this primitive's results.

    It keeps products with weights and attention, and recomputes the rest.
    """
    named = jax.checkpoint_policies.save_only_these_names(SAVED)
    # JAX gives the results of its cuDNN call no checkpoint name, so the call is recognised by its own name.
    # tests/model/test_attention.py fails if JAX renames it.
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *args, **params)


class Cache(NamedTuple):
    """Keys and values of one layer's positions, or of a segment of them."""

    k_BHCK: jax.Array
    v_BHCK: jax.Array


def segments(capacity: int) -> list[int]:
    """Sizes of the segments of a cache: two of 64 positions, then each as large as all before; the last one is cut."""
    sizes, end = [], _FIRST_SEGMENT
    while (stored := sum(sizes)) < capacity:
        sizes.append(min(end, capacity) - stored)
        end *= 2
    return sizes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["segments"], meta_fields=["span"])
@dataclasses.dataclass(frozen=True)
class Reach:
    """How much of a cache attention reads: all of it, or a part in one of two ways. An argument of jitted functions.

    Attributes:
      span: the first positions, read at once; each span compiles anew. None: all.
      segments: int32 scalar, the first segments of a cache that is stored in segments, one after the other; all numbers
        share one compiled function. A result has the same bits for each number that suffices. None: not in segments.
    """

    span: int | None = None
    segments: jax.Array | np.ndarray | None = None


WHOLE = Reach()


class Past(NamedTuple):
    """Positions that a pass adds to a cache, and attends from.

    Attributes:
      cache: keys and values of the earlier positions; a list of segments if `reach` counts these.
      position_BT: int32, the new positions, consecutive in each sequence. Positions past the cache's end are not
        written; their results are arbitrary.
      reach: how much of the cache is read, at least up to the new positions.
      slot: int32 scalar, the sequence of the cache that the new positions continue; None where sequence b continues
        the cache's b-th. With a slot, all B new sequences are the same one.
    """

    cache: Cache | list[Cache]
    position_BT: jax.Array
    reach: Reach = WHOLE
    slot: jax.Array | None = None

    def attend(self, q_BTHK, new: Cache):
        """Writes the new positions to the cache, and attends from each over itself and the earlier ones.

        Args:
          q_BTHK: queries; their heads are G times the cache's.
          new: the keys and values of the new positions, [B, H, T, K].
        Returns: (attention in the shape and dtype of q_BTHK, the cache with the new positions).
        """
        B, T, heads, K = q_BTHK.shape
        H = new.k_BHCK.shape[1]
        # R: the queries that share a key head, those of its group in all T positions.
        q_BHRK = (q_BTHK * K**-0.5).reshape(B, T, H, -1, K).transpose(0, 2, 3, 1, 4).reshape(B, H, -1, K)
        position_BHR = jnp.tile(self.position_BT, (1, heads // H))[:, None]
        attend = self._attend_at_once if self.reach.segments is None else self._attend_in_segments
        part, cache = attend(q_BHRK, position_BHR, new)
        y_BHGTK = (part.sum_BHRK / part.weight_BHR1).astype(q_BTHK.dtype).reshape(B, H, -1, T, K)
        return y_BHGTK.transpose(0, 3, 1, 2, 4).reshape(q_BTHK.shape), cache

    # The written cache alone is read: XLA then updates a donated cache in place. It would copy the cache if something
    # read the earlier one after the write.

    def _attend_at_once(self, q_BHRK, position_BHR, new):
        cache = self._write(self.cache, new, self.position_BT)
        k_BHCK, v_BHCK = self._read(cache, self.reach.span or cache.k_BHCK.shape[2])
        return _attend(q_BHRK, k_BHCK, v_BHCK, position_BHR), cache

    def _attend_in_segments(self, q_BHRK, position_BHR, new):
        # A segment is an array of its own, because XLA for CPUs copies a slice of the cache before a product. Each
        # segment runs the same compiled code whatever the number of segments, and a masked one adds zeros: so the bits
        # do not depend on that number. They would on a longer span, for which exponentials and sums have other code.
        part, written, first = None, [], 0
        for number, old in enumerate(self.cache):
            size = old.k_BHCK.shape[2]
            at_BT = self.position_BT - first
            cache = self._write(old, new, jnp.where(at_BT < 0, size, at_BT))
            arguments = q_BHRK, *self._read(cache, size), position_BHR - first
            if part is None:
                part = _attend(*arguments)
            else:
                part = jax.lax.cond(
                    number < self.reach.segments, _merged_with_more, lambda part, *_: part, part, *arguments
                )
            written.append(cache)
            first += size
        return part, written

    def _write(self, cache, new, position_BT):
        """The cache with new positions; those past its end are dropped."""

        def put(cache_HCK, new_HTK, position_T):
            return cache_HCK.at[:, position_T].set(new_HTK, mode="drop")

        def write(cache_BHCK, new_BHTK):
            if self.slot is None:  # by vmap, so that a mesh's batch shards write theirs without communication
                return jax.vmap(put)(cache_BHCK, new_BHTK, position_BT)
            return cache_BHCK.at[self.slot, :, position_BT[0]].set(new_BHTK[0].swapaxes(0, 1), mode="drop")

        return Cache(*map(write, cache, new))

    def _read(self, cache, count):
        """The first `count` positions of the cache, for each of the B new sequences."""

        def read(x_BHCK):
            x_BHCK = x_BHCK[:, :, :count]
            if self.slot is None:
                return x_BHCK
            x_1HCK = jax.lax.dynamic_slice_in_dim(x_BHCK, self.slot, 1)
            return jnp.broadcast_to(x_1HCK, (len(self.position_BT), *x_1HCK.shape[1:]))

        return Cache(*map(read, cache))


class _Part(NamedTuple):
    """Attention of queries over a part of the positions.

    Attributes:
      top_BHR1: the largest score, MASKED if all positions are masked.
      weight_BHR1: sum over the positions of exp(score - top).
      sum_BHRK: sum of these exponentials times the values.
    """

    top_BHR1: jax.Array
    weight_BHR1: jax.Array
    sum_BHRK: jax.Array

    def merge(self, other: "_Part") -> "_Part":
        """Attention over two parts. Where all of `other` is masked, it is this part to the bit."""
        top_BHR1 = jnp.maximum(self.top_BHR1, other.top_BHR1)
        mine, its = jnp.exp(self.top_BHR1 - top_BHR1), jnp.exp(other.top_BHR1 - top_BHR1)
        return _Part(
            top_BHR1, self.weight_BHR1 * mine + other.weight_BHR1 * its, self.sum_BHRK * mine + other.sum_BHRK * its
        )


def _attend(q_BHRK, k_BHCK, v_BHCK, position_BHR) -> _Part:
    """Attention of queries at these positions over the positions 0 to C - 1."""
    is_past = jnp.arange(k_BHCK.shape[2]) <= position_BHR[..., None]
    s_BHRC = jnp.where(is_past, einsum_float32("bhrk,bhck->bhrc", q_BHRK, k_BHCK), MASKED)
    top_BHR1 = s_BHRC.max(-1, keepdims=True)
    p_BHRC = jnp.where(is_past, jnp.exp(s_BHRC - top_BHR1), 0)
    y_BHRK = einsum_float32("bhrc,bhck->bhrk", p_BHRC.astype(v_BHCK.dtype), v_BHCK)
    return _Part(top_BHR1, p_BHRC.sum(-1, keepdims=True), y_BHRK)


def _merged_with_more(part: _Part, q_BHRK, k_BHCK, v_BHCK, position_BHR) -> _Part:
    """A part, and that of further positions."""
    return part.merge(_attend(q_BHRK, k_BHCK, v_BHCK, position_BHR))


def plain(q_BTHK, k_BTHK, v_BTHK, start_BT=None):
    """JAX's own attention, which holds all scores [B, H, T, T] at once."""
    mask = _in_document(start_BT)
    return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=mask, is_causal=True, implementation="xla")


def _in_document(start_BT):
    """Mask [B, 1, T, T]: whether a key is no earlier than the query's document; None without documents."""
    if start_BT is None:
        return None
    return (jnp.arange(start_BT.shape[1]) >= start_BT[..., None])[:, None]


def cudnn(q_BTHK, k_BTHK, v_BTHK, start_BT=None):
    """cuDNN's flash attention. It needs head sizes that are multiples of 8, so heads are padded with zeros.

    `jax.nn.dot_product_attention` (jax 0.10 to 0.12) passes the mask of documents to cuDNN as a bias [B, 1, T, T] in
    bfloat16. cuDNN then skips keys after the query, but not those of other documents. It could skip these too if it
    were given the documents' offsets; but JAX has no public function for that, and only Hopper and later support it.
    """
    K = q_BTHK.shape[-1]
    q = _pad_head_size(q_BTHK, 8)
    k = _pad_head_size(k_BTHK, 8)
    v = _pad_head_size(v_BTHK, 8)
    mask = _in_document(start_BT)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn", scale=K**-0.5)
    return out[..., :K]


def splash(q_BTHK, k_BTHK, v_BTHK, start_BT=None, block: int = SPLASH_BLOCK, interpret: bool = False):
    """JAX's flash attention for TPUs.

    Sequences are padded at their end, where no real position attends. Head sizes are padded to a multiple of 64, which
    costs nothing, as a TPU stores rows of 128 numbers. Documents are told apart by segment ids: their scores are
    computed all the same, and masked.

    Args:
      start_BT: where each position's document begins, or None.
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
    # heads of one; but not where sequences have segment ids of their own.
    heads = B * H if start_BT is None else H
    attend = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(tiles, block), use_fused_bwd_kernel=is_fused),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def as_heads(x_BTHK):
        x = _pad_head_size(x_BTHK, 64).swapaxes(1, 2).reshape(B * H, T, -1)
        return jnp.pad(x, [(0, 0), (0, length - T), (0, 0)])

    qkv = as_heads(q_BTHK * K**-0.5), as_heads(k_BTHK), as_heads(v_BTHK)
    if start_BT is None:
        out = attend(*qkv)
    else:
        id_BT = jnp.pad(start_BT, [(0, 0), (0, length - T)], constant_values=T)
        out = jax.vmap(attend)(*(x.reshape(B, H, length, -1) for x in qkv), splash_attention.SegmentIds(id_BT, id_BT))
    return out.reshape(B * H, length, -1)[:, :T, :K].reshape(B, H, T, K).swapaxes(1, 2)


def _pad_head_size(x_BTHK, multiple):
    return jnp.pad(x_BTHK, [(0, 0), (0, 0), (0, 0), (0, -x_BTHK.shape[-1] % multiple)])
