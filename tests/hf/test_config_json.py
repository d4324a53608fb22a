"""config.json: settings that convert to a ModelConfig and back, and settings that are refused."""

import json
import re

import numpy as np
import pytest
from sides import LLAMA3_ROPE

from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.hf.config_json import Settings, from_json, to_json
from memoryllm_jax.model import transformer


def converted(settings):
    """The model and the context of the settings of a config.json."""
    where = "config.json"
    return from_json(records.parse(Settings, json.dumps(settings), where, "a model's settings"), where)


MISSING = object()
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


QWEN3 = {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 2}


def llama(**changes):
    """The settings of a small Llama with some changed, or removed if they are MISSING."""
    return {name: value for name, value in (LLAMA | changes).items() if value is not MISSING}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type: expected llama .*, found 'mistral'"),
        ({"model_type": "qwen3", "num_key_value_heads": 4}, "head_dim: expected a number in .* a Qwen3, found None"),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 9}, "sliding_window: expected None, found 9"),
        ({"attention_bias": True}, "attention_bias: expected False, found True"),
        ({"mlp_bias": True}, "mlp_bias: expected False, found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"head_dim": 12}, "head_dim: expected hidden_size / num_attention_heads = 8, found 12"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
        ({"sliding_window": 4096}, "sliding_window: expected None, found 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: expected full_attention, found 'slid"),
        ({"per_layer_config": [1]}, r"per_layer_config: expected None, found \[1\]"),
        ({"transformers_weights": "a.safetensors"}, "transformers_weights: expected None, found 'a.safetensors'"),
        ({"hidden_size": None}, "hidden_size: expected int, found null"),
        ({"hidden_size": MISSING}, "expected a field hidden_size, found none"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers: expected int <= 2147483647, found 1099511627776"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected int >= 1, found 0"),
        ({"vocab_size": [1]}, "vocab_size: expected int, found array"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected bool, found str"),
        ({"rms_norm_eps": 1e300}, r"rms_norm_eps: expected float <= 1.0, found 1e\+300"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected .*, found str"),
        ({"torch_dtype": "int8", "dtype": None}, "torch_dtype: expected one of float32, .*, found 'int8'"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected object | null, found str"),
        ({"rope_parameters": {"rope_theta": "large"}}, "rope_parameters: rope_theta: expected .*, found str"),
        ({"rope_theta": 1e-300}, "rope_theta: expected float >= .*, found 1e-300"),  # float32 would round it to 0
        (
            {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": "all"}},
            "rope_parameters: original_max_position_embeddings: expected .*, found str",
        ),
    ],
)
def test_settings_that_our_models_cannot_express_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=f"^config.json: {message}"):
        converted(llama(**changes))


def test_settings_that_our_config_refuses_are_named_by_its_fields():
    with pytest.raises(UserError, match=r"config.model.kv_heads: expected a divisor of model.heads = 4"):
        converted(llama(num_key_value_heads=3))


@pytest.mark.parametrize("architecture, softcap", [("base", 0.0), ("memory", 0.0), ("flex-3", 30.0)])
def test_a_model_comes_back_from_its_config_json(make_config, architecture, softcap):
    overrides = {
        "model.qk_norm": architecture != "memory",
        "model.logit_softcap": softcap,
        "model.vocab_size": 512,
        "model.kv_heads": 2,
        "model.norm_eps": 3e-6,
        "model.tie_embeddings": True,
        "model.rope_theta": 5e5,
        "model.rope_scaling": "llama3",
        "model.rope_factor": 4.0,
    }
    model = make_config(architecture, **overrides).model
    tree = to_json(model, 64, "bfloat16", {})
    found, context = converted(tree)
    assert context == 64 and found.dtype == "bfloat16"
    assert (found.qk_norm, found.logit_softcap) == (model.qk_norm, softcap)
    assert to_json(found, 64, "bfloat16", {}) == tree


WITHOUT_ORIGINAL = {name: LLAMA3_ROPE[name] for name in LLAMA3_ROPE if name != "original_max_position_embeddings"}
LINEAR = {"rope_type": "linear", "factor": 2.0}
# The settings of every rope type that transformers knows, complete
ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "llama3": LLAMA3_ROPE,
    "proportional": {"factor": 4.0, "partial_rotary_factor": 0.5},
}
# Where else transformers accepts settings, which of two counts, and what it refuses or we refuse by name
ROPE_PLACES = {
    "theta_beside": {"rope_theta": 5e5},
    "theta_null": {"rope_theta": None},
    "theta_in_group": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e3}},
    "theta_null_in_group": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": None}},
    "theta_beside_old_group": {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 7e3}},
    "old_group_counts": {"rope_scaling": LINEAR, "rope_parameters": LLAMA3_ROPE},
    "empty_old_group": {"rope_scaling": {}, "rope_parameters": LINEAR},
    "null_old_group": {"rope_scaling": None, "rope_parameters": LINEAR},
    "old_type": {"rope_scaling": {"type": "linear", "factor": 3}},
    "new_type_counts": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 3.0}},
    "null_type": {"rope_scaling": {"type": "linear", "rope_type": None, "factor": 3.0}},
    "unknown_type": {"rope_scaling": {"type": "su", "factor": 3.0}},
    "no_factor": {"rope_scaling": {"type": "linear"}},
    "null_factor": {"rope_scaling": LINEAR | {"factor": None}},
    "original_from_context": {"rope_parameters": WITHOUT_ORIGINAL},
    "original_null": {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": None}},
    "original_beside": {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 16},
    "original_null_beside": {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": None},
    "partial": {"partial_rotary_factor": 0.5, "rope_parameters": LINEAR},
    "partial_in_group": {"partial_rotary_factor": 0.5, "rope_parameters": LINEAR | {"partial_rotary_factor": 1.0}},
    "null_partial_in_group": {"rope_parameters": LINEAR | {"partial_rotary_factor": None}},
    "by_layer_type": {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": LINEAR}},
    "by_undeclared_layer_type": {"rope_parameters": {"full_attention": LINEAR}},
    "unused_settings": {"rope_parameters": LINEAR | {"attention_factor": 0.5, "beta_fast": 9.0, "finetuned": True}},
}


# What transformers accepts and we refuse: it ignores the groups by layer type, as its Llama has one type of layer.
REFUSED = {"dynamic", "yarn", "longrope", "proportional", "partial", "by_layer_type", "by_undeclared_layer_type"}


def our_rotation(settings):
    """cos and sin [K/2] of our model at position 1; None if import refuses a setting of the rotary embedding."""
    try:
        model, _ = converted(settings)
    except UserError as error:
        assert re.search("rope|partial_rotary_factor|layer_types|original_max", str(error)), error
        return None
    return [np.asarray(part)[0] for part in transformer.rope_table(model, np.ones(1))]


def their_rotation(transformers, settings):
    """The same of transformers' Llama; None if it refuses the settings."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        rope = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(json.loads(json.dumps(settings))))
        angles = rope(torch.ones(1), torch.ones(1, 1, dtype=torch.long))
    except Exception:  # KeyError, TypeError and others: it has no error of its own for these
        return None
    # Both halves of a head turn by the same angles.
    return [angle[0, 0, : angle.shape[-1] // 2].numpy() for angle in angles]


def test_rope_settings_mean_what_they_mean_in_transformers_or_are_refused(transformers):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert ROPE_TYPES.keys() == ROPE_INIT_FUNCTIONS.keys() | {"default"}, "transformers knows another rope type"
    cases = {kind: {"rope_parameters": {"rope_type": kind} | group} for kind, group in ROPE_TYPES.items()}
    for name, changes in (cases | ROPE_PLACES).items():
        settings = llama(**changes)
        ours, theirs = our_rotation(settings), their_rotation(transformers, settings)
        assert (ours is None) == (theirs is None or name in REFUSED), name
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=name)
