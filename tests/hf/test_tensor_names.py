"""The tensors of the Hugging Face layout against the model's parameters."""

import jax
import numpy as np

from memoryllm_jax.checkpoint.digest import array_name
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.hf import tensor_names
from memoryllm_jax.model import sharding, transformer


def test_tensors_cover_every_parameter(make_config):
    for architecture in ("base", "memory", "flex-3"):
        m = make_config(architecture, **{"model.vocab_size": 10}).model
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        shapes = jax.tree_util.tree_leaves_with_path(transformer.abstract_params(transformer.LanguageModel(m), mesh))
        sizes = {array_name(path): leaf.size for path, leaf in shapes}
        held = dict.fromkeys(sizes, 0)
        for tensor in tensor_names.tensors(m).values():
            held[tensor.leaf] += int(np.prod(tensor.shape))
        assert held == sizes


def test_from_ours_undoes_to_ours(make_config):
    m = make_config("flex-3", **{"model.vocab_size": 10, "model.kv_heads": 2}).model
    tensor = tensor_names.tensors(m)["model.layers.1.self_attn.k_proj.weight"]
    values = np.arange(np.prod(tensor.shape), dtype=np.float32).reshape(tensor.shape)
    ours = tensor.to_ours(values, (m.dim, 2, m.head_dim))
    assert ours[3, 1, 5] == values[m.head_dim + 5, 3]
    np.testing.assert_array_equal(tensor.from_ours(ours), values)
