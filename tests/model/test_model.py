"""The model and its train step against a direct evaluation of the design's equations, and against PyTorch."""

import jax
import numpy as np

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding
from memoryllm_jax.training import loop
from memoryllm_jax.training.batches import SizeAgreement, TrainBatches, place
from memoryllm_jax.training.step import Trainer


def trainer_and_batch(config, devices=1, step=0):
    dataset = Dataset(config.data.path)
    config = loop.complete(config, dataset)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    trainer = Trainer(config, mesh)
    batches = TrainBatches(config, dataset, trainer.shards, list(range(trainer.shards)))
    batch = batches[step]
    size = SizeAgreement(batches.sizes(), mesh).size(batch.distinct)
    placed = place(batch, size, trainer.batch_sharding, config.model)
    windows = np.concatenate([batches._rows(step, k)[0] for k in range(trainer.shards)])
    return trainer, placed, windows, config


def gradients(params, trainer, batch):
    """((loss with z-loss, loss), gradient) as the train step makes them."""
    with jax.set_mesh(trainer.mesh):
        return jax.tree.map(np.asarray, jax.jit(trainer._gradients)(params, batch))


def assert_close(a, b, relative):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
        assert error < relative, (jax.tree_util.keystr(path), error)


def test_more_distinct_ids_than_planned_take_a_larger_size(make_config):
    """Sizes end with all there can be; at the vocabulary's size all ids are evaluated. Each gives the same gradient."""
    trainer, batch, _, config = trainer_and_batch(make_config("memory"))
    params = trainer.init(jax.random.key(0))["params"]
    dataset = Dataset(config.data.path)
    batches = TrainBatches(config, dataset, 1, [0])
    sizes = batches.sizes()
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(256, dataset.vocab_size) and len(sizes) > 1
    host = batches[0]
    agreement = SizeAgreement(sizes, trainer.mesh)
    assert agreement.size(sizes[0]) == sizes[0] and agreement.size(sizes[0] + 1) == sizes[1]
    _, expected = gradients(params, trainer, batch)
    for size in (sizes[-1], dataset.vocab_size):
        larger = place(host, size, trainer.batch_sharding, config.model)
        assert larger.ids_SU.shape == (1, size)
        assert_close(gradients(params, trainer, larger)[1], expected, 1e-6)
