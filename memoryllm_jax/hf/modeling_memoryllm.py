"""MemoryLLM and Flex-MemoryLLM for transformers (5.0 or newer), with live FFN-M or with its token-wise lookups.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True, tol="tol.safetensors")

X_{l+1} = X_l + Attn(N1(X_l)) [+ FFN-C(N2(X_l))] + FFN-M(NM(X_0)), as in Jaiswal et al. 2026 (arXiv 2602.00398).
Attention, norms and rotary embedding are those of transformers' Llama. With `tol`, a file that
`memoryllm_jax.precompute` wrote, FFN-M and an untied input embedding are not loaded: their rows are read from the file.
That needs the package xxhash.
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
    """Llama's settings, where `intermediate_size` is FFN-C's width (0: there is no FFN-C), and these.

    Attributes:
      memory_size: FFN-M's width.
      beta: FFN-C has beta h^2 of the FFNs' 8 h^2 parameters, where h is the model's width.
      compute_input: what FFN-C reads: `block_input` (X_l) or `after_attention`.
      norm: `rmsnorm` or `layernorm`.
      decoder_digest: names the weights that a ToL file's rows belong to.
      tol: path of a ToL file, or None.
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
        """hidden_states, x0 [B, T, D]; rows [B, T, L, D]: FFN-M of all layers where it is looked up."""
        out = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        if self.mlp is not None:
            source = out if self.after_attention else hidden_states
            out = out + self.mlp(self.post_attention_layernorm(source))
        return out + (self.memory(x0) if rows is None else rows[:, :, self.layer_idx])


_LAYERS = ["MemoryLLMDecoderLayer"]
_RECORDED = {"hidden_states": MemoryLLMDecoderLayer, "attentions": LlamaAttention}


class MemoryLLMModel(LlamaModel):
    config_class = MemoryLLMConfig
    _no_split_modules = _LAYERS
    _can_record_outputs = _RECORDED

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # Llama's own would make its layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
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
        x0 = rows = None
        if self.tol is not None:
            if input_ids is None:
                raise ValueError("a ToL file is looked up by token: expected input_ids, found inputs_embeds")
            x0, rows = self.tol(input_ids, self.norm.weight)
        if x0 is None:
            x0 = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=x0, x0=x0, rows=rows, **kwargs)


class MemoryLLMForCausalLM(LlamaForCausalLM):
    config_class = MemoryLLMConfig
    _no_split_modules = _LAYERS
    _can_record_outputs = _RECORDED

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MemoryLLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tol is not None:
            self._keys_to_ignore_on_load_unexpected = [r"\.memory\.", r"embed_tokens"]
        self.post_init()


class Tol:
    """Rows of a ToL file, version 1 (docs/tol.md of memoryllm_jax).

    Args:
      path: of the file.
      config: MemoryLLMConfig of the model that reads it.
    Attributes:
      has_x0: whether rows hold X_0 too, as they do where the embedding is untied.
    Raises: ValueError for a damaged file or one of another model.
    """

    def __init__(self, path, config):
        import xxhash

        self._checksum = xxhash.xxh3_64_intdigest
        self._path, self._file = path, open(path, "rb")
        (length,) = struct.unpack("<Q", self._file.read(8))
        self._header, self._data = json.loads(self._file.read(length)), 8 + length
        meta = self._header.pop("__metadata__")
        layout = json.loads(meta["layout"])
        self.has_x0, self._dim, self._layers = layout["has_x0"], layout["dim"], layout["layers"]
        self._tiers = layout["tiers"]
        self._check_model(meta, config)
        self._check_tensors(json.loads(meta["tensor_checksums"]))
        self._row_of_token = np.frombuffer(self._read("row_of_token"), "<i4")
        self._checksums = np.frombuffer(self._read("checksums"), "<u8")
        self._first_rows = np.cumsum([0] + [tier["rows"] for tier in self._tiers])
        names = {part["name"] for tier in self._tiers for part in tier["parts"] if part["rotated"]}
        self._bases = {name: _bfloat16(self._read(f"basis.{name}")).reshape(-1, self._dim) for name in names}

    def _check_model(self, meta, config):
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
        """The small tensors; rows are checked when they are read."""
        for name in self._header:
            if name in sums and self._checksum(self._read(name)) != int(sums[name], 16):
                raise ValueError(f"{self._path}: tensor {name} is damaged")

    def __call__(self, ids, like):
        """Looks token ids up.

        Args:
          ids: [B, T].
          like: a tensor whose dtype and device the result has.
        Returns: (X_0 [B, T, D], or None where the embedding is tied; FFN-M [B, T, L, D]).
        """
        unique, index = np.unique(ids.cpu().numpy(), return_inverse=True)
        vectors = np.zeros((len(unique), self.has_x0 + self._layers, self._dim), np.float32)
        rows = self._row_of_token[unique]
        tiers = np.searchsorted(self._first_rows, rows, "right") - 1
        for tier in np.unique(tiers):
            members = np.flatnonzero(tiers == tier)
            raw = np.stack([self._read_row(tier, rows[m], unique[m]) for m in members])
            # A layer that was dropped has no part, and stays zero.
            for name, part in self._decode(tier, raw).items():
                place = 0 if name == "x0" else self.has_x0 + int(name.removeprefix("ffn."))
                vectors[members, place] = part
        found = torch.from_numpy(vectors).to(like.device, like.dtype)[torch.from_numpy(index).to(like.device)]
        found = found.reshape(*ids.shape, -1, self._dim)
        return (found[:, :, 0] if self.has_x0 else None), found[:, :, self.has_x0 :]

    def _read(self, name, start=0, size=None):
        """Bytes of a tensor, all of them or `size` from `start` on."""
        first, end = self._header[name]["data_offsets"]
        return os.pread(self._file.fileno(), end - first if size is None else size, self._data + first + start)

    def _read_row(self, tier, row, token):
        first, end = self._header[f"rows.{tier}"]["data_offsets"]
        size = (end - first) // self._tiers[tier]["rows"]
        raw = self._read(f"rows.{tier}", int(row - self._first_rows[tier]) * size, size)
        if self._checksum(raw) != int(self._checksums[row]):
            raise ValueError(f"{self._path}: the row of token {token} is damaged")
        return np.frombuffer(raw, np.uint8)

    def _decode(self, tier, raw):
        """Rows of a tier, uint8 [n, bytes] -> {part name: float32 [n, D]}."""
        out = {}
        for part in self._tiers[tier]["parts"]:
            bands = []
            for band in part["bands"]:
                values, raw = _decode_band(raw, band["size"], band["bits"])
                bands.append(values)
            x = np.concatenate(bands, 1)
            out[part["name"]] = x @ self._bases[part["name"]][: x.shape[1]] if part["rotated"] else x
        return out


def _bfloat16(raw):
    """bfloat16, which NumPy lacks, as float32: its bits are the upper half."""
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


def _decode_band(raw, size, bits):
    """Rows that begin with a band, uint8 [n, bytes] -> (float32 [n, size], the bytes after it)."""
    n = len(raw)
    if bits >= 16:
        end = size * bits // 8
        content = np.ascontiguousarray(raw[:, :end])
        values = _bfloat16(content) if bits == 16 else content.view("<f4")
        return values.reshape(n, size), raw[:, end:]
    # Groups of 64 elements with one scale each; a shorter band is one group, filled up to whole bytes.
    group = 64 if size >= 64 else -(-size // 8) * 8
    groups = -(-size // group)
    first, end = 2 * groups, 2 * groups + groups * group * bits // 8
    scales = _bfloat16(np.ascontiguousarray(raw[:, :first])).reshape(n, groups, 1)
    codes = raw[:, first:end]
    if bits < 8:
        # Bit i of all codes is plane i.
        planes = np.unpackbits(codes.reshape(n, bits, -1), axis=2, bitorder="little")
        codes = sum(planes[:, i].astype(int) << i for i in range(bits))
    values = (codes.reshape(n, groups, group).astype("<f4") - 2 ** (bits - 1) + 0.5) * scales
    return values.reshape(n, -1)[:, :size], raw[:, end:]
