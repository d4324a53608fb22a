"""What the feeder yields to the train loop, and when it reads ahead."""

import jax
import numpy as np

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding
from memoryllm_jax.training import loop
from memoryllm_jax.training.batches import TrainBatches
from memoryllm_jax.training.feeder import Feeder
from memoryllm_jax.training.sizes import Sizes
from memoryllm_jax.training.step import Trainer


def test_each_step_gets_its_batch_and_the_smallest_size_that_holds_it(make_config):
    config = make_config("memory", steps=12)
    dataset = Dataset(config.data.path)
    config = loop.complete(config, dataset)
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:2]))
    batches = TrainBatches(config, dataset, 2, [0, 1])
    counts = [batches[step].distinct for step in range(12)]
    sizes = Sizes((int(np.median(counts)), 128), most=128)
    fed = list(Feeder(batches, trainer, sizes, start=3))
    assert [step for step, _, _ in fed] == list(range(3, 12))
    assert {size for _, _, size in fed} == set(sizes.planned)
    for step, batch, size in fed:
        assert size == (128 if counts[step] > sizes.planned[0] else sizes.planned[0])
        assert batch.ids_SU.shape == (2, size)
        for shard, expected in batches[step].items():
            ids = np.asarray(batch.ids_SU)[shard]
            np.testing.assert_array_equal(ids[: len(expected.ids_U)], expected.ids_U)
            np.testing.assert_array_equal(np.asarray(batch.index_SAN)[shard], expected.index_AN)
            np.testing.assert_array_equal(np.asarray(batch.targets_SAN)[shard], expected.targets_AN)


def test_the_next_batch_is_read_before_a_step_is_dispatched(make_config):
    config = make_config("memory")
    dataset = Dataset(config.data.path)
    config = loop.complete(config, dataset)
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    batches = TrainBatches(config, dataset, 1, [0])
    read, plain = [], batches.iterate

    def watched(start):
        for step, batch in enumerate(plain(start), start):
            read.append(step)
            yield batch

    batches.iterate = watched
    for step, _, _ in Feeder(batches, trainer, batches.sizes(), start=1):
        assert read == list(range(1, min(step + 2, 4)))
