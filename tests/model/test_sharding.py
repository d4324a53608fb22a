"""Meshes that do not divide the model's widths, and configs that do not fit a mesh."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from memoryllm_jax.checkpoint import description, store
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.data import dataset
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.training import loop
from memoryllm_jax.training.step import Trainer, is_absent

# With Muon a state has momenta of matrices and moments of AdamW.
ODD = {"model.dim": 30, "model.heads": 3, "model.ffn_dim": 103, "model.vocab_size": 517, "optimizer.name": "muon"}


def losses(config, workdir, devices):
    """The loss of each step of a training run on so many devices."""
    assert loop.train(config, str(workdir), jax.devices()[:devices]) == 0
    with open(workdir / "metrics.jsonl") as file:
        return [r["loss"] for r in map(json.loads, file) if r["kind"] == "train"]


@pytest.mark.slow
def test_padded_widths_train_as_unpadded_ones(make_config, tmp_path, monkeypatch, shared_trainers):
    """Their padding stays zero, and a run resumes with Muon, bitwise or with more or less padding."""
    rest = {"checkpoint.every": 2, "eval.batches": 1}
    whole = make_config("flex-3", **ODD, **rest)  # on one device nothing needs padding
    config = make_config("flex-3", **ODD, **rest, **{"mesh.fsdp": 4, "mesh.tensor": 2})
    with monkeypatch.context() as m:
        m.setattr(sharding, "PRODUCT_MULTIPLE", 1)
        one = losses(whole, tmp_path / "one", 1)
    assert one[0] != pytest.approx(one[-1], rel=1e-2)  # it trained
    np.testing.assert_allclose(losses(config, tmp_path / "odd", 8), one, rtol=2e-5)

    assert_padding_is_zero(config, tmp_path / "odd")

    saved = description.read(str(tmp_path / "odd"), 4).digests
    (tmp_path / "odd" / "4").rename(tmp_path / "first-4")
    losses(config, tmp_path / "odd", 8)
    assert description.read(str(tmp_path / "odd"), 4).digests == saved  # from step 2 on the same mesh: bit for bit

    for name in "one", "odd":
        (tmp_path / name / "4").rename(tmp_path / f"gone-{name}")
    # Steps 1 and 2 of before, then 3 and 4
    np.testing.assert_allclose(losses(config, tmp_path / "one", 8), one, rtol=2e-5)
    monkeypatch.setattr(sharding, "PRODUCT_MULTIPLE", 1)
    np.testing.assert_allclose(losses(whole, tmp_path / "odd", 1), one, rtol=2e-5)


def test_products_are_padded_to_multiples_on_each_device():
    with jax.set_mesh(sharding.make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices())):
        shape, axes = (24, 30, 3418), ("layers", "embed", "mlp")
        assert sharding.padded(shape, axes) == (24, 32, 3418)
        assert sharding.padded(shape, axes, 8) == (24, 32, 3424)
        assert sharding.padded((50257, 30), ("vocab", "embed"), 8) == (50272, 32)


def assert_padding_is_zero(config, workdir):
    """In parameters and optimizer state of the checkpoint of step 4."""
    config = loop.complete(config, dataset.Dataset(config.data.path))
    unpadded = transformer.unpadded_params(config.model, jax.devices()[0])
    trainer = Trainer(config, sharding.make_mesh(config.mesh))
    checkpoints = store.Checkpoints(str(workdir), keep=10)
    state = checkpoints.restore(4, trainer.state_shape)
    checkpoints.close()
    padding = []

    def check(stored, whole):
        if not is_absent(stored):
            is_padding = np.ones(stored.shape, bool)
            is_padding[tuple(slice(n) for n in whole.shape)] = False
            assert not np.asarray(stored)[is_padding].any()
            padding.append(is_padding.sum())
        return stored

    jax.tree.map(check, state["params"], unpadded)
    moments = state["opt_state"]
    optax.tree_utils.tree_map_params(trainer.optimizer, check, moments, unpadded, is_leaf=is_absent)
    assert len(padding) > 2 * len(jax.tree.leaves(unpadded)) and sum(padding) > 1000  # there is padding at all


def test_batches_and_heads_that_do_not_fit_the_mesh_are_refused(make_config):
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
    with pytest.raises(UserError, match=r"config.model.kv_heads: expected .* found 3"):  # though padding fits both
        check((1, 2, 4), model=dataclasses.replace(config.model, heads=6, kv_heads=3))
    check((1, 2, 4), model=dataclasses.replace(config.model, heads=6, kv_heads=6))  # no groups
    with pytest.raises(UserError, match=r"config.mesh: expected parts whose product is the 8 devices, found data 3"):
        check((3, -1, 1))


def test_an_axis_claimed_twice_is_an_error():
    with pytest.raises(ValueError, match="claim a mesh axis twice"):
        sharding.spec("vocab", "mlp")


def test_a_constraint_outside_a_mesh_is_an_error():
    with pytest.raises(ValueError, match="no mesh is set"):
        jax.jit(lambda x: sharding.constrain(x, "batch"))(jax.numpy.ones(8))
