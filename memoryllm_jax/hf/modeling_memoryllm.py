"""MemoryLLM and Flex-MemoryLLM for transformers (5.0 or newer), with FFN-M computed live or looked up in a ToL file.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True, tol="tol.safetensors")

X_{l+1} = X_l + Attn(N1(X_l)) [+ FFN-C(N2(X_l))] + FFN-M(NM(X_0)), as in Jaiswal et al. 2026 (arXiv 2602.00398).
Attention, norms and rotary embedding are those of transformers' Llama; with `qk_norm`, attention is Qwen3's. `tol` is a
file of token-wise lookups (ToL) that `memoryllm_jax.precompute` wrote. With it, FFN-M and an untied input embedding are
not loaded: their rows are read from the file. That needs the package xxhash.

modeling_tol.py reads the file; modeling_digest.py computes the digest that ties it to the weights.
"""

import os

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
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .modeling_digest import decoder_digest
from .modeling_tol import Tol, check_ids


class MemoryLLMConfig(LlamaConfig):
    """Llama's settings and those of the token memory.

    `intermediate_size` is the width of FFN-C; 0 means that there is no FFN-C.

    Attributes:
      memory_size: width of FFN-M.
      beta: FFN-C has beta h^2 of the FFNs' 8 h^2 parameters, where h is the model's width.
      compute_input: the input of FFN-C: `block_input` (X_l) or `after_attention` (X_l + Attn(N1(X_l))).
      norm: `rmsnorm` or `layernorm`.
      qk_norm: whether attention normalises the queries and keys of each head, as Qwen3's does.
      final_logit_softcapping: c of the logits c tanh(logits / c), as in Gemma 2; None leaves them as they are.
      float16_digests: {digest of the decoder rounded to float16: its digest before that}. By it, a ToL file is
        recognised from weights that were exported or loaded in float16, as the file holds the second.
      tol: path of a ToL file; None computes FFN-M live. It is not saved, as it belongs to one machine.
    """

    model_type = "memoryllm"
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | {
        "layers.*.memory.gate_proj": "colwise",
        "layers.*.memory.up_proj": "colwise",
        "layers.*.memory.down_proj": "rowwise",
        # Under tensor parallelism each device normalises its own heads.
        **{name: style for name, style in Qwen3Config.base_model_tp_plan.items() if name.endswith("_norm")},
    }
    # A later pipeline stage receives the hidden states alone, and FFN-M of its layers reads X_0.
    base_model_pp_plan = None

    memory_size: int = 0
    beta: float = 0.0
    compute_input: str = "block_input"
    norm: str = "rmsnorm"
    qk_norm: bool = False
    final_logit_softcapping: float | None = None
    float16_digests: dict | None = None
    tol: str | None = None

    def to_dict(self):
        """The settings that are saved: all but the path of the ToL file."""
        settings = super().to_dict()
        settings.pop("tol", None)
        return settings


def make_norm(config, width=None):
    width = width or config.hidden_size
    if config.norm == "layernorm":
        return nn.LayerNorm(width, config.rms_norm_eps, bias=False)
    return LlamaRMSNorm(width, config.rms_norm_eps)


def make_attention(config, layer_idx):
    if not config.qk_norm:
        return LlamaAttention(config, layer_idx)
    attention = Qwen3Attention(config, layer_idx)
    attention.q_norm, attention.k_norm = (make_norm(config, attention.head_dim) for _ in range(2))
    return attention


class Head(nn.Linear):
    """The output head, which caps its logits if the settings say so."""

    def __init__(self, config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.cap = config.final_logit_softcapping

    def forward(self, x):
        logits = super().forward(x)
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


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
        self.self_attn = make_attention(config, layer_idx)
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
            # The files in the cache, as the repository may change before the model is saved. Files in the cache need no
            # access token, which would be pickled with the model.
            model._source_options["local_files_only"] = True
            if getattr(model.config, "_commit_hash", None):
                model._source_options["revision"] = model.config._commit_hash
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
_SOURCE_OPTIONS = ("cache_dir", "revision", "subfolder", "use_safetensors", "variant")
_LAYERS = ["MemoryLLMDecoderLayer"]
_RECORDED = {"hidden_states": MemoryLLMDecoderLayer, "attentions": [LlamaAttention, Qwen3Attention]}
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
        self.lm_head = Head(config)
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
