"""config.json: settings that convert to a ModelConfig and back, and settings that are refused."""

import json

import pytest
from lab import GOLDEN
from sides import LLAMA3_ROPE

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.hf.config_json import from_json, to_json


def config_json(**changes):
    """The golden base's settings with some changed."""
    with open(f"{GOLDEN}/base/config.json") as file:
        settings = json.load(file)
    if "rope_scaling" in changes:
        settings["rope_parameters"] = None  # it would take precedence
    return settings | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type: expected llama .*, found 'mistral'"),
        ({"attention_bias": True}, "attention_bias: expected False, found True"),
        ({"mlp_bias": True}, "mlp_bias: expected False, found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"head_dim": 12}, "head_dim: expected hidden_size / num_attention_heads = 4, found 12"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: expected one of default, .*, found 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number, found None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
        ({"sliding_window": 4096}, "sliding_window: expected None, found 4096"),
        ({"hidden_size": None}, "hidden_size: expected a number .*, found None"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected a group of settings, found 'linear'"),
        ({"rope_parameters": {"rope_theta": "large"}}, "rope_theta: expected a number, found 'large'"),
        (
            {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": "all"}},
            "rope_scaling.original_max_position_embeddings: expected a number, found 'all'",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads: expected at least 1, found 0"),
        ({"torch_dtype": "int8", "dtype": None}, "torch_dtype: expected one of float32, .*, found 'int8'"),
    ],
)
def test_settings_that_our_models_cannot_express_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=f"^config.json: {message}"):
        from_json(config_json(**changes), "config.json")


def test_settings_that_our_config_refuses_are_named_by_its_fields():
    with pytest.raises(UserError, match=r"config.model.kv_heads: expected a divisor of model.heads = 4"):
        from_json(config_json(num_key_value_heads=3), "config.json")


@pytest.mark.parametrize("architecture", ["base", "memory", "flex-3"])
def test_a_model_comes_back_from_its_config_json(make_config, architecture):
    overrides = {
        "model.vocab_size": 512,
        "model.kv_heads": 2,
        "model.norm_eps": 3e-6,
        "model.tie_embeddings": True,
        "model.rope_theta": 5e5,
        "model.rope_scaling": "llama3",
        "model.rope_factor": 4.0,
    }
    model = make_config(architecture, **overrides).model
    tree = json.loads(json.dumps(to_json(model, 64, "bfloat16", {})))
    found, context = from_json(tree, "config.json")
    assert context == 64 and found.dtype == "bfloat16"
    assert to_json(found, 64, "bfloat16", {}) == tree


def test_rope_settings_of_transformers_before_5_mean_the_same(make_config):
    """There, rope_theta and rope_scaling hold what rope_parameters holds now."""
    overrides = {"model.rope_scaling": "linear", "model.rope_factor": 2.0, "model.vocab_size": 9}
    model = make_config("base", **overrides).model
    tree = to_json(model, 64, "float32", {})
    assert from_json(tree | {"rope_parameters": None}, "") == from_json(tree, "")
