"""The digest of a model's weights by which modeling_memoryllm.py recognises the ToL files that were made from them."""

import hashlib
import json
import math

import torch

_ROWS_HASHED = 16384  # rows of a matrix per pair of hashes


def decoder_digest(model):
    """The digest of the weights outside the token memory, as ToL files hold it. `Digest` of memoryllm_jax defines it.

    Values are rounded to bfloat16 first. The memory needed is that of a few blocks.

    Args:
      model: MemoryLLMForCausalLM, or MemoryLLMModel with tied embeddings.
    Raises: ValueError for weights whose values are not at hand: quantized, offloaded, or without the head.
    """
    hashes = {}
    for name, weights in _decoder_weights(model).items():
        hashes[name] = [[list(shape), *_hashes(name, weight, shape)] for weight, shape in weights]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _decoder_weights(model):
    """{name in memoryllm_jax: [(weight, its shape there), one per layer]}, in the order in which they are digested."""
    c, decoder = model.config, model.base_model
    if not c.tie_word_embeddings and decoder is model:
        raise ValueError("tol: expected a model with its head, as AutoModelForCausalLM loads, found one without")
    width, head_dim = c.hidden_size, decoder.layers[0].self_attn.head_dim
    out = {}
    if c.tie_word_embeddings:
        out["embedding"] = [(decoder.embed_tokens.weight, (c.vocab_size, width))]
    out["final_norm/scale"] = [(decoder.norm.weight, (width,))]
    if not c.tie_word_embeddings:
        out["head"] = [(model.lm_head.weight, (c.vocab_size, width))]

    def of_layers(name, weight_of, *shape):
        out[f"layers/{name}"] = [(weight_of(layer).weight, shape) for layer in decoder.layers]

    of_layers("attention/k", lambda layer: layer.self_attn.k_proj, width, c.num_key_value_heads, head_dim)
    if c.qk_norm:
        of_layers("attention/k_norm/scale", lambda layer: layer.self_attn.k_norm, head_dim)
    of_layers("attention/out", lambda layer: layer.self_attn.o_proj, c.num_attention_heads, head_dim, width)
    of_layers("attention/q", lambda layer: layer.self_attn.q_proj, width, c.num_attention_heads, head_dim)
    if c.qk_norm:
        of_layers("attention/q_norm/scale", lambda layer: layer.self_attn.q_norm, head_dim)
    of_layers("attention/v", lambda layer: layer.self_attn.v_proj, width, c.num_key_value_heads, head_dim)
    of_layers("attention_norm/scale", lambda layer: layer.input_layernorm, width)
    if c.intermediate_size:
        of_layers("ffn/down", lambda layer: layer.mlp.down_proj, c.intermediate_size, width)
        of_layers("ffn/gate", lambda layer: layer.mlp.gate_proj, width, c.intermediate_size)
        of_layers("ffn/up", lambda layer: layer.mlp.up_proj, width, c.intermediate_size)
        of_layers("ffn_norm/scale", lambda layer: layer.post_attention_layernorm, width)
    return out


@torch.no_grad()
def _hashes(name, weight, shape):
    """Two 32-bit hashes, of different seeds, for each _ROWS_HASHED rows of a weight.

    Args:
      name: as in `_decoder_weights`, for error messages.
      weight: as torch holds it: [outputs, inputs], or one dimension.
      shape: in memoryllm_jax, where a layer's matrix is [inputs, outputs] and heads may be an axis of their own.
    """
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()  # the whole of a weight that tensor parallelism has split
    if weight.device.type == "meta" or not weight.is_floating_point() or weight.numel() != math.prod(shape):
        found = f"{weight.dtype} {list(weight.shape)} on {weight.device}"
        raise ValueError(f"tol: expected the values of {name}, to compare them with the file's digest, found {found}")
    is_transposed = name.startswith("layers/") and weight.ndim == 2
    stored = weight if weight.ndim == 2 else weight[None]
    rows_axis = 1 if is_transposed else 0
    columns = stored.shape[1 - rows_axis]
    # Rows are those of the first axis in memoryllm_jax. In the output projection that axis is the heads alone.
    rows_hashed = _ROWS_HASHED if weight.ndim == 1 else _ROWS_HASHED * (stored.shape[rows_axis] // shape[0])
    out = []
    for part in stored.split(rows_hashed, rows_axis):
        # Elements are numbered row by row within a part.
        strides = (1, columns) if is_transposed else (columns, 1)
        out += _part_hashes(part, strides)
    return out


def _part_hashes(part, strides):
    """The two hashes of a matrix whose element [i, j] has the number i * strides[0] + j * strides[1]."""
    # Few elements at a time stay in a processor's cache, and torch computes so few in one thread. Others have no cache.
    elements = 1 << 15 if part.device.type == "cpu" else 1 << 24
    lines = max(1, elements // part.shape[1])
    across = _int32(torch.arange(part.shape[1], device=part.device) * strides[1])
    sums = [0, 0]
    buffers = [torch.empty(0, dtype=torch.int32, device=part.device) for _ in range(3)]
    for first in range(0, part.shape[0], lines):
        block = part[first : first + lines]
        # Buffers are used again, as new memory for every result would take longer than the arithmetic.
        bits, h, scratch = (buffer.resize_(block.shape) for buffer in buffers)
        bits.copy_(block.to(torch.bfloat16).view(torch.int16)).bitwise_and_(0xFFFF)
        down = torch.arange(first, first + len(block), device=part.device) * strides[0]
        for seed in (1, 2):
            torch.add(_int32(down + seed)[:, None], across, out=h)
            sums[seed - 1] += _mixed_sum(bits, h, scratch)
    return [total % 2**32 for total in sums]


def _int32(x):
    """Integers modulo 2^32, as int32. torch has no multiplication of uint32; that of int32 has the same bits."""
    return (x & 0xFFFFFFFF).to(torch.int32)


def _mixed_sum(bits, h, scratch):
    """The sum of MurmurHash3's finalizer over the bits of each element and its place. `h` holds the places."""

    def mix(shift):
        # The mask makes it a shift of an unsigned number.
        torch.bitwise_right_shift(h, shift, out=scratch).bitwise_and_(0xFFFFFFFF >> shift)
        h.bitwise_xor_(scratch)

    h.mul_(0x9E3779B1 - 2**32).bitwise_xor_(bits)
    mix(16)
    h.mul_(0x85EBCA6B - 2**32)
    mix(13)
    h.mul_(0xC2B2AE35 - 2**32)
    mix(16)
    return int(h.sum(dtype=torch.int64))
