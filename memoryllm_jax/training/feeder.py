"""Feeds the train loop: batches are read ahead, padded to a size that all hosts agree on, and placed on the devices."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.training.batches import Batch, HostBatch, TrainBatches, place
from memoryllm_jax.training.sizes import Sizes
from memoryllm_jax.training.step import Trainer


class Feed(NamedTuple):
    """What one step is trained on."""

    step: int  # from 0 on
    batch: Batch
    size: int  # U, the number of ids that each batch shard's distinct ids are padded to


class Feeder:
    """Yields a `Feed` for each step from `start` to the last.

    Threads read batches ahead. Each batch is padded to the smallest of `sizes` that holds it. Hosts start to agree on
    it one step before they place the batch, so that placing it does not wait for the agreement.
    """

    def __init__(self, batches: TrainBatches, trainer: Trainer, sizes: Sizes, start: int):
        self._start, self._stop = start, len(batches)
        self._sharding = trainer.batch_sharding
        self._agreement = SizeAgreement(sizes, trainer.mesh)
        self._batches = batches.iterate(start)
        if start < self._stop:
            # The first batch is read here, before the clock of the first step starts.
            self._read()

    def _read(self) -> None:
        """Reads the next batch, and starts the agreement on its size."""
        self._upcoming: HostBatch = next(self._batches)
        self._proposal = self._agreement.propose(self._upcoming.distinct)

    def __iter__(self) -> Iterator[Feed]:
        for step in range(self._start, self._stop):
            batch = self._upcoming
            size = self._agreement.size(self._proposal)
            if step + 1 < self._stop:
                # Devices run what they are given in order. Read before this step is dispatched, the next batch has its
                # agreement computed before this step, not after it.
                self._read()
            yield Feed(step, place(batch, size, self._sharding), size)


class SizeAgreement:
    """Lets all hosts choose the same size for a batch, as they must compile and run the same step.

    A host proposes its number of distinct ids; a small reduction on the devices finds the largest of all hosts.

    Args:
      mesh: over the devices of all hosts.
    """

    def __init__(self, sizes: Sizes, mesh: Mesh):
        self._sizes = sizes
        self._devices = mesh.size
        self._one_a_device = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda counts: counts.max(), out_shardings=NamedSharding(mesh, P()))

    def propose(self, distinct: int) -> jax.Array | int:
        """Starts the reduction over hosts, without waiting for it. Returns: the argument of `size`."""
        if jax.process_count() == 1:
            return distinct
        count = np.full(1, distinct, np.int32)
        counts = jax.make_array_from_callback((self._devices,), self._one_a_device, lambda _: count)
        return self._largest(counts)

    def size(self, proposal: jax.Array | int) -> int:
        """The smallest size that holds every host's distinct ids. Waits for the reduction."""
        return self._sizes.holding(int(jax.device_get(proposal)))
