"""Trained models read back from checkpoints, and digests of their parameters."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import write_untrained

from memoryllm_jax.checkpoint import trained
from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.checkpoint.trained import Digest, TrainedModel
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.model import sharding


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
    digest.add("embedding", [table.astype(dtype)])
    digest.add("layers/attention/q", list(layers.astype(dtype)))
    digest.add("layers/norm/scale", list(scales))
    assert digest.text() == "7d5cd505d51e4872d6e639189277f7134bb828fe5eb9f075bdf908b28a7b29da"


def test_a_digest_depends_on_values_places_shapes_and_names():
    def of(name, value):
        digest = Digest()
        digest.add(name, [np.array(value, np.float32)])
        return digest.text()

    texts = {of("a", [[1, 2]]), of("a", [[2, 1]]), of("a", [[1], [2]]), of("b", [[1, 2]]), of("a", [[1, 2.1]])}
    assert len(texts) == 5


@pytest.mark.parametrize(
    "architecture, dtype, parts", [("flex-3", "float32", (1, 1, 1)), ("bov-3", "bfloat16", (1, 2, 3))]
)
def test_parameters_for_serving_are_those_of_the_checkpoint(make_config, tmp_path, architecture, dtype, parts):
    """Orbax's reader gives the expected values. The four heads are padded to six for three devices."""
    write_untrained(make_config(architecture), str(tmp_path))
    mesh = sharding.make_mesh(MeshConfig(*parts), jax.devices()[: math.prod(parts)])
    with contextlib.closing(TrainedModel(str(tmp_path), dtype=dtype, mesh=mesh)) as model:
        digest = Digest()
        params = model.load(lambda name: True, digest)
        assert model.digest(lambda name: True) == digest.text() != model.digest(model.is_memory)
        assert model.digest(lambda name: True, params) == digest.text()
        assert len(params["layers"]) == len(params["memory"]) == model.config.layers
        tree = {}
        for name in model.names():
            *folders, last = name.split("/")
            functools.reduce(lambda place, key: place.setdefault(key, {}), folders, tree)[last] = model.leaf(name)
    for found, leaf in zip(*map(jax.tree.leaves, (params, trained.for_serving(tree, model.config))), strict=True):
        np.testing.assert_array_equal(found, leaf, strict=True)
        assert found.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    keys_1 = (
        tree["layers"]["attention"]["k"][1] if architecture == "flex-3" else tree["upper_layers"]["attention"]["k"][0]
    )
    np.testing.assert_array_equal(params["layers"][1]["attention"]["k"], keys_1.astype(dtype))


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
