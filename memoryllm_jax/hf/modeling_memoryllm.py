"""MemoryLLM and Flex-MemoryLLM for transformers (5.0 or newer), with FFN-M computed live or looked up in a ToL file.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True, tol="tol.safetensors")

X_{l+1} = X_l + Attn(N1(X_l)) [+ FFN-C(N2(X_l))] + FFN-M(NM(X_0)), as in Jaiswal et al. 2026 (arXiv 2602.00398).
Attention, norms and rotary embedding are those of transformers' Llama. `tol` is a file of token-wise lookups (ToL) that
`memoryllm_jax.precompute` wrote. With it, FFN-M and an untied input embedding are not loaded: their rows are read from
the file. That needs the package xxhash.

From top to bottom: the model; saving and loading with a ToL file; the digest that ties the file to the weights; the
reader of the file, which docs/tol.md of memoryllm_jax specifies.
"""

import hashlib
import itertools
import json
import math
import os
import re
import weakref
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

try:  # transformers asks for every package imported outside of `try`, and only ToL files need this one
    import xxhash
except ImportError:
    xxhash = None


class MemoryLLMConfig(LlamaConfig):
    """Llama's settings and those of the token memory.

    `intermediate_size` is the width of FFN-C; 0 means that there is no FFN-C.

    Attributes:
      memory_size: width of FFN-M.
      beta: FFN-C has beta h^2 of the FFNs' 8 h^2 parameters, where h is the model's width.
      compute_input: the input of FFN-C: `block_input` (X_l) or `after_attention` (X_l + Attn(N1(X_l))).
      norm: `rmsnorm` or `layernorm`.
      float16_digests: {digest of the decoder rounded to float16: its digest before that}. By it, a ToL file is
        recognised from weights that were exported or loaded in float16, as the file holds the second.
      tol: path of a ToL file; None computes FFN-M live. It is not saved, as it belongs to one machine.
    """

    model_type = "memoryllm"
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | {
        "layers.*.memory.gate_proj": "colwise",
        "layers.*.memory.up_proj": "colwise",
        "layers.*.memory.down_proj": "rowwise",
    }
    # A later pipeline stage receives the hidden states alone, and FFN-M of its layers reads X_0.
    base_model_pp_plan = None

    memory_size: int = 0
    beta: float = 0.0
    compute_input: str = "block_input"
    norm: str = "rmsnorm"
    float16_digests: dict | None = None
    tol: str | None = None

    def to_dict(self):
        """The settings that are saved: all but the path of the ToL file."""
        settings = super().to_dict()
        settings.pop("tol", None)
        return settings


def make_norm(config):
    if config.norm == "layernorm":
        return nn.LayerNorm(config.hidden_size, config.rms_norm_eps, bias=False)
    return LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class TokenMemory(nn.Module):
    """FFN-M_l(NM_l(X_0)) of one layer."""

    def __init__(self, config):
        super().__init__()
        self.norm = make_norm(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.memory_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.memory_size, bias=False)
        self.down_proj = nn.Linear(config.memory_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()  # a module, as in LlamaMLP, so that vLLM finds the pattern that it fuses

    def forward(self, x0):
        query = self.norm(x0)
        return self.down_proj(self.act_fn(self.gate_proj(query)) * self.up_proj(query))


class MemoryLLMDecoderLayer(GradientCheckpointingLayer):
    """One decoder layer: attention, FFN-C where there is one, and FFN-M, live or looked up."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.after_attention = config.compute_input == "after_attention"
        self.input_layernorm = make_norm(config)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config) if config.intermediate_size else None
        self.mlp = LlamaMLP(config) if config.intermediate_size else None
        self.memory = TokenMemory(config) if config.tol is None else None

    def __call__(self, hidden_states, x0=None, rows=None, **kwargs):
        # Llama's forward passes x0 by keyword. Reentrant checkpointing takes gradients of positional arguments alone.
        return super().__call__(hidden_states, x0, rows, **kwargs)

    def forward(self, hidden_states, x0=None, rows=None, **kwargs):
        """Computes X_{l+1} [B, T, D].

        Args:
          hidden_states: X_l [B, T, D].
          x0: X_0 [B, T, D], which live FFN-M reads.
          rows: FFN-M outputs of all layers [B, T, L, D] from a ToL file; None computes this layer's live.
        """
        out = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        if self.mlp is not None:
            source = out if self.after_attention else hidden_states
            out = out + self.mlp(self.post_attention_layernorm(source))
        memory = self.memory(x0) if rows is None else rows[:, :, self.layer_idx]
        return out + memory


class WithTol:
    """Loading and saving of a model whose FFN-M a ToL file may replace."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers'. A ToL file that was made from other weights is refused.

        Raises: ValueError for a ToL file that is damaged or does not belong to the weights.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple, if output_loading_info is asked for
        if model.base_model.tol is not None:
            model.check_tol()
            source = model.config.name_or_path
            # An absolute path, as the working directory may be another one when the model is saved.
            model._source = os.path.abspath(source) if os.path.isdir(source) else source
            model._source_options = {name: kwargs[name] for name in _SOURCE_OPTIONS if name in kwargs}
        return loaded

    def check_tol(self):
        """Checks that the ToL file was made from this model's weights; before that, no row is used.

        `from_pretrained` calls it. Raises: ValueError.
        """
        decoder = self.base_model
        expected, found = decoder_digest(self), decoder.tol.decoder_digest
        if found not in (expected, (self.config.float16_digests or {}).get(expected)):
            raise ValueError(
                f"{decoder.tol.path}: decoder_digest: expected {expected}, that of the model's weights, found {found}; "
                "make a ToL file from these weights"
            )
        decoder.tol_is_checked = True

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
        """As transformers'. With a ToL file, the weights that it replaces are read again from where the model is from.

        Raises: ValueError if they cannot be read.
        """
        has_adapters = getattr(self, "_hf_peft_config_loaded", False)  # then only these are saved
        if self.base_model.tol is not None and not has_adapters:
            # Every process refuses, as the others would wait for the main one.
            if getattr(self.config, "distributed_config", None) or kwargs.get("distributed_checkpoint"):
                raise ValueError("save_pretrained: expected no ToL file in a sharded model, found one")
            if is_main_process:
                state_dict = dict(self.state_dict() if state_dict is None else state_dict) | self._read_replaced()
        return super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def _read_replaced(self):
        """{name: tensor} of the weights that the ToL file replaces, in the dtype of the others. Raises: ValueError."""
        source = getattr(self, "_source", None)
        if source is None:
            raise ValueError("save_pretrained: expected a model made by from_pretrained, where FFN-M's weights are")
        cause, missing = None, []
        try:
            replaced, info = ReplacedWeights.from_pretrained(
                source, config=self.config, dtype=self.dtype, output_loading_info=True, **self._source_options
            )
            missing = info["missing_keys"]
        except (OSError, ValueError, RuntimeError) as error:  # a directory that is gone, or has other shapes
            cause = error
        if cause is not None or missing:
            raise ValueError(
                f"save_pretrained: expected FFN-M's weights in {source}, from where the model was loaded, "
                f"found {cause or ', '.join(sorted(missing))}"
            ) from cause
        inner = f"{self.base_model_prefix}." if self.base_model is self else ""
        return {name.removeprefix(inner): tensor for name, tensor in replaced.state_dict().items()}


# Arguments of from_pretrained that say where the weights are.
_SOURCE_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "use_safetensors", "variant")
_LAYERS = ["MemoryLLMDecoderLayer"]
_RECORDED = {"hidden_states": MemoryLLMDecoderLayer, "attentions": LlamaAttention}
_REPLACED = [r"\.memory\.", r"embed_tokens"]  # weights in the safetensors files that a ToL file replaces


class MemoryLLMModel(WithTol, LlamaModel):
    """The decoder without its head, as AutoModel loads it."""

    config_class = MemoryLLMConfig
    _no_split_modules = _LAYERS
    _can_record_outputs = _RECORDED

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel.__init__ would build Llama's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.tol = None if config.tol is None else Tol(config.tol, config)
        self.tol_is_checked = False
        if self.tol is not None:
            self._keys_to_ignore_on_load_unexpected = _REPLACED
        self.embed_tokens = None
        if self.tol is None or not self.tol.has_x0:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MemoryLLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, *, inputs_embeds=None, **kwargs):
        """Llama's forward, which passes X_0 and the looked-up rows on to every layer.

        Raises: ValueError for token ids out of range. On accelerators only a ToL file checks them; live, the
          embedding's own check stops the program.
        """
        if not all(hasattr(layer, "self_attn") for layer in self.layers):
            raise ValueError("pipeline parallelism: expected all layers in one stage, as each FFN-M reads X_0")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, found both or neither")
        x0, rows = inputs_embeds, None
        if self.tol is not None:
            x0, rows = self._look_up(input_ids)
        elif input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_ids(input_ids, self.vocab_size)
        if x0 is None:
            x0 = self.embed_tokens(input_ids)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and not x0.requires_grad:
            # Reentrant checkpointing gives a layer no gradients if no input of it has any: rows of a file have none.
            x0 = x0.detach().requires_grad_()
        more = {"attention_mask": attention_mask, "position_ids": position_ids}
        return super().forward(inputs_embeds=x0, x0=x0, rows=rows, **more, **kwargs)

    def _look_up(self, input_ids):
        """X_0 [B, T, D], or None if the embedding is tied, and FFN-M outputs [B, T, L, D]. Raises: ValueError."""
        if input_ids is None:
            raise ValueError("a ToL file is looked up by token: expected input_ids, found inputs_embeds")
        if not self.tol_is_checked:
            raise ValueError("tol: expected a file that was compared with the weights; call the model's check_tol()")
        # The final norm gives the dtype, as the embedding may not be loaded.
        return self.tol(input_ids, self.norm.weight.dtype)


class MemoryLLMForCausalLM(WithTol, LlamaForCausalLM):
    """The decoder with its head, as AutoModelForCausalLM loads it."""

    config_class = MemoryLLMConfig
    _no_split_modules = _LAYERS
    _can_record_outputs = _RECORDED
    _pp_plan = None

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM.__init__ would build a LlamaModel
        self.model = MemoryLLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tol is not None:
            self._keys_to_ignore_on_load_unexpected = _REPLACED
        self.post_init()


class ReplacedWeights(LlamaPreTrainedModel):
    """The weights that a ToL file replaces, and no others, to read them from a directory of the whole model."""

    config_class = MemoryLLMConfig

    def __init__(self, config):
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = [r".*"]
        self.model = nn.Module()
        if not config.tie_word_embeddings:
            self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(config.num_hidden_layers))
        for layer in self.model.layers:
            layer.memory = TokenMemory(config)
        self.post_init()


def check_ids(ids, vocab_size):
    """Raises: ValueError if a token id is not from 0 to vocab_size - 1."""
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids: expected ids from 0 to {vocab_size - 1}, found {low if low < 0 else high}")


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
    of_layers("attention/out", lambda layer: layer.self_attn.o_proj, c.num_attention_heads, head_dim, width)
    of_layers("attention/q", lambda layer: layer.self_attn.q_proj, width, c.num_attention_heads, head_dim)
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


class Json:
    """A value in parsed JSON that anyone may have written, with its name in error messages."""

    def __init__(self, value, name):
        self.value = value
        self.name = name

    @classmethod
    def parse(cls, text, name):
        """Parses bytes or a text. Raises: ValueError."""
        try:
            return cls(json.loads(text), name)
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise ValueError(f"{name}: expected JSON, found what cannot be parsed: {error}") from None

    def refuse(self, expected):
        """Raises the ValueError for this value."""
        is_group = isinstance(self.value, (dict, list))
        found = f"a {type(self.value).__name__}" if is_group else repr(self.value)[:80]
        raise ValueError(f"{self.name}: expected {expected}, found {found}")

    def integer(self, low, high):
        if type(self.value) is not int or not low <= self.value <= high:  # not isinstance: true is no number here
            self.refuse(f"a whole number from {low} to {high}")
        return self.value

    def of(self, kind, expected):
        if not isinstance(self.value, kind):
            self.refuse(expected)
        return self.value

    def items(self):
        return [Json(item, f"{self.name}[{i}]") for i, item in enumerate(self.of(list, "a list"))]

    def fields(self):
        return {key: Json(value, f"{self.name}.{key[:80]}") for key, value in self.of(dict, "an object").items()}

    def __getitem__(self, key):
        fields = self.fields()
        if key not in fields:
            self.refuse(f"a field {key}")
        return fields[key]


class Tensor(NamedTuple):
    """A tensor of the file: its dtype, its shape, and its first byte and the one after its last."""

    dtype: str
    shape: tuple
    start: int
    end: int


class Part(NamedTuple):
    """A vector of a row: its name (`x0` or `ffn.L`), its bands [(elements, bits each)], and whether it is rotated."""

    name: str
    bands: list
    rotated: bool

    @property
    def rank(self):
        """Elements stored."""
        return sum(size for size, _ in self.bands)


class Tier(NamedTuple):
    """Rows that have the same parts in the same encoding."""

    rows: int
    parts: list

    @property
    def stride(self):
        """Bytes of a row."""
        return sum(_band_bytes(size, bits) for part in self.parts for size, bits in part.bands)


_ITEM_BYTES = {"U8": 1, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "U64": 8}
_MOST_BYTES = 2**53  # sizes up to here are exact in every reader of JSON
_MAX_HEADER = 100_000_000  # bytes: readers of safetensors accept no more
_METADATA = {  # keys that every file has
    "format", "version", "layout", "vocab_size", "architecture", "step", "dtype", "codec", "kept_layers",
    "dropped_layers", "rows_digest", "decoder_digest", "tokenizer_kind", "tokenizer_digest", "tensor_checksums",
}  # fmt: skip


def _read_header(file, path):
    """Reads the header of a safetensors file.

    Returns: ({key: text} of the metadata, {name: Tensor}).
    Raises: ValueError if the header is damaged, or its tensors do not fill the file exactly.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_read_at(file, 0, min(8, size), path), "little")
    if size < 8 or not 0 < length <= min(_MAX_HEADER, size - 8):
        raise ValueError(f"{path}: expected a ToL file, found a header of {length} bytes in a file of {size}")
    text = _read_at(file, 8, length, path)
    header = Json.parse(text, path)
    metadata = {key: value.of(str, "a text") for key, value in header["__metadata__"].fields().items()}
    _check_header(text, metadata, path)
    tensors, end = {}, 8 + length
    entries = [(name, _entry(entry)) for name, entry in header.fields().items() if name != "__metadata__"]
    # In the order of the data; an empty tensor comes before the one that begins at the same byte.
    for name, (dtype, shape, begin, stop) in sorted(entries, key=lambda item: item[1][2:]):
        if begin != end - 8 - length:
            raise ValueError(f"{path}.{name}.data_offsets: expected {end - 8 - length} first, found {begin}")
        end = 8 + length + stop
        tensors[name] = Tensor(dtype, shape, 8 + length + begin, end)
    if end != size:
        raise ValueError(f"{path}: bytes: expected {end}, found {size}; the file is truncated or damaged")
    return metadata, tensors


def _check_header(text, metadata, path):
    """Checks that the metadata is that of a ToL file, and the checksum of the header. Raises: ValueError."""
    for name, expected in {"format": "memoryllm_tol", "version": "1"}.items():
        if metadata.get(name) != expected:
            raise ValueError(f"{path}: {name}: expected {expected}, found {metadata.get(name, 'none')[:80]}")
    missing = sorted(_METADATA - metadata.keys())
    if missing:
        raise ValueError(f"{path}: {missing[0]}: expected a text in the metadata, found none")
    if "header_checksum" in metadata:
        digits = metadata["header_checksum"]
        if not re.fullmatch("[0-9a-f]{16}", digits):
            raise ValueError(f"{path}: header_checksum: expected 16 hexadecimal digits, found {digits[:80]!r}")
        # The checksum is that of the header with zeros in its place.
        expected = xxhash.xxh3_64_hexdigest(text.replace(digits.encode(), b"0" * 16))
        if digits != expected:
            raise ValueError(f"{path}: header_checksum: expected {expected}, found {digits[:80]}; it is damaged")
    elif metadata.keys() != _METADATA:
        # Files of earlier versions have no checksum and no other keys: the name of the checksum itself is damaged.
        raise ValueError(f"{path}: header_checksum: expected a checksum, found none; the header is damaged")


def _entry(entry):
    """(dtype, shape, first byte, end) of a tensor, counted from the start of the data. Raises: ValueError."""
    dtype = entry["dtype"].of(str, "a text")
    if dtype not in _ITEM_BYTES:
        entry["dtype"].refuse("one of " + ", ".join(_ITEM_BYTES))
    shape = tuple(axis.integer(0, _MOST_BYTES) for axis in entry["shape"].items())
    offsets = [offset.integer(0, _MOST_BYTES) for offset in entry["data_offsets"].items()]
    size = math.prod(shape) * _ITEM_BYTES[dtype]  # integers of Python do not overflow
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        entry["data_offsets"].refuse(f"begin and end, {size} bytes apart,")
    return dtype, shape, *offsets


class Layout:
    """How the rows of a file are encoded: docs/tol.md, section Layout.

    Args:
      metadata: {key: text} of the file.
      path: of the file, for error messages.
      config: MemoryLLMConfig of the model that reads it.
    Raises: ValueError for a layout that is damaged or of another model.
    """

    def __init__(self, metadata, path, config):
        tree = Json.parse(metadata["layout"], f"{path}: layout")
        self.dim = tree["dim"].integer(config.hidden_size, config.hidden_size)
        self.layers = tree["layers"].integer(config.num_hidden_layers, config.num_hidden_layers)
        # Rows hold the input embedding exactly if the head is another matrix, which the model has.
        self.has_x0 = tree["has_x0"].of(bool, "true or false")
        if self.has_x0 == config.tie_word_embeddings:
            tree["has_x0"].refuse(f"{not config.tie_word_embeddings}, as the model's embeddings demand")
        self.tiers = [self._tier(tier, config.vocab_size) for tier in tree["tiers"].items()]
        rows = sum(tier.rows for tier in self.tiers)
        if rows != config.vocab_size:
            raise ValueError(f"{path}: layout.tiers: expected {config.vocab_size} rows in all, found {rows}")
        held = [{part.name for part in tier.parts} for tier in self.tiers]
        names = {layer: f"ffn.{layer}" for layer in range(self.layers)}
        # A part that is missing is read as zeros, so it must be one that the file declares as dropped.
        self._check_layers(metadata, path, "kept_layers", [n for n in names if any(names[n] in h for h in held)])
        self._check_layers(metadata, path, "dropped_layers", [n for n in names if any(names[n] not in h for h in held)])

    def _check_layers(self, metadata, path, key, expected):
        """Raises: ValueError if a list of layers in the metadata is not the one that follows from the layout."""
        found = Json.parse(metadata[key], f"{path}: {key}")
        if found.value != expected:
            raise ValueError(
                f"{found.name}: expected {str(expected)[:80]}, as in the layout, found {metadata[key][:80]}"
            )

    def _tier(self, tree, most_rows):
        names = ["x0"] if self.has_x0 else []
        names += [f"ffn.{layer}" for layer in range(self.layers)]
        parts = [self._part(part) for part in tree["parts"].items()]
        found = [part.name for part in parts]
        # In the order of the layers, each at most once; x0 is in every tier.
        if found != [name for name in names if name in found or name == "x0"]:
            expected = f"some of {names[0]} to {names[-1]}, in this order" + (", with x0" if self.has_x0 else "")
            raise ValueError(f"{tree.name}.parts: expected {expected}, found {', '.join(found)[:80] or 'none'}")
        return Tier(tree["rows"].integer(1, most_rows), parts)

    def _part(self, tree):
        bands = []
        for band in tree["bands"].items():
            bits = band["bits"].integer(2, 32)
            if bits not in (2, 3, 4, 5, 6, 7, 8, 16, 32):
                band["bits"].refuse("2 to 8, 16 or 32")
            bands.append((band["size"].integer(1, self.dim), bits))
        rotated = tree["rotated"].of(bool, "true or false")
        part = Part(tree["name"].of(str, "a text"), bands, rotated)
        if not 1 <= part.rank <= self.dim or (part.rank < self.dim and not rotated):
            expected = f"1 to {self.dim}" if rotated else self.dim
            raise ValueError(f"{tree.name}.bands: expected {expected} elements, found {part.rank}")
        return part

    def ranks(self):
        """{name: largest rank} of the rotated parts."""
        out = {}
        for tier in self.tiers:
            for part in tier.parts:
                if part.rotated:
                    out[part.name] = max(out.get(part.name, 0), part.rank)
        return out

    def tensors(self, vocab_size):
        """{name: (dtypes, bytes)} of the tensors that the file must have."""
        out = {"row_of_token": (["I32"], 4 * vocab_size), "checksums": (["U64"], 8 * vocab_size)}
        for number, tier in enumerate(self.tiers):
            out[f"rows.{number}"] = (["U8", "BF16", "F32"], tier.rows * tier.stride)
        for name, rank in self.ranks().items():
            out[f"basis.{name}"] = (["BF16"], 2 * rank * self.dim)
        return out


# The open files, by number: an operation of torch takes numbers, but no objects of Python.
_OPEN = globals().get("_OPEN") or weakref.WeakValueDictionary()  # transformers may run this file again
_NUMBERS = globals().get("_NUMBERS") or itertools.count()


class Tol:
    """A ToL file of version 1, read row by row.

    Args:
      path: path of the file.
      config: MemoryLLMConfig of the model that reads it.
    Attributes:
      path: path of the file.
      has_x0: whether the rows hold X_0 too, which they do if the embedding is untied.
      decoder_digest: digest of the weights that the rows belong to.
    Raises: ValueError for a damaged file or one of another model.
    """

    def __init__(self, path, config):
        if xxhash is None:
            raise ImportError("tol: expected the package xxhash, which checks what is read: pip install xxhash")
        self.path = path
        self._config = config
        try:
            self._file = open(path, "rb")
        except OSError as error:
            raise ValueError(f"{path}: expected a ToL file: {error.strerror}") from error
        weakref.finalize(self, self._file.close)
        metadata, self._tensors = _read_header(self._file, path)
        if metadata["vocab_size"] != str(config.vocab_size):
            raise ValueError(f"{path}: vocab_size: expected {config.vocab_size}, found {metadata['vocab_size'][:80]}")
        self.decoder_digest = metadata["decoder_digest"]
        self._layout = Layout(metadata, path, config)
        self.has_x0 = self._layout.has_x0
        self._dim = self._layout.dim
        self._first_ffn = 1 if self.has_x0 else 0  # place of layer 0 among a token's vectors
        self._vectors = self._first_ffn + self._layout.layers  # of a token
        self._check_tensors(metadata)
        self._row_of_token = np.frombuffer(self._read("row_of_token"), "<i4")
        if not np.array_equal(np.sort(self._row_of_token), np.arange(config.vocab_size)):
            raise ValueError(f"{path}: row_of_token: expected each row once, found others")
        self._checksums = np.frombuffer(self._read("checksums"), "<u8")
        self._first_rows = np.cumsum([0] + [tier.rows for tier in self._layout.tiers])  # of each tier, and the end
        self._bases = {
            name: _bfloat16(self._read(f"basis.{name}")).reshape(-1, self._dim) for name in self._layout.ranks()
        }
        self._number = next(_NUMBERS)
        _OPEN[self._number] = self

    def __deepcopy__(self, memo):
        return self  # nothing in it changes, so that copies of a model share the open file

    def __reduce__(self):
        return Tol, (os.path.abspath(self.path), self._config)

    def _check_tensors(self, metadata):
        """Checks sizes, and all tensors but the rows, each of which is checked when it is read. Raises: ValueError."""
        for name, (dtypes, size) in self._layout.tensors(self._config.vocab_size).items():
            tensor = self._tensors.get(name)
            found = "none" if tensor is None else f"{tensor.end - tensor.start} bytes of {tensor.dtype}"
            if tensor is None or tensor.dtype not in dtypes or tensor.end - tensor.start != size:
                raise ValueError(
                    f"{self.path}: tensor {name}: expected {size} bytes of {' or '.join(dtypes)}, found {found}"
                )
        sums = Json.parse(metadata["tensor_checksums"], f"{self.path}: tensor_checksums")
        for name in self._tensors:
            if re.fullmatch(r"rows\.\d+|padding(\.\d+)?|checksums", name):
                continue  # rows have checksums of their own, and nobody uses padding
            if f"{xxhash.xxh3_64_intdigest(self._read(name)):016x}" != sums[name].value:
                raise ValueError(f"{self.path}: tensor {name}: expected its checksum, found another; it is damaged")

    def __call__(self, ids, dtype):
        """Looks up the rows of token ids.

        Args:
          ids: token ids [B, T].
          dtype: of the results, which are on the device of the ids.
        Returns: (X_0 [B, T, D], or None if the embedding is tied; FFN-M outputs [B, T, L, D]).
        Raises: ValueError for an id out of range or a damaged row.
        """
        found = _look_up(ids, self._number, self._vectors, self._dim, dtype)
        x0 = found[:, :, 0] if self.has_x0 else None
        return x0, found[:, :, self._first_ffn :]

    def look_up(self, ids, dtype):
        """All vectors of the ids: X_0, if the rows hold it, and the FFN-M outputs, [B, T, 1 + L or L, D]."""
        on_host = ids.cpu()
        check_ids(on_host, len(self._row_of_token))
        unique, index = np.unique(on_host.numpy(), return_inverse=True)
        vectors = np.zeros((len(unique), self._vectors, self._dim), np.float32)
        rows = self._row_of_token[unique]
        tiers = np.searchsorted(self._first_rows, rows, "right") - 1  # the tier that holds each row
        for tier in np.unique(tiers):
            members = np.flatnonzero(tiers == tier)
            raw = np.stack([self._read_row(tier, rows[m], unique[m]) for m in members])
            # A dropped layer has no part in the row: its vector stays zero.
            for name, part in self._decode(tier, raw).items():
                place = 0 if name == "x0" else self._first_ffn + int(name.removeprefix("ffn."))
                vectors[members, place] = part
        # Each distinct row travels to the device once.
        found = torch.from_numpy(vectors).to(ids.device, dtype)
        index = torch.from_numpy(index.reshape(-1)).to(ids.device)
        return found[index].reshape(*ids.shape, self._vectors, self._dim)

    def _read(self, name):
        """The bytes of a tensor."""
        tensor = self._tensors[name]
        return _read_at(self._file, tensor.start, tensor.end - tensor.start, self.path)

    def _read_row(self, tier, row, token):
        """One row as uint8 [bytes]. `row` counts over all tiers. Raises: ValueError if it is damaged."""
        size = self._layout.tiers[tier].stride
        start = self._tensors[f"rows.{tier}"].start + int(row - self._first_rows[tier]) * size
        raw = _read_at(self._file, start, size, self.path)
        if xxhash.xxh3_64_intdigest(raw) != int(self._checksums[row]):
            raise ValueError(f"{self.path}: the row of token {token} is damaged")
        return np.frombuffer(raw, np.uint8)

    def _decode(self, tier, raw):
        """Decodes rows of a tier, uint8 [n, bytes], to {part name: float32 [n, D]}."""
        out = {}
        for part in self._layout.tiers[tier].parts:
            bands = []
            for size, bits in part.bands:
                values, raw = _decode_band(raw, size, bits)
                bands.append(values)
            x = np.concatenate(bands, 1)
            if part.rotated:
                x = x @ self._bases[part.name][: x.shape[1]]
            out[part.name] = x
        return out


def _look_up_rows(ids: torch.Tensor, number: int, vectors: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return _OPEN[number].look_up(ids, dtype)


if hasattr(torch.Tag, "cudagraph_unsafe"):
    # One operation for torch.compile, which cannot look into the reading of a file. Its name contains that of this
    # module, as several models in one process bring this file along, each in a module of its own.
    _look_up = torch.library.custom_op(
        f"memoryllm_{zlib.crc32(__name__.encode()):08x}::look_up",
        _look_up_rows,
        mutates_args=(),
        tags=[torch.Tag.cudagraph_unsafe],  # ids come to the host, which a recorded graph could not repeat
    )

    @_look_up.register_fake
    def _(ids, number, vectors, dim, dtype):
        return ids.new_empty((*ids.shape, vectors, dim), dtype=dtype)
else:  # older versions of torch, where a graph ends before the lookup and another begins after it
    _look_up = torch.compiler.disable(_look_up_rows)


def _read_at(file, start, size, path):
    """`size` bytes from byte `start`. Raises: ValueError if the file has become shorter."""
    pieces = []
    while size:
        # pread does not move the file's position, so threads may share the file. It may return fewer bytes than asked.
        piece = os.pread(file.fileno(), size, start)
        if not piece:
            raise ValueError(f"{path}: expected {size} bytes from byte {start}, found none; the file is truncated")
        pieces.append(piece)
        start, size = start + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _bfloat16(raw):
    """bfloat16 bytes as float32. NumPy lacks bfloat16, whose bits are the upper half of those of a float32."""
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


def _groups(size):
    """(groups of a band, elements of a group) that share one scale each."""
    # 64 elements a group; a shorter band is one group, padded to a multiple of 8 elements.
    group = 64 if size >= 64 else -(-size // 8) * 8
    return -(-size // group), group


def _band_bytes(size, bits):
    """Bytes of a band of `size` elements."""
    if bits >= 16:
        return size * bits // 8
    groups, group = _groups(size)
    return 2 * groups + groups * group * bits // 8


def _decode_band(raw, size, bits):
    """Decodes the band at the start of each row.

    Args:
      raw: what is still to decode of the rows, uint8 [n, bytes].
      size: elements in the band.
      bits: bits per element: 32 (float32), 16 (bfloat16) or fewer (scaled integers).
    Returns: (the values, float32 [n, size]; the bytes after the band, uint8 [n, fewer bytes]).
    """
    n = len(raw)
    end = _band_bytes(size, bits)
    if bits >= 16:
        content = np.ascontiguousarray(raw[:, :end])
        values = _bfloat16(content) if bits == 16 else content.view("<f4")
        return values.reshape(n, size), raw[:, end:]
    groups, group = _groups(size)
    scales = _bfloat16(np.ascontiguousarray(raw[:, : 2 * groups])).reshape(n, groups, 1)
    codes = raw[:, 2 * groups : end]
    if bits < 8:
        # The codes are stored as bit planes: plane i holds bit i of every code.
        planes = np.unpackbits(codes.reshape(n, bits, -1), axis=2, bitorder="little")
        codes = sum(planes[:, i].astype(int) << i for i in range(bits))
    # Code c of b bits means (c - 2^(b-1) + 1/2) scale: the levels lie symmetrically around zero.
    values = (codes.reshape(n, groups, group).astype("<f4") - 2 ** (bits - 1) + 0.5) * scales
    return values.reshape(n, -1)[:, :size], raw[:, end:]
