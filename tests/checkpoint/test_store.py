"""Checkpoints: which are kept, how they are read back, failing saves, and which are refused."""

import contextlib
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from lab import DESCRIPTION

from memoryllm_jax.checkpoint import description, digest, store
from memoryllm_jax.checkpoint.reader import Reader
from memoryllm_jax.common.errors import UserError

STATE = {"params": {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}, "step": jnp.int32(3)}
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


@pytest.fixture
def checkpoints(tmp_path):
    with contextlib.closing(store.Checkpoints(str(tmp_path / "w"), keep=2, keep_every=3)) as opened:
        yield opened


def test_the_newest_and_every_third_checkpoint_are_kept(checkpoints):
    assert checkpoints.latest() is None
    for step in range(1, 8):
        checkpoints.save(step, STATE, DESCRIPTION)
    checkpoints.wait()
    assert checkpoints.steps() == description.steps(checkpoints.workdir) == [3, 6, 7] and checkpoints.latest() == 7
    assert checkpoints.description(3).digests == digest.of_tree(STATE)
    assert list(digest.of_tree(STATE)) == ["params/a", "params/b/c", "step"]


@pytest.mark.parametrize("name", ["plain", "a%41 b#c", "q'\"é"])
def test_a_state_is_restored_as_it_was_saved(tmp_path, name):
    """Also where the name of the folder has characters that URLs encode."""
    workdir = str(tmp_path / name)
    with contextlib.closing(store.Checkpoints(workdir)) as checkpoints:
        checkpoints.save(7, STATE, DESCRIPTION)
        checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(7, SHAPES), STATE)
    (path, leaf), _ = jax.tree_util.tree_leaves_with_path(STATE["params"])
    with contextlib.closing(Reader(workdir)) as reader:
        np.testing.assert_array_equal(reader.leaf(7, path, SHAPES["params"]["a"]), leaf)
        np.testing.assert_array_equal(reader.leaf_on_host(7, path), leaf, strict=True)
    # docs/pods.md says that Orbax's own tools read the folder `state`.
    with ocp.StandardCheckpointer() as orbax:
        jax.tree.map(np.testing.assert_array_equal, orbax.restore(f"{workdir}/7/state"), STATE)
    assert os.listdir(tmp_path) == [name]


def test_a_failing_save_in_the_background_is_one_sentence(checkpoints, capfd):
    """A limit on file sizes acts as a full disk. The saving thread prints nothing; no unfinished checkpoint stays."""
    checkpoints.save(1, STATE, DESCRIPTION)
    checkpoints.wait()
    workdir = checkpoints.workdir
    large = {"params": {name: jax.random.normal(jax.random.key(0), (1000, 400)) for name in "abcdef"}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        checkpoints.save(2, large, DESCRIPTION)
        with pytest.raises(UserError) as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"{workdir}: saving a checkpoint failed: ")
    assert str(error.value).endswith(f"; the last good checkpoint is {workdir}/1")
    assert capfd.readouterr().err == ""
    assert os.listdir(workdir) == ["1"]


def test_a_workdir_that_was_removed_is_named(checkpoints):
    shutil.rmtree(checkpoints.workdir)
    with pytest.raises(UserError, match=r"w: saving a checkpoint failed: the folder was removed while the run was"):
        checkpoints.save(1, STATE, DESCRIPTION)
    assert not os.path.exists(checkpoints.workdir)
