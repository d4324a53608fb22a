"""Conversion of a ModelConfig to Hugging Face's config.json and back.

Settings that the other side cannot express are refused by name.
"""

from typing import Annotated, Any, NoReturn

import msgspec
from msgspec import UNSET, UnsetType

from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.records import Count, Size
from memoryllm_jax.config import ModelConfig, resolve

# Settings of Llama and Qwen3 that change what the model computes, with the values that our models support.
_SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "add_cross_attention": (None, False),
    "per_layer_config": (None,),
    "transformers_weights": (None,),
}
# rope_type in config.json -> ModelConfig.rope_scaling
_ROPE_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}
# model_type -> the largest number of positions where a file has none, as in transformers
_CONTEXTS = {"llama": 2048, "memoryllm": 2048, "qwen3": 32_768}
# dtype of the weights -> ModelConfig.dtype, which can be float32 or bfloat16; only float32 holds every float16 value
_COMPUTE_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_json(c: ModelConfig, context: int, dtype: str, special: dict) -> dict:
    """The settings for config.json: those of an ordinary Llama for base, else those that modeling_memoryllm.py reads.

    base with `qk_norm` is a Qwen3, which is a Llama with norms of queries and keys.

    Args:
      c: the model.
      context: largest number of positions in a sequence.
      dtype: name of the weights' dtype.
      special: ids of the special tokens, by their names in config.json (SPECIAL).
    Raises: UserError that names a field of the model which config.json cannot express.
    """
    if c.rows != "own":
        raise UserError(f"config.model.rows: expected own to export, found {c.rows}")
    if c.row_dim and not c.memory_dim:
        raise UserError(f"config.model.token_memory: expected ffn or none to export, found {c.token_memory}")
    if c.memory_dim == 0:
        if c.norm != "rmsnorm":
            raise UserError(f"config.model.norm: expected rmsnorm, as Llama has no other, found {c.norm}")
        if c.logit_softcap:
            raise UserError(f"config.model.logit_softcap: expected 0, as Llama has none, found {c.logit_softcap:g}")
    scaling = _rope_to_json(c)
    out = {
        "architectures": ["Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if c.qk_norm else "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **special,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "initializer_range": c.init_std,
        "intermediate_size": c.compute_dim,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.key_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_theta": c.rope_theta, **scaling},
        "rope_theta": c.rope_theta,  # transformers before version 5 reads this and rope_scaling
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": c.vocab_size,
    }
    if c.rope_scaling != "none":
        out["rope_scaling"] = scaling
    if c.memory_dim:
        out |= {
            "architectures": ["MemoryLLMForCausalLM"],
            "model_type": "memoryllm",
            "auto_map": {
                "AutoConfig": "modeling_memoryllm.MemoryLLMConfig",
                "AutoModel": "modeling_memoryllm.MemoryLLMModel",
                "AutoModelForCausalLM": "modeling_memoryllm.MemoryLLMForCausalLM",
            },
            "beta": c.beta,
            "compute_input": c.compute_input,
            "memory_size": c.memory_dim,
            "norm": c.norm,
        }
        # Only where they are set, so that other models keep the files that they had.
        if c.qk_norm:
            out["qk_norm"] = True
        if c.logit_softcap:
            out["final_logit_softcapping"] = c.logit_softcap
    return out


def _rope_to_json(c):
    """The scaling of the rotary embedding, as rope_parameters and rope_scaling hold it."""
    if c.rope_scaling == "none":
        return {"rope_type": "default"}
    out = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        out |= {
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
            "original_max_position_embeddings": c.rope_original_context,
        }
    return out


_Positive = Annotated[float, msgspec.Meta(ge=2.0**-126, le=2.0**127)]  # as float32 holds it


class Settings(records.Record):
    """The settings of a config.json that import reads. A missing one has the value that transformers gives it.

    The settings from `beta` on are those that `to_json` adds for memory and flex-B.
    """

    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Count
    vocab_size: Size
    model_type: str | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | UnsetType = UNSET
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1e-6
    initializer_range: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    tie_word_embeddings: bool = False
    dtype: str | None = None
    torch_dtype: str | None = None  # the name of `dtype` in transformers before version 5

    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False  # Qwen3's, without which it ignores sliding_window
    layer_types: list[str] | None = None
    quantization_config: Any = None
    add_cross_attention: bool | None = None
    per_layer_config: Any = None
    transformers_weights: Any = None

    rope_theta: _Positive | UnsetType | None = UNSET
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Size | UnsetType | None = UNSET
    rope_scaling: msgspec.Raw = msgspec.Raw(b"null")
    rope_parameters: msgspec.Raw = msgspec.Raw(b"null")

    bos_token_id: int | UnsetType | None = UNSET
    eos_token_id: int | list[int] | UnsetType | None = UNSET
    pad_token_id: int | UnsetType | None = UNSET

    beta: float = 8.0  # Llama has no beta: 8 is base
    memory_size: Count = 0
    compute_input: str = "after_attention"
    norm: str = "rmsnorm"
    qk_norm: bool = False
    final_logit_softcapping: float | None = None  # named as in Gemma 2

    @property
    def context(self) -> int:
        """The largest number of positions in a sequence."""
        return _CONTEXTS[self.model_type] if self.max_position_embeddings is UNSET else self.max_position_embeddings

    def special(self) -> dict:
        """{name: ids} of those special tokens that the file names, as `to_json` takes them."""
        return {name: getattr(self, name) for name in SPECIAL if getattr(self, name) is not UNSET}


class _Rope(records.Record):
    """The group rope_parameters, or rope_scaling as it is called in transformers before version 5."""

    rope_type: str | UnsetType | None = UNSET
    type: str | UnsetType | None = UNSET
    rope_theta: _Positive | UnsetType | None = UNSET
    partial_rotary_factor: float | UnsetType = UNSET
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: Size | UnsetType | None = UNSET


def read(path: str) -> Settings:
    """The settings in a config.json. Raises: UserError that names a setting of a wrong type or out of bounds."""
    return records.read(Settings, path, "a model's settings")


def from_json(settings: Settings, where: str) -> tuple[ModelConfig, int]:
    """Converts the settings of a config.json.

    Args:
      settings: as `read` returns them.
      where: the file's path, for error messages.
    Returns: (the model, the largest number of positions in a sequence).
    Raises: UserError that names a setting which our models cannot express.
    """
    s = settings
    _check_supported(s, where)
    if s.head_dim not in (None, s.hidden_size / s.num_attention_heads):
        expected = f"hidden_size / num_attention_heads = {s.hidden_size / s.num_attention_heads:g}"
        _refuse(where, "head_dim", expected, s.head_dim)
    dtype = s.dtype or s.torch_dtype or "float32"
    if dtype not in _COMPUTE_DTYPES:
        _refuse(where, "torch_dtype", "one of " + ", ".join(_COMPUTE_DTYPES), dtype)
    is_ours = s.model_type == "memoryllm"  # transformers' Llama ignores what it has no setting for, and so do we
    has_fewer_keys = s.num_key_value_heads not in (None, s.num_attention_heads)
    model = {
        "dim": s.hidden_size,
        "layers": s.num_hidden_layers,
        "heads": s.num_attention_heads,
        "kv_heads": s.num_key_value_heads if has_fewer_keys else 0,
        "ffn_dim": s.intermediate_size + s.memory_size,
        "vocab_size": s.vocab_size,
        "beta": s.beta,
        "compute_input": s.compute_input,
        "norm": s.norm,
        "norm_eps": s.rms_norm_eps,
        "tie_embeddings": s.tie_word_embeddings,
        "qk_norm": s.model_type == "qwen3" or (is_ours and s.qk_norm),
        "logit_softcap": (is_ours and s.final_logit_softcapping) or 0.0,
        "init_std": s.initializer_range or 0.02,  # a file may hold 0, our config may not
        "dtype": _COMPUTE_DTYPES[dtype],
        **_rope_from_json(s, where),
    }
    config = resolve({"model": model, "seq_len": s.context}).model
    # ModelConfig derives the widths of FFN-C and FFN-M from ffn_dim and beta, so they must be the file's.
    if (config.compute_dim, config.memory_dim) != (s.intermediate_size, s.memory_size):
        expected = f"{config.memory_dim}, the FFN-M width of beta {s.beta:g}"
        _refuse(where, "memory_size", expected, s.memory_size)
    return config, s.context


def _refuse(where, name, expected, found) -> NoReturn:
    """Raises the UserError for one setting."""
    raise UserError(f"{where}: {name}: expected {expected}, found {found!r}")


def _check_supported(s, where):
    """Refuses other model families, and values that change the computation in a way that ours lacks."""
    if s.model_type not in _CONTEXTS:
        _refuse(where, "model_type", "llama or qwen3 (or memoryllm, as export writes it)", s.model_type)
    if s.model_type == "qwen3":
        for name in ("head_dim", "num_key_value_heads"):
            if getattr(s, name) is None:  # transformers has defaults that do not depend on the other sizes
                _refuse(where, name, "a number in the settings of a Qwen3", None)
    if s.sliding_window is not None and (s.model_type != "qwen3" or s.use_sliding_window):
        _refuse(where, "sliding_window", "None", s.sliding_window)
    for name, values in _SUPPORTED.items():
        if getattr(s, name) not in values:
            _refuse(where, name, " or ".join(repr(value) for value in values), getattr(s, name))
    other = set(s.layer_types or ()) - {"full_attention"}
    if other:
        _refuse(where, "layer_types", "full_attention", min(other))


def _rope_from_json(s, where):
    """The fields of ModelConfig for the rotary embedding, with the precedence of transformers 5.

    There, RotaryEmbeddingConfigMixin takes the group rope_scaling unless it is missing or empty, else rope_parameters.
    Settings in the group come before those beside it, with one exception: original_max_position_embeddings.
    """
    name, rope = _rope_group(s, where)
    kind = _first_set(rope.rope_type, rope.type, "default")
    if kind not in _ROPE_SCALINGS:
        _refuse(where, f"{name}.rope_type", "one of " + ", ".join(_ROPE_SCALINGS), kind)
    rotated = _first_set(rope.partial_rotary_factor, s.partial_rotary_factor)
    if rotated not in (None, 1.0):
        _refuse(where, "partial_rotary_factor", "1.0", rotated)

    def given(field, value):
        """The value of a setting that the rotary embedding needs."""
        if value is None:
            _refuse(where, field, "a number", None)
        return value

    scaling = _ROPE_SCALINGS[kind]
    theta = _first_set(rope.rope_theta, s.rope_theta, 10_000.0)
    out = {"rope_theta": given("rope_theta", theta), "rope_scaling": scaling}
    if scaling != "none":
        out["rope_factor"] = given(f"{name}.factor", rope.factor)
    if scaling == "llama3":
        original = _first_set(s.original_max_position_embeddings, rope.original_max_position_embeddings, s.context)
        out["rope_low_freq_factor"] = given(f"{name}.low_freq_factor", rope.low_freq_factor)
        out["rope_high_freq_factor"] = given(f"{name}.high_freq_factor", rope.high_freq_factor)
        out["rope_original_context"] = given(f"{name}.original_max_position_embeddings", original)
    return out


def _rope_group(s, where):
    """(the name of the group that counts, the group)."""
    for name in ("rope_scaling", "rope_parameters"):
        text, place = bytes(getattr(s, name)), f"{where}: {name}"
        group = records.parse(dict[str, msgspec.Raw] | None, text, place)
        if not group:
            continue
        for key, value in group.items():
            # A group for each type of layer, such as full_attention, which transformers' Llama does not read.
            if bytes(value).startswith(b"{"):
                _refuse(where, f"{name}.{key[:100]}", "a setting of all layers", "a group")
        return name, records.parse(_Rope, text, place)
    return "rope_parameters", _Rope()


def _first_set(*values):
    """The first value that a file sets, if only to null; the last if it sets none."""
    return next((value for value in values if value is not UNSET), values[-1])
