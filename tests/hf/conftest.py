"""Fixtures: transformers, for tests that are skipped without it, and small models to export."""

import functools

import pytest
from lab import made_once, shared_folder, write_untrained

from memoryllm_jax.config import default, resolve
from memoryllm_jax.tol import compress

MODELS = {
    "memory": ("memory", {}),
    "flex": (
        "flex-3",
        {
            "model.kv_heads": 2,
            "model.tie_embeddings": True,
            "model.norm": "layernorm",
            "model.compute_input": "after_attention",
            "model.qk_norm": True,
            "model.logit_softcap": 3.0,
        },
    ),
}


@pytest.fixture(scope="session")
def transformers():
    missing = "transformers 5 on PyTorch, to compare with, is not installed: pip install 'memoryllm_jax[hf]'"
    pytest.importorskip("torch", reason=missing)
    return pytest.importorskip("transformers", "5.0", reason=missing)


@pytest.fixture(scope="session")
def untrained(data_path, tmp_path_factory):
    """untrained(name): a workdir with random weights of one of MODELS, in float32, for a context of 64 tokens."""
    folder = shared_folder(tmp_path_factory)

    @functools.cache
    def make(name):
        architecture, overrides = MODELS[name]
        c = default(architecture)
        c.seq_len, c.data.path = 64, data_path
        c.model.dim, c.model.layers, c.model.heads, c.model.dtype = 32, 2, 4, "float32"
        c.update_from_flattened_dict(overrides)
        path = folder / f"untrained-{name}"
        with made_once(path) as to_make:
            if to_make:
                write_untrained(resolve(c), str(path))
        return str(path)

    return make


@pytest.fixture(scope="session")
def tol_of(untrained, tmp_path_factory):
    """tol_of(name): a ToL file of one of MODELS, in bfloat16."""

    @functools.cache
    def make(name):
        path = str(tmp_path_factory.mktemp("tol") / name)
        compress.precompute(untrained(name), path, compress.Options())
        return path

    return make
