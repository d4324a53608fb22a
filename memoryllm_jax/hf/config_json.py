"""config.json, both ways. What this model family cannot express is refused by name."""

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import ModelConfig, resolve

# Settings of Llama that change what is computed, and the only values that we compute.
_ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "add_cross_attention": (None, False),
}
_ROPE_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}  # that we compute in
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_json(c: ModelConfig, context: int, dtype: str, special: dict) -> dict:
    """config.json: an ordinary Llama's for base, else one of the modeling file. Raises: UserError.

    Args:
      special: ids of special tokens, by their names there.
    """
    if c.token_memory in ("value", "per_layer"):
        raise UserError(f"config.model.token_memory: expected ffn or none to export, found {c.token_memory}")
    if c.memory_dim == 0 and c.norm != "rmsnorm":
        raise UserError(f"config.model.norm: expected rmsnorm, as Llama has no other, found {c.norm}")
    scaling = {"rope_type": "default"}
    if c.rope_scaling != "none":
        scaling = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
            "original_max_position_embeddings": c.rope_original_context,
        }
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
        "rope_theta": c.rope_theta,  # transformers before 5 reads this and rope_scaling
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


def from_json(tree: dict, where: str) -> tuple[ModelConfig, int]:
    """(model, positions a sequence may have) of a config.json. Raises: UserError that names the setting."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected a group of settings, found {tree!r}")

    def refuse(name, expected, found):
        raise UserError(f"{where}: {name}: expected {expected}, found {found!r}")

    def number(name, kind=int, default=None):
        value = tree.get(name)
        value = default if value is None else value
        if type(value) not in (kind, int):
            refuse(name, f"a number ({kind.__name__})", value)
        return kind(value)

    if tree.get("model_type") not in ("llama", "memoryllm"):
        refuse("model_type", "llama (or memoryllm, as export writes it)", tree.get("model_type"))
    for name, values in _ONLY.items():
        if tree.get(name, values[0]) not in values:
            refuse(name, " or ".join(repr(v) for v in values), tree[name])
    dim, heads = number("hidden_size"), number("num_attention_heads")
    if heads < 1:
        refuse("num_attention_heads", "at least 1", heads)
    if tree.get("head_dim") not in (None, dim / heads):
        refuse("head_dim", f"hidden_size / num_attention_heads = {dim / heads:g}", tree["head_dim"])
    kv_heads = number("num_key_value_heads", default=heads)
    width, memory = number("intermediate_size"), number("memory_size", default=0)
    beta = number("beta", float, 8.0)
    dtype = tree.get("dtype") or tree.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        refuse("torch_dtype", "one of " + ", ".join(_DTYPES), dtype)
    model = {
        "dim": dim,
        "layers": number("num_hidden_layers"),
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "ffn_dim": width + memory,
        "vocab_size": number("vocab_size"),
        "beta": beta,
        "compute_input": tree.get("compute_input", "after_attention"),
        "norm": tree.get("norm", "rmsnorm"),
        "norm_eps": number("rms_norm_eps", float, 1e-6),
        "tie_embeddings": bool(tree.get("tie_word_embeddings", False)),
        "init_std": number("initializer_range", float, 0.02) or 0.02,
        "dtype": _DTYPES[dtype],
        **_rope(tree, refuse),
    }
    context = number("max_position_embeddings", default=2048)
    config = resolve({"model": model, "seq_len": context}).model
    if (config.compute_dim, config.memory_dim) != (width, memory):
        refuse("memory_size", f"{config.memory_dim}, the FFN-M width of beta {beta:g}", memory)
    return config, context


def _rope(tree, refuse):
    """Fields of ours, from `rope_theta` and `rope_scaling`, or from `rope_parameters`, which holds both."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(tree.get(name) or {}, dict):
            refuse(name, "a group of settings", tree[name])
    rope = {"rope_theta": tree.get("rope_theta") or 10_000.0} | (tree.get("rope_scaling") or {})
    rope |= tree.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_SCALINGS:
        refuse("rope_scaling", "one of " + ", ".join(_ROPE_SCALINGS), kind)
    scaling = _ROPE_SCALINGS[kind]
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        refuse("partial_rotary_factor", "1.0", rope["partial_rotary_factor"])
    out = {"rope_theta": float(rope["rope_theta"]), "rope_scaling": scaling}
    ours = {"factor": "rope_factor"} if scaling != "none" else {}
    if scaling == "llama3":
        ours |= {"low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor"}
        out["rope_original_context"] = int(
            rope.get("original_max_position_embeddings") or tree.get("max_position_embeddings") or 8192
        )
    for theirs, field in ours.items():
        if not isinstance(rope.get(theirs), int | float):
            refuse(f"rope_scaling.{theirs}", "a number", rope.get(theirs))
        out[field] = float(rope[theirs])
    return out
