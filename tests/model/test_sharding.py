"""Meshes: widths they do not divide, the vocabulary that shards share, slices, and what crosses devices."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from lab import with_devices

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.data import dataset
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.training import batches as batches_lib
from memoryllm_jax.training import chips, collectives, loop, plan
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
        return batches_lib.place(batches[0], size, trainer.batch_sharding, config.model)

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


def plan_on(tmp_path, devices):
    """What `train --dry_run` says of a small model on so many emulated devices."""
    small = {"model.dim": 128, "model.layers": 2, "model.heads": 8, "model.vocab_size": 1000, "seq_len": 64}
    small |= {"batch_size": devices, "mesh.data": 2, "mesh.tensor": 2, "mesh.fsdp": -1, "model.dtype": "float32"}
    command = [sys.executable, "-m", "memoryllm_jax.train", "--config=configs/tiny.py:flex-3", "--dry_run"]
    command += [f"--config.{name}={value}" for name, value in small.items()]
    command += [f"--devices={devices}", "--chip=h100", f"--plan={tmp_path}/{devices}.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=with_devices(1))
    assert done.returncode == 0, done.stderr
    with open(tmp_path / f"{devices}.json") as file:
        return json.load(file)


@pytest.mark.slow
def test_plan_places_state_and_activations_on_8_16_and_64_devices(tmp_path):
    plans = {n: plan_on(tmp_path, n) for n in (8, 16, 64)}
    D, L, V = 128, 2, 1000
    C, M = 128, 216  # FFN-C and FFN-M of width 344
    for n, p in plans.items():
        assert p["mesh"] == {"data": 2, "fsdp": n // 4, "tensor": 2}
        matrices = L * (4 * D * D + 3 * D * (C + M)) + 2 * V * D
        norms = L * 3 * D + D
        held = 4 * (matrices // (n // 4) // 2 + norms)
        assert p["memory"]["parameters"] == held  # by what the executable gives back
        assert p["memory"]["optimizer"] == 2 * held + 8  # moments, and two counts
        assert p["parameters"]["total"] == matrices + norms
    # Two sequences a shard everywhere: activations do not grow, and traffic only by (g - 1) / g.
    held = [p["memory"]["activations"] for p in plans.values()]
    assert max(held) < 1.2 * min(held)
    sent = [p["collective_bytes"] for p in plans.values()]
    assert sent[0] < sent[1] < sent[2] < 1.9 * sent[0]


def test_plan_says_what_to_change(make_config, monkeypatch):

    big = {"model.vocab_size": 1000, "model.layers": 1, "batch_size": 64, "mesh.data": 2, "data.path": "embedded"}

    def planned(memory, **more):
        monkeypatch.setitem(chips.CHIPS, "h100", dataclasses.replace(chips.get("h100"), memory=memory))
        return plan.plan(make_config("memory", **big, **more), "h100", jax.devices()[:4])

    p = planned(1e9)
    assert p["fits"] and p["memory"]["largest_sequences_a_device"] > 16 and "DOES NOT FIT" not in plan.text(p)
    room = p["memory"]["fixed"] + 10 * p["memory"]["each_sequence"]
    p = planned(room)
    assert not p["fits"] and p["memory"]["largest_sequences_a_device"] == 10 and "DOES NOT FIT" in plan.text(p)
    accumulate, size = re.match(r"--config.accumulate=(\d+): ([\d.]+) GB a device", p["advice"][0]).groups()
    assert accumulate in ("2", "4", "8", "16") and float(size) <= room / 1e9 + 0.005
    with pytest.raises(UserError, match=r"--chip: expected one of a100, .*, found 'tpu'"):
        chips.get("tpu")
    with pytest.raises(UserError, match="--devices: expected up to 8 or whole nodes of 8, found 12"):
        chips.devices("h100", 12)
    with pytest.raises(UserError, match="--devices: expected a power of two from 4 on for a slice of v5p"):
        chips.devices("v5p", 24)


def test_collectives_are_counted_with_the_loops_they_are_in():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def body(x, _):
        whole = jax.lax.all_gather(x, "b", tiled=True)
        return x + jax.lax.psum(whole.reshape(4, -1).sum(0), "a"), None

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("b"), out_specs=P("b"), check_vma=False)
    def run(x):
        return jax.lax.scan(body, x, length=5)[0]

    x = jax.ShapeDtypeStruct((4 * 32,), jnp.float32)
    found = collectives.collectives(run.lower(x).compile().as_text(), 8)
    assert {(c.kind, c.group, c.times, c.operand_bytes, c.sent_bytes) for c in found} == {
        ("all-gather", (0, 1, 2, 3), 5, 128, 5 * 3 * 128),
        ("all-reduce", (0, 4), 5, 128, 5 * 128),
    }


@pytest.mark.parametrize(
    "notation, group",
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x", (0, 2)),
        ("source_target_pairs={{0,1},{1,2}}, x", (0, 1)),
        ("channel_id=1", tuple(range(8))),
    ],
)
def test_device_groups_in_all_notations(notation, group):
    assert collectives._group(notation, 8) == group
