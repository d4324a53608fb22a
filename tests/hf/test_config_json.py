"""config.json: settings of Llama that we take, and those that the model family cannot express."""

import json

import pytest
from lab import GOLDEN

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.hf.config_json import from_json, to_json


def config_json(**changes):
    with open(f"{GOLDEN}/base/config.json") as file:
        return json.load(file) | ({"rope_parameters": None} if "rope_scaling" in changes else {}) | changes


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
        ({"num_attention_heads": 0}, "num_attention_heads: expected at least 1, found 0"),
        ({"num_key_value_heads": 3}, "config.model.kv_heads: expected a divisor of model.heads = 4"),
        ({"torch_dtype": "int8", "dtype": None}, "torch_dtype: expected one of float32, .*, found 'int8'"),
    ],
)
def test_what_the_family_cannot_express_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=f"^config.json: {message}" if "config.model" not in message else message):
        from_json(config_json(**changes), "config.json")


@pytest.mark.parametrize("architecture", ["base", "memory", "flex-3"])
def test_a_model_comes_back_from_its_config_json(make_config, architecture):
    overrides = {"model.kv_heads": 2, "model.rope_theta": 5e5, "model.norm_eps": 3e-6, "model.tie_embeddings": True}
    overrides |= {"model.rope_scaling": "llama3", "model.rope_factor": 4.0, "model.vocab_size": 512}
    model = make_config(architecture, **overrides).model
    tree = json.loads(json.dumps(to_json(model, 64, "bfloat16", {})))
    found, context = from_json(tree, "config.json")
    assert context == 64 and found.dtype == "bfloat16"
    assert to_json(found, 64, "bfloat16", {}) == tree


def test_rope_before_transformers_5(make_config):
    """rope_theta and rope_scaling say what rope_parameters says since."""
    model = make_config(
        "base", **{"model.rope_scaling": "linear", "model.rope_factor": 2.0, "model.vocab_size": 9}
    ).model
    tree = to_json(model, 64, "float32", {})
    assert from_json(tree | {"rope_parameters": None}, "") == from_json(tree, "")
