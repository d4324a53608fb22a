"""Meshes: widths they do not divide, the vocabulary that shards share, slices, and what crosses devices."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.data import dataset
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.training import batches as batches_lib
from memoryllm_jax.training import collectives, loop
from memoryllm_jax.training.batches import TrainBatches
from memoryllm_jax.training.step import Trainer

ODD = {"model.dim": 30, "model.heads": 3, "model.ffn_dim": 103, "model.vocab_size": 517, "eval.batches": 1}


def losses(config, workdir, devices):
    assert loop.train(config, str(workdir), jax.devices()[:devices]) == 0
    with open(workdir / "metrics.jsonl") as file:
        return [r["loss"] for r in map(json.loads, file) if r["kind"] == "train"]


@pytest.mark.slow
def test_widths_that_the_mesh_does_not_divide_train_as_one(make_config, tmp_path):
    """And what they are padded with stays zero, and is cut off where another mesh goes on."""
    one = losses(make_config("flex-3", **ODD), tmp_path / "one", 1)
    config = make_config("flex-3", **ODD, **{"mesh.fsdp": 4, "mesh.tensor": 2, "checkpoint.every": 2})
    assert one[0] != pytest.approx(one[-1], rel=1e-2)  # it trained
    np.testing.assert_allclose(losses(config, tmp_path / "odd", 8), one, rtol=2e-5)

    config = loop.complete(config, dataset.Dataset(config.data.path))
    true = transformer.abstract_params(
        transformer.LanguageModel(config.model), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    )
    trainer = Trainer(config, sharding.make_mesh(config.mesh))
    checkpoints = store.Checkpoints(str(tmp_path / "odd"), read_only=True)
    state = checkpoints.restore(4, trainer.state_shape)
    checkpoints.close()
    adam = state["opt_state"][1][0]
    padding = 0
    for tree in (state["params"], adam.mu, adam.nu):
        for stored, whole in zip(jax.tree.leaves(tree), jax.tree.leaves(true)):
            outside = np.ones(stored.shape, bool)
            outside[tuple(slice(n) for n in whole.shape)] = False
            assert not np.asarray(stored)[outside].any()
            padding += outside.sum()
    assert padding > 1000

    (tmp_path / "odd" / "4").rename(tmp_path / "gone")
    more = losses(make_config("flex-3", **ODD), tmp_path / "odd", 1)  # from step 2 on
    np.testing.assert_allclose(more, one, rtol=2e-5)


def compiled_step(config, devices=8):
    """(trainer, place: size -> Batch of step 0, HLO text by size)"""
    config = loop.complete(config, dataset.Dataset(config.data.path))
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
    batches = TrainBatches(config, dataset.Dataset(config.data.path), trainer.shards, range(trainer.shards))

    def place(size):
        return batches_lib.place(batches[0], size, trainer.batch_sharding)

    return trainer, place, lambda size: trainer.train.lower(trainer.state_shape, place(size)).compile()


def test_rows_stay_on_their_shard_unless_the_vocabulary_is_shared(make_config):
    """Read off the compiled steps: what crosses devices, and how many rows each device evaluates."""
    config = make_config("memory", **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "accumulate": 2})
    trainer, place, compiled = compiled_step(config)
    V, F = trainer.config.model.vocab_size, trainer.config.model.memory_dim // 2
    crossing = {}
    for size in (256, V):
        text = compiled(size).as_text()
        assert re.search(r'op_name="[^"]*transpose[^"]*take_rows', text)  # its backward pass is named too
        crossing[size] = [c.kind for c in collectives.collectives(text, 8) if "take_rows" in c.name]
        shapes = set(re.findall(rf"f32\[(?:1,)?(\d+),{F}\]", text))
        assert str(size if size < V else V // 4) in shapes and (size < V or str(V) not in shapes)
    assert not crossing[256] and crossing[V]

    step = lambda size: trainer.train(trainer.init(jax.random.key(0)), place(size))  # noqa: E731
    (own, own_values), (shared, shared_values) = step(256), step(V)
    np.testing.assert_allclose(own_values["loss"], shared_values["loss"], rtol=1e-6)
    np.testing.assert_allclose(own_values["grad_norm"], shared_values["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(own["opt_state"][1][0].mu), jax.tree.leaves(shared["opt_state"][1][0].mu)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_vocabulary_of_many_tokens_is_shared_in_training(make_config, tmp_path):
    """Enough tokens a shard that all ids occur: the run takes the shared rows by itself, and counts them once."""
    overrides = {"model.vocab_size": 512, "seq_len": 256, "mesh.fsdp": 2}
    shared = losses(make_config("memory", batch_size=64, steps=2, **overrides), tmp_path / "shared", 2)
    overrides["model.unique_tokens"] = False
    plain = losses(make_config("memory", batch_size=64, steps=2, **overrides), tmp_path / "plain", 2)
    np.testing.assert_allclose(shared, plain, rtol=2e-6)
    with open(tmp_path / "shared" / "metrics.jsonl") as file:
        assert json.loads(file.readline())["rows"] == 512


def test_batches_and_meshes_that_do_not_fit_are_refused(make_config):
    config = make_config("flex-3")

    def check(mesh, **changes):
        changed = dataclasses.replace(config, **changes)
        sharding.check_mesh(changed, sharding.make_mesh(MeshConfig(*mesh)))

    check((2, 2, 2))
    with pytest.raises(UserError, match=r"config.batch_size: expected a multiple of .* = 8, found 12"):
        check((1, 8, 1), batch_size=12)
    grouped = dataclasses.replace(config.model, heads=8, kv_heads=2)
    check((2, 2, 2), model=grouped)
    with pytest.raises(
        UserError, match=r"config.model.kv_heads: expected a multiple of config.mesh.tensor = 4,.*found 2"
    ):
        check((1, 2, 4), model=grouped)
    with pytest.raises(UserError, match=r"config.mesh: expected parts whose product is the 8 devices, found data 3"):
        check((3, -1, 1))


def test_an_axis_claimed_twice_is_an_error():
    with pytest.raises(ValueError, match="claim a mesh axis twice"):
        sharding.spec("vocab", "mlp")
    with pytest.raises(ValueError, match="no mesh is set"):
        jax.jit(lambda x: sharding.constrain(x, "batch"))(jax.numpy.ones(8))
