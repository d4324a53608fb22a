"""The compiled train step on a mesh: where the state is placed, that token memory stays on its shard, and overlap."""

import math
import re

import hlo
import jax
import pytest

from memoryllm_jax.config import default, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding
from memoryllm_jax.training import loop
from memoryllm_jax.training.batches import TrainBatches, abstract_batch, place
from memoryllm_jax.training.step import Trainer


@pytest.fixture
def trainer_and_batch(make_config):
    """flex-3 on data 2 x fsdp 2 x tensor 2, which may skip steps, and a batch of it."""
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    config = make_config("flex-3", **mesh, **{"model.ffn_dim": 160, "optimizer.max_skipped": 3})
    dataset = Dataset(config.data.path)
    config = loop.complete(config, dataset)
    trainer = Trainer(config, sharding.make_mesh(config.mesh))
    batches = TrainBatches(config, dataset, trainer.shards, range(trainer.shards))
    return trainer, place(batches[0], batches.sizes().planned[-1], trainer.batch_sharding)


def test_state_and_batch_are_sharded_as_the_table_says_before_and_after_a_step(trainer_and_batch):
    trainer, batch = trainer_and_batch
    state = trainer.init(jax.random.key(0))
    P = jax.sharding.PartitionSpec
    expected = {
        ("embedding",): P("tensor", "fsdp"),
        ("layers", "attention", "q"): P(None, "fsdp", "tensor", None),
        ("layers", "ffn", "down"): P(None, "tensor", "fsdp"),
        ("memory", "ffn", "gate"): P(None, "fsdp", "tensor"),
        ("memory", "norm", "scale"): P(),
    }
    adam = state["opt_state"][1][0]
    for path, spec in expected.items():
        for tree in (state["params"], adam.mu, adam.nu):
            leaf = tree
            for key in path:
                leaf = leaf[key]
            named = jax.sharding.NamedSharding(trainer.mesh, spec)
            assert leaf.sharding.is_equivalent_to(named, leaf.ndim), path
    assert {s.data.shape[0] for s in batch.index_SAN.addressable_shards} == {1}
    before = jax.tree.map(lambda x: x.sharding, state)
    after, _ = trainer.train(state, batch)
    jax.tree.map(lambda x, s: None if x.sharding == s else pytest.fail(f"{x.sharding} is not {s}"), after, before)
    assert all(x.is_deleted() for x in jax.tree.leaves(state["params"]))  # donated


def test_rows_stay_on_their_shard(trainer_and_batch):
    """Read from the compiled step: each device evaluates only the rows of its shard, and no row is sent."""
    trainer, batch = trainer_and_batch
    text = trainer.train.lower(trainer.state_shape, batch).compile().as_text()
    collective = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
    crossing = [line for line in text.splitlines() if collective.search(line)]
    assert len(crossing) > 10  # the pattern finds collectives at all
    assert re.search(r'op_name="[^"]*transpose[^"]*take_rows', text)  # the backward pass of rows is named too
    assert not [line for line in crossing if "take_rows" in line]

    rows, width = batch.ids_SU.shape[1], trainer.params_shape["memory"]["ffn"]["gate"].shape[-1] // 2
    shapes = [list(map(int, shape.split(","))) for shape in re.findall(rf"f32\[([\d,]+),{width}\]", text)]
    assert [rows] in shapes or [1, rows] in shapes
    # The largest arrays of FFN-M's width are its activations, kept for all layers until the backward pass.
    assert max(map(math.prod, shapes)) == trainer.config.model.layers * rows


@pytest.mark.slow
@pytest.mark.parametrize("xla", ["default", "overlap"])
def test_overlap_gathers_weights_while_products_are_computed(chip_devices, xla):
    """In the step compiled for H100: by default each all-gather is waited for at once."""
    devices = chip_devices("h100", 8)
    c = default("flex-3")
    c.batch_size, c.seq_len, c.xla, c.mesh.fsdp = 16, 256, xla, 8
    c.model.dim, c.model.layers, c.model.heads, c.model.vocab_size, c.model.attention = 128, 4, 2, 512, "cudnn"
    config = resolve(c)
    trainer = Trainer(config, sharding.make_mesh(config.mesh, devices))
    batch = abstract_batch(config, trainer.shards, trainer.batch_sharding, 256)
    text = trainer.train.lower(trainer.state_shape, batch).compile().as_text()
    products = hlo.products_while_gathering(text)
    if xla == "default":
        assert set(products) == {0}
    else:
        assert max(products) >= 3  # those of a decoder layer in the forward pass
