"""Checkpoints: which are kept, how they are read back, failing saves, and which are refused."""

import contextlib
import copy
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.data.dataset import Dataset

STATE = {"params": {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}, "step": jnp.int32(3)}


@pytest.fixture
def checkpoints(tmp_path):
    with contextlib.closing(store.Checkpoints(str(tmp_path / "w"), keep=2, keep_every=3)) as opened:
        yield opened


def test_the_newest_and_every_third_checkpoint_are_kept(checkpoints):
    assert checkpoints.latest() is None
    for step in range(1, 8):
        checkpoints.save(step, STATE, {"of": step})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 6, 7] and checkpoints.latest() == 7
    assert checkpoints.description(3) == {"of": 3}


def test_a_state_is_restored_as_it_was_saved(checkpoints):
    checkpoints.save(7, STATE, {})
    checkpoints.wait()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(7, shapes), STATE)


def test_one_leaf_is_cut_or_padded_to_the_shape_asked_for(checkpoints):
    checkpoints.save(1, STATE, {})
    checkpoints.wait()
    (path, leaf), _ = jax.tree_util.tree_leaves_with_path(STATE["params"])
    for shape in ((1, 3), (2, 4)):
        like = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=leaf.sharding)
        found = checkpoints.restore_leaf(1, path, like)
        expected = np.pad(np.arange(6.0).reshape(2, 3), [(0, 0), (0, 1)])[: shape[0], : shape[1]]
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected)


def test_one_leaf_is_read_into_host_memory(checkpoints):
    checkpoints.save(1, STATE, {})
    checkpoints.wait()
    (path, leaf), _ = jax.tree_util.tree_leaves_with_path(STATE["params"])
    on_host = checkpoints.restore_on_host(1, path)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_array_equal(on_host, leaf, strict=True)


def test_a_failing_save_in_the_background_is_one_sentence(checkpoints, capfd):
    """A limit on file sizes acts as a full disk. The saving thread prints nothing; no unfinished checkpoint stays."""
    checkpoints.save(1, STATE, {})
    checkpoints.wait()
    workdir = checkpoints.workdir
    large = {"params": {"a": jax.random.normal(jax.random.key(0), (1000, 1000))}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        checkpoints.save(2, large, {})
        with pytest.raises(UserError) as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"{workdir}: saving a checkpoint failed: ")
    assert str(error.value).endswith(f"; the last good checkpoint is {workdir}/1")
    assert "Exception" not in capfd.readouterr().err
    assert os.listdir(workdir) == ["1"]


def test_a_damaged_checkpoint_is_named(checkpoints, tmp_path):
    checkpoints.save(1, STATE, {})
    checkpoints.wait()
    (tmp_path / "w/1/description/metadata").write_text("{")
    with pytest.raises(UserError, match=rf"^{tmp_path}/w/1: cannot be read as a checkpoint: "):
        checkpoints.description(1)


def test_urls_that_orbax_cannot_write_to_are_refused():
    with pytest.raises(ArgumentError, match=r"^workdir: expected a folder on a disk or gs://BUCKET/FOLDER, found s3"):
        store.folder("s3://b/w")
    assert store.folder("gs://b/w/") == "gs://b/w"


def test_a_checkpoint_of_another_run_is_refused_with_its_fields(make_config, data_path):
    config, dataset = make_config("memory"), Dataset(data_path)
    saved = store.describe(config, dataset, dataset.tokenizer())
    current = copy.deepcopy(saved)
    current["config"]["mesh"]["fsdp"] = 2  # one of config.RESUMABLE_FIELDS
    store.check_matches(saved, current, "w/1")
    current["config"]["seed"], current["data"]["digest"] = 3, "other"
    with pytest.raises(UserError) as error:
        store.check_matches(saved, current, "w/1")
    assert str(error.value) == (
        "w/1 is of another run: seed: 0 in the checkpoint, 3 in this run; "
        f"data: {dataset.digest!r} in the checkpoint, 'other' in this run; use another workdir or the same settings"
    )
