"""The documented formula of FLOPs against XLA's count."""

import jax
import pytest

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import flops, sharding
from memoryllm_jax.training import loop
from memoryllm_jax.training.batches import TrainBatches, place
from memoryllm_jax.training.step import Trainer


def test_flops_formula_against_xla(make_config):
    """Matrix products dominate at this width, so XLA's own count of a forward pass agrees but for half the scores."""
    overrides = {"model.dim": 128, "model.heads": 2, "model.layers": 1, "seq_len": 512, "model.attention": "plain"}
    config = make_config(
        "flex-3", batch_size=2, **overrides, **{"model.loss_chunk": 10_000, "model.unique_tokens": False}
    )
    dataset = Dataset(config.data.path)
    config = loop.complete(config, dataset)
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    tokens = config.batch_size * config.seq_len
    batch = place(TrainBatches(config, dataset, 1, [0])[0], tokens, trainer.batch_sharding)
    counted = trainer.evaluate.lower(trainer.params_shape, batch).compile().cost_analysis()["flops"]
    scores = 2 * tokens * config.model.dim * config.seq_len  # the masked half, which XLA's plain attention computes
    formula = flops.train_flops(config, tokens, tokens) / 3 + scores
    assert counted == pytest.approx(formula, rel=0.04)


def test_flops_of_rows(make_config):
    """A row of token memory is three products with FFN-M's width, in a forward pass and twice in a backward pass."""
    config = make_config("flex-3")
    fewer = flops.train_flops(config, 1000, 1000) - flops.train_flops(config, 1000, 250)
    assert fewer == 3 * 750 * config.model.layers * 6 * config.model.dim * config.model.memory_dim
