"""Trainers for runs in one process: runs with the same step trace and compile it once.

To trace and lower the steps is three quarters of a small run's time, and JAX keeps none of it from one Trainer to the
next.
"""

import copy
import dataclasses
import functools

from jax.sharding import Mesh

from memoryllm_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, LogConfig, SampleConfig
from memoryllm_jax.model import sharding
from memoryllm_jax.training.step import Trainer


class _Compiled(Trainer):
    """Compiles the steps for the same sizes once."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(config, mesh)
        self._compiled = set()  # copies share it

    def compile(self, *sizes) -> None:
        if sizes not in self._compiled:
            super().compile(*sizes)
            self._compiled.add(sizes)


@functools.lru_cache(maxsize=16)
def _trainer(config: Config, mesh: Mesh, product_multiple: int) -> _Compiled:
    return _Compiled(config, mesh)


def shared(config: Config, mesh: Mesh) -> Trainer:
    """As `Trainer(config, mesh)`, which shares its compiled steps with others of the same step."""
    of_step = dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(),
        eval=EvalConfig(),
        sample=SampleConfig(),
        data=DataConfig(document_mask=config.data.document_mask),
        log=LogConfig(norms_every=config.log.norms_every),
    )
    # A copy, as a test may replace its `train`
    trainer = copy.copy(_trainer(of_step, mesh, sharding.PRODUCT_MULTIPLE))
    trainer.config = config
    return trainer
