"""Conversion of a ModelConfig to Hugging Face's config.json and back.

Settings that the other side cannot express are refused by name.
"""

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import ModelConfig, resolve

# Settings of Llama that change what the model computes, with the values that our models support. The first value is
# the one that a missing setting means.
_SUPPORTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "add_cross_attention": (None, False),
}
# rope_type in config.json -> ModelConfig.rope_scaling
_ROPE_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}
# dtype of the weights -> ModelConfig.dtype, which can be float32 or bfloat16; only float32 holds every float16 value
_COMPUTE_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_json(c: ModelConfig, context: int, dtype: str, special: dict) -> dict:
    """The settings for config.json: those of an ordinary Llama for base, else those that modeling_memoryllm.py reads.

    Args:
      c: the model.
      context: largest number of positions in a sequence.
      dtype: name of the weights' dtype.
      special: ids of the special tokens, by their names in config.json (SPECIAL).
    Raises: UserError that names a field of the model which config.json cannot express.
    """
    if c.token_memory in ("value", "per_layer"):
        raise UserError(f"config.model.token_memory: expected ffn or none to export, found {c.token_memory}")
    if c.memory_dim == 0 and c.norm != "rmsnorm":
        raise UserError(f"config.model.norm: expected rmsnorm, as Llama has no other, found {c.norm}")
    scaling = _rope_to_json(c)
    out = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
                "AutoModelForCausalLM": "modeling_memoryllm.MemoryLLMForCausalLM",
            },
            "beta": c.beta,
            "compute_input": c.compute_input,
            "memory_size": c.memory_dim,
            "norm": c.norm,
        }
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


def from_json(settings: dict, where: str) -> tuple[ModelConfig, int]:
    """Reads the settings of a config.json.

    Args:
      settings: the parsed file.
      where: its path, for error messages.
    Returns: (the model, the largest number of positions in a sequence).
    Raises: UserError that names a setting which is damaged or which our models cannot express.
    """
    if not isinstance(settings, dict):
        raise UserError(f"{where}: expected a group of settings, found {settings!r}")
    file = _Settings(settings, where)
    file.check_supported()
    dim = file.number("hidden_size")
    heads = file.number("num_attention_heads")
    if heads < 1:
        file.refuse("num_attention_heads", "at least 1", heads)
    if settings.get("head_dim") not in (None, dim / heads):
        file.refuse("head_dim", f"hidden_size / num_attention_heads = {dim / heads:g}", settings["head_dim"])
    kv_heads = file.number("num_key_value_heads", default=heads)
    compute_width = file.number("intermediate_size")
    memory_width = file.number("memory_size", default=0)
    beta = file.number("beta", float, 8.0)  # Llama has no beta: 8 is base
    dtype = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    if dtype not in _COMPUTE_DTYPES:
        file.refuse("torch_dtype", "one of " + ", ".join(_COMPUTE_DTYPES), dtype)
    model = {
        "dim": dim,
        "layers": file.number("num_hidden_layers"),
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "ffn_dim": compute_width + memory_width,
        "vocab_size": file.number("vocab_size"),
        "beta": beta,
        "compute_input": settings.get("compute_input", "after_attention"),
        "norm": settings.get("norm", "rmsnorm"),
        "norm_eps": file.number("rms_norm_eps", float, 1e-6),
        "tie_embeddings": bool(settings.get("tie_word_embeddings", False)),
        "init_std": file.number("initializer_range", float, 0.02) or 0.02,  # a file may hold 0, our config may not
        "dtype": _COMPUTE_DTYPES[dtype],
        **_rope_from_json(file),
    }
    context = file.number("max_position_embeddings", default=2048)
    config = resolve({"model": model, "seq_len": context}).model
    # ModelConfig derives the widths of FFN-C and FFN-M from ffn_dim and beta, so they must be the file's.
    if (config.compute_dim, config.memory_dim) != (compute_width, memory_width):
        file.refuse("memory_size", f"{config.memory_dim}, the FFN-M width of beta {beta:g}", memory_width)
    return config, context


class _Settings:
    """The settings of a config.json, read with checks whose errors name the setting."""

    def __init__(self, tree, where):
        self.tree = tree
        self._where = where

    def refuse(self, name, expected, found):
        """Raises the UserError for one setting."""
        raise UserError(f"{self._where}: {name}: expected {expected}, found {found!r}")

    def number(self, name, kind=int, default=None):
        """A number of type `kind`; the default where the setting is null or missing."""
        value = self.tree.get(name)
        if value is None:
            value = default
        if type(value) not in (kind, int):  # not isinstance, which takes true and false for integers
            self.refuse(name, f"a number ({kind.__name__})", value)
        return kind(value)

    def group(self, name):
        """A setting that is a group of settings; {} where it is null or missing."""
        value = self.tree.get(name) or {}
        if not isinstance(value, dict):
            self.refuse(name, "a group of settings", value)
        return value

    def check_supported(self):
        """Refuses other model families, and values that change the computation in a way that ours lacks."""
        kind = self.tree.get("model_type")
        if kind not in ("llama", "memoryllm"):
            self.refuse("model_type", "llama (or memoryllm, as export writes it)", kind)
        for name, values in _SUPPORTED.items():
            if self.tree.get(name, values[0]) not in values:
                self.refuse(name, " or ".join(repr(value) for value in values), self.tree[name])


def _rope_from_json(file):
    """The fields of ModelConfig for the rotary embedding.

    transformers 5 writes them all into the group `rope_parameters`. Earlier versions write `rope_theta` and the group
    `rope_scaling`.
    """
    rope = {"rope_theta": file.tree.get("rope_theta") or 10_000.0}
    rope |= file.group("rope_scaling") | file.group("rope_parameters")  # the newer wins
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_SCALINGS:
        file.refuse("rope_scaling", "one of " + ", ".join(_ROPE_SCALINGS), kind)
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        file.refuse("partial_rotary_factor", "1.0", rope["partial_rotary_factor"])

    def number(name):
        """A setting as float; refuses any other type."""
        if not isinstance(rope.get(name), int | float):
            where = name if name == "rope_theta" else f"rope_scaling.{name}"
            file.refuse(where, "a number", rope.get(name))
        return float(rope[name])

    scaling = _ROPE_SCALINGS[kind]
    out = {"rope_theta": number("rope_theta"), "rope_scaling": scaling}
    if scaling != "none":
        out["rope_factor"] = number("factor")
    if scaling == "llama3":
        out["rope_low_freq_factor"] = number("low_freq_factor")
        out["rope_high_freq_factor"] = number("high_freq_factor")
        if not rope.get("original_max_position_embeddings"):
            rope["original_max_position_embeddings"] = file.tree.get("max_position_embeddings") or 8192
        out["rope_original_context"] = int(number("original_max_position_embeddings"))
    return out
