"""Trained models read back from checkpoints, and digests of their parameters."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from lab import write_untrained

from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.checkpoint.trained import Digest, TrainedModel
from memoryllm_jax.common.errors import ArgumentError, UserError


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_digest_stays_the_one_in_tol_files(dtype):
    """The expected digest was computed by the version that wrote the first ToL files.

    It covers a matrix with more rows than one hash takes, a list of layers, and vectors.
    """
    table, layers, scales = (
        np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        for seed, shape in enumerate([(20_000, 3), (2, 4, 5, 6), (2, 4)])
    )
    digest = Digest()
    digest.add("embedding", jnp.asarray(table, dtype))
    digest.add("layers/attention/q", [jnp.asarray(layer, dtype) for layer in layers])
    digest.add("layers/norm/scale", [jnp.asarray(layer) for layer in scales])
    assert digest.text() == "7d5cd505d51e4872d6e639189277f7134bb828fe5eb9f075bdf908b28a7b29da"


def test_a_digest_depends_on_values_places_shapes_and_names():
    def of(name, value):
        digest = Digest()
        digest.add(name, jnp.asarray(value, jnp.float32))
        return digest.text()

    texts = {of("a", [[1, 2]]), of("a", [[2, 1]]), of("a", [[1], [2]]), of("b", [[1, 2]]), of("a", [[1, 2.1]])}
    assert len(texts) == 5


def test_parameters_for_serving_are_those_of_the_checkpoint(make_config, tmp_path):
    write_untrained(make_config("flex-3"), str(tmp_path))
    with contextlib.closing(TrainedModel(str(tmp_path))) as model:
        params, digest = model.load(lambda name: True)
        assert model.digest(lambda name: True) == digest != model.digest(model.is_memory)
        assert len(params["layers"]) == len(params["memory"]) == model.config.layers
        for name in ("layers/ffn/gate", "memory/norm/scale"):
            stacked = model.leaf(name)
            assert stacked.shape == model.shape(name)
            np.testing.assert_array_equal(model.leaf_on_host(name), stacked, strict=True)
            part, *path = name.split("/")
            for layer, tree in enumerate(params[part]):
                for key in path:
                    tree = tree[key]
                np.testing.assert_array_equal(tree, stacked[layer])
        np.testing.assert_array_equal(params["embedding"], model.leaf("embedding"))


def test_padding_of_the_mesh_that_saved_is_cut_off(make_config, tmp_path):
    """For three devices, the four heads were padded to six, and the 517 ids to 519."""
    config = make_config("flex-3", **{"model.vocab_size": 517})
    for name, tensor in (("whole", 1), ("padded", 3)):
        write_untrained(config, str(tmp_path / name), tensor)
    with (
        contextlib.closing(TrainedModel(str(tmp_path / "whole"))) as whole,
        contextlib.closing(TrainedModel(str(tmp_path / "padded"))) as padded,
    ):
        assert padded.digest(lambda name: True) == whole.digest(lambda name: True)
        for name in ("embedding", "layers/attention/q", "layers/ffn/down"):
            expected = whole.leaf_on_host(name)
            assert expected.shape == whole.shape(name)
            np.testing.assert_array_equal(padded.leaf_on_host(name), expected)
            np.testing.assert_array_equal(padded.leaf(name), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tol_file_replaces_ffn_m_and_an_untied_embedding(make_config, tmp_path, tied):
    write_untrained(make_config("memory", **{"model.tie_embeddings": tied}), str(tmp_path))
    with contextlib.closing(TrainedModel(str(tmp_path))) as model:
        names = {name for name in model.names() if model.is_memory(name)}
    ffns = {"memory/norm/scale", *(f"memory/ffn/{part}" for part in ("gate", "up", "down"))}
    assert names == (ffns if tied else ffns | {"embedding"})


def test_folders_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/none: expected a folder with checkpoints, found none"):
        TrainedModel(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/empty: expected a checkpoint, found none"):
        config_of(str(tmp_path / "empty"))


def test_a_missing_step_and_another_dtype_are_refused(make_config, tmp_path):
    workdir = write_untrained(make_config("memory"), str(tmp_path / "work"))
    with pytest.raises(ArgumentError, match=r"^step: expected one of 0 in .*, found 3"):
        TrainedModel(workdir, step=3)
    with pytest.raises(ArgumentError, match=r"^dtype: expected float32 or bfloat16, found 'float16'"):
        TrainedModel(workdir, dtype="float16")
