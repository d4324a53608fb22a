"""MemoryLLM and Flex-MemoryLLM for transformers (5.0 or newer), with FFN-M computed live or looked up in a ToL file.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True, tol="tol.safetensors")

X_{l+1} = X_l + Attn(N1(X_l)) [+ FFN-C(N2(X_l))] + FFN-M(NM(X_0)), as in Jaiswal et al. 2026 (arXiv 2602.00398).
Attention, norms and rotary embedding are those of transformers' Llama. `tol` is a file of token-wise lookups (ToL) that
`memoryllm_jax.precompute` wrote. With it, FFN-M and an untied input embedding are not loaded: their rows are read from
the file. That needs the package xxhash.
"""

import json
import os
import struct

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


class MemoryLLMConfig(LlamaConfig):
    """Llama's settings and those of the token memory.

    `intermediate_size` is the width of FFN-C; 0 means that there is no FFN-C.

    Attributes:
      memory_size: width of FFN-M.
      beta: FFN-C has beta h^2 of the FFNs' 8 h^2 parameters, where h is the model's width.
      compute_input: the input of FFN-C: `block_input` (X_l) or `after_attention` (X_l + Attn(N1(X_l))).
      norm: `rmsnorm` or `layernorm`.
      decoder_digest: digest of the weights outside the token memory; a ToL file must have the same.
      tol: path of a ToL file; None computes FFN-M live.
    """

    model_type = "memoryllm"

    memory_size: int = 0
    beta: float = 0.0
    compute_input: str = "block_input"
    norm: str = "rmsnorm"
    decoder_digest: str | None = None
    tol: str | None = None


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

    def forward(self, x0):
        query = self.norm(x0)
        return self.down_proj(nn.functional.silu(self.gate_proj(query)) * self.up_proj(query))


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


_LAYERS = ["MemoryLLMDecoderLayer"]
_RECORDED = {"hidden_states": MemoryLLMDecoderLayer, "attentions": LlamaAttention}


class MemoryLLMModel(LlamaModel):
    """The decoder without its head."""

    config_class = MemoryLLMConfig
    _no_split_modules = _LAYERS
    _can_record_outputs = _RECORDED

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel.__init__ would build Llama's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.tol = None if config.tol is None else Tol(config.tol, config)
        self.embed_tokens = None
        if self.tol is None or not self.tol.has_x0:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MemoryLLMDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        """Llama's forward, which passes X_0 and the looked-up rows on to every layer."""
        x0 = rows = None
        if self.tol is not None:
            if input_ids is None:
                raise ValueError("a ToL file is looked up by token: expected input_ids, found inputs_embeds")
            # The final norm gives dtype and device, as the embedding may not be loaded.
            x0, rows = self.tol(input_ids, like=self.norm.weight)
        if x0 is None:
            x0 = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=x0, x0=x0, rows=rows, **kwargs)


class MemoryLLMForCausalLM(LlamaForCausalLM):
    """The decoder with its head, as AutoModelForCausalLM loads it."""

    config_class = MemoryLLMConfig
    _no_split_modules = _LAYERS
    _can_record_outputs = _RECORDED

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM.__init__ would build a LlamaModel
        self.model = MemoryLLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tol is not None:
            # The weights that the ToL file replaces are in the safetensors files and are not to be reported.
            self._keys_to_ignore_on_load_unexpected = [r"\.memory\.", r"embed_tokens"]
        self.post_init()


class Tol:
    """A ToL file of version 1, read row by row. docs/tol.md of memoryllm_jax describes the format.

    Args:
      path: path of the file.
      config: MemoryLLMConfig of the model that reads it.
    Attributes:
      has_x0: whether the rows hold X_0 too, which they do if the embedding is untied.
    Raises: ValueError for a damaged file or one of another model.
    """

    def __init__(self, path, config):
        import xxhash

        self._checksum = xxhash.xxh3_64_intdigest
        self._path = path
        self._file = open(path, "rb")
        # A safetensors file: the header's length in bytes, the header, and then the tensors' data.
        (length,) = struct.unpack("<Q", self._file.read(8))
        self._header = json.loads(self._file.read(length))
        self._data = 8 + length
        meta = self._header.pop("__metadata__")
        layout = json.loads(meta["layout"])
        self.has_x0 = layout["has_x0"]
        self._first_ffn = 1 if self.has_x0 else 0  # place of layer 0 among a token's vectors
        self._dim = layout["dim"]
        self._layers = layout["layers"]
        self._tiers = layout["tiers"]
        self._check_model(meta, config)
        self._check_tensors(json.loads(meta["tensor_checksums"]))
        self._row_of_token = np.frombuffer(self._read("row_of_token"), "<i4")
        self._checksums = np.frombuffer(self._read("checksums"), "<u8")
        self._first_rows = np.cumsum([0] + [tier["rows"] for tier in self._tiers])  # of each tier, and the end
        rotated = {part["name"] for tier in self._tiers for part in tier["parts"] if part["rotated"]}
        self._bases = {name: _bfloat16(self._read(f"basis.{name}")).reshape(-1, self._dim) for name in rotated}

    def _check_model(self, meta, config):
        """Raises: ValueError if the file is cut off or belongs to another model or version."""
        end = self._data + max(entry["data_offsets"][1] for entry in self._header.values())
        expected_and_found = {
            "format": ("memoryllm_tol", meta["format"]),
            "version": ("1", meta["version"]),
            "bytes": (end, os.path.getsize(self._path)),
            "vocabulary": (config.vocab_size, int(meta["vocab_size"])),
            "width": (config.hidden_size, self._dim),
            "layers": (config.num_hidden_layers, self._layers),
            "decoder_digest": (config.decoder_digest, meta["decoder_digest"]),
        }
        for name, (expected, found) in expected_and_found.items():
            if expected != found:
                raise ValueError(f"{self._path}: {name}: expected {expected}, found {found}")

    def _check_tensors(self, sums):
        """Checks all tensors but the rows, each of which is checked when it is read. Raises: ValueError."""
        for name in self._header:
            if name in sums and self._checksum(self._read(name)) != int(sums[name], 16):
                raise ValueError(f"{self._path}: tensor {name} is damaged")

    def __call__(self, ids, like):
        """Looks up the rows of token ids.

        Args:
          ids: token ids [B, T].
          like: a tensor whose dtype and device the results have.
        Returns: (X_0 [B, T, D], or None if the embedding is tied; FFN-M outputs [B, T, L, D]).
        Raises: ValueError for a damaged row.
        """
        unique, index = np.unique(ids.cpu().numpy(), return_inverse=True)
        vectors = np.zeros((len(unique), self._first_ffn + self._layers, self._dim), np.float32)
        rows = self._row_of_token[unique]
        tiers = np.searchsorted(self._first_rows, rows, "right") - 1  # the tier that holds each row
        for tier in np.unique(tiers):
            members = np.flatnonzero(tiers == tier)
            raw = np.stack([self._read_row(tier, rows[m], unique[m]) for m in members])
            # A dropped layer has no part in the row: its vector stays zero.
            for name, part in self._decode(tier, raw).items():
                place = 0 if name == "x0" else self._first_ffn + int(name.removeprefix("ffn."))
                vectors[members, place] = part
        found = torch.from_numpy(vectors).to(like.device, like.dtype)[torch.from_numpy(index).to(like.device)]
        found = found.reshape(*ids.shape, -1, self._dim)
        x0 = found[:, :, 0] if self.has_x0 else None
        return x0, found[:, :, self._first_ffn :]

    def _read(self, name, start=0, size=None):
        """The bytes of a tensor: all of them, or `size` bytes from `start`."""
        first, end = self._header[name]["data_offsets"]
        if size is None:
            size = end - first - start
        # pread does not move the file's position, so threads may share the file.
        return os.pread(self._file.fileno(), size, self._data + first + start)

    def _read_row(self, tier, row, token):
        """One row as uint8 [bytes]. `row` counts over all tiers. Raises: ValueError if it is damaged."""
        first, end = self._header[f"rows.{tier}"]["data_offsets"]
        size = (end - first) // self._tiers[tier]["rows"]
        raw = self._read(f"rows.{tier}", int(row - self._first_rows[tier]) * size, size)
        if self._checksum(raw) != int(self._checksums[row]):
            raise ValueError(f"{self._path}: the row of token {token} is damaged")
        return np.frombuffer(raw, np.uint8)

    def _decode(self, tier, raw):
        """Decodes rows of a tier, uint8 [n, bytes], to {part name: float32 [n, D]}."""
        out = {}
        for part in self._tiers[tier]["parts"]:
            bands = []
            for band in part["bands"]:
                values, raw = _decode_band(raw, band["size"], band["bits"])
                bands.append(values)
            x = np.concatenate(bands, 1)
            if part["rotated"]:
                x = x @ self._bases[part["name"]][: x.shape[1]]
            out[part["name"]] = x
        return out


def _bfloat16(raw):
    """bfloat16 bytes as float32. NumPy lacks bfloat16, whose bits are the upper half of those of a float32."""
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


def _decode_band(raw, size, bits):
    """Decodes the band at the start of each row.

    Args:
      raw: what is still to decode of the rows, uint8 [n, bytes].
      size: elements in the band.
      bits: bits per element: 32 (float32), 16 (bfloat16) or fewer (scaled integers).
    Returns: (the values, float32 [n, size]; the bytes after the band, uint8 [n, fewer bytes]).
    """
    n = len(raw)
    if bits >= 16:
        end = size * bits // 8
        content = np.ascontiguousarray(raw[:, :end])
        values = _bfloat16(content) if bits == 16 else content.view("<f4")
        return values.reshape(n, size), raw[:, end:]
    # Groups of 64 elements with one scale each; a shorter band is one group, padded to a multiple of 8 elements.
    group = 64 if size >= 64 else -(-size // 8) * 8
    groups = -(-size // group)
    first, end = 2 * groups, 2 * groups + groups * group * bits // 8
    scales = _bfloat16(np.ascontiguousarray(raw[:, :first])).reshape(n, groups, 1)
    codes = raw[:, first:end]
    if bits < 8:
        # The codes are stored as bit planes: plane i holds bit i of every code.
        planes = np.unpackbits(codes.reshape(n, bits, -1), axis=2, bitorder="little")
        codes = sum(planes[:, i].astype(int) << i for i in range(bits))
    # Code c of b bits means (c - 2^(b-1) + 1/2) scale: the levels lie symmetrically around zero.
    values = (codes.reshape(n, groups, group).astype("<f4") - 2 ** (bits - 1) + 0.5) * scales
    return values.reshape(n, -1)[:, :size], raw[:, end:]
