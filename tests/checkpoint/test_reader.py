"""Parameters read from checkpoints: shapes, dtypes, and damage, which is always found."""

import contextlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import DESCRIPTION

from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.reader import Reader
from memoryllm_jax.common.errors import UserError

STATE = {"params": {"a": jnp.arange(60.0).reshape(20, 3), "b": {"c": jnp.ones(4)}}, "mu": {"a": jnp.ones((20, 3))}}
PATHS = dict(jax.tree_util.tree_leaves_with_path(STATE["params"]))


@pytest.fixture
def workdir(tmp_path):
    """A workdir with the checkpoints 1 and 2."""
    with contextlib.closing(store.Checkpoints(str(tmp_path / "w"), keep=2)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE, DESCRIPTION)
        checkpoints.wait()
    return tmp_path / "w"


@pytest.fixture
def reader(workdir):
    with contextlib.closing(Reader(str(workdir))) as opened:
        yield opened


def test_one_leaf_is_cut_or_padded_to_the_shape_asked_for(tmp_path):
    (path, leaf), *_ = PATHS.items()
    padded = np.pad(leaf, [(0, 4), (0, 1)])
    with contextlib.closing(store.Checkpoints(str(tmp_path))) as checkpoints:
        checkpoints.save(1, {"params": {"a": jnp.asarray(padded)}}, DESCRIPTION)
        checkpoints.wait()
    with contextlib.closing(Reader(str(tmp_path))) as reader:
        for shape in ((20, 3), (26, 3), (21, 8)):
            like = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=leaf.sharding)
            found = reader.leaf(1, path, like)
            expected = np.pad(leaf, [(0, more - size) for more, size in zip(shape, leaf.shape)])
            assert found.dtype == jnp.bfloat16
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(reader.leaf_on_host(1, path), padded, strict=True)


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"params/a": (19, 3), "params/b/c": (4,)}, None),
        (
            {"params/d": (1,)},
            "expected an array params/d, found none; the newest good checkpoint is .*/1: to use it, .*/2$",
        ),
        ({"params/a": (21, 3)}, r"params/a: expected the shape \(21, 3\), found \(20, 3\)"),
        ({"params/a": (20, 3, 1)}, r"params/a: expected the shape \(20, 3, 1\), found \(20, 3\)"),
    ],
)
def test_shapes_are_checked_before_arrays_are_read(reader, wanted, message):
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        reader.check_shapes(2, wanted)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_flipped_bit_is_found_or_harmless(workdir):
    """Bits of every file of a checkpoint, with its metadata and indices, drawn at random with a fixed seed."""
    files = sorted(path for path in (workdir / "2").rglob("*") if path.is_file())
    draw = random.Random(0)
    kinds, refused = set(), 0
    for path in files:
        whole = path.read_bytes()
        for flips in range(4):
            flip(path, draw.randrange(8 * len(whole)))
            try:
                with contextlib.closing(Reader(str(workdir))) as reader:
                    for key, leaf in PATHS.items():
                        like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                        # Onto devices Orbax reads, into host memory TensorStore.
                        found = reader.leaf(2, key, like) if flips % 2 else reader.leaf_on_host(2, key)
                        np.testing.assert_array_equal(found, leaf)
            except UserError as error:
                refused += 1
                kinds.add(path.name[:4])
                assert str(error).startswith(f"{workdir}/2") and "\n" not in str(error)
            path.write_bytes(whole)
    assert refused > len(files) and len(kinds) > 3


@pytest.mark.parametrize("where", ["device", "host"])
def test_arrays_with_other_values_than_were_saved_are_refused(workdir, tmp_path, where):
    other = STATE | {"params": {"a": STATE["params"]["a"].at[7, 1].add(1e-3), "b": STATE["params"]["b"]}}
    with contextlib.closing(store.Checkpoints(str(tmp_path / "other"))) as checkpoints:
        checkpoints.save(2, other, DESCRIPTION)
        checkpoints.wait()
    shutil.rmtree(workdir / "2/state")
    shutil.copytree(tmp_path / "other/2/state", workdir / "2/state")
    (path, leaf), *_ = PATHS.items()
    message = (
        rf"^{workdir}/2: parameter a is damaged: expected the digest .*; the newest good checkpoint is {workdir}/1: "
    )
    with contextlib.closing(Reader(str(workdir))) as reader, pytest.raises(UserError, match=message):
        if where == "device":
            reader.leaf(2, path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding))
        else:
            reader.leaf_on_host(2, path)
