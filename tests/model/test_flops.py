"""The documented formula of FLOPs against XLA's count."""

import jax
import pytest

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import flops, sharding
from memoryllm_jax.training import loop
from memoryllm_jax.training.batches import TrainBatches, place
from memoryllm_jax.training.step import Trainer


def test_flops_formula_against_xla(make_config):
    """Matrix products dominate at this width, so XLA's count of a forward pass is near the formula."""
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
    # The formula does not count the masked half of attention's scores, which XLA's plain attention computes.
    masked = 2 * tokens * config.model.dim * config.seq_len
    formula = flops.train_flops(config, tokens, tokens) / 3 + masked
    assert counted == pytest.approx(formula, rel=0.04)


def test_flops_fall_with_the_rows_that_are_evaluated(make_config):
    """A row costs three products with FFN-M's width in the forward pass, and twice that in the backward pass."""
    config = make_config("flex-3")
    saved = flops.train_flops(config, 1000, 1000) - flops.train_flops(config, 1000, 250)
    assert saved == 3 * 750 * config.model.layers * 6 * config.model.dim * config.model.memory_dim
