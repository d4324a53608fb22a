"""The batches of a run on its devices, read ahead, and the size of each agreed on by all hosts."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.training.batches import Batch, HostBatch, TrainBatches, place, smallest_size
from memoryllm_jax.training.step import Trainer


class Feed(NamedTuple):
    """A step's number, its batch on the devices, and the size U that its distinct ids are padded to."""

    step: int
    batch: Batch
    size: int


class Feeder:
    """Yields the batches of steps `start` to the last, ready on the devices.

    Threads read batches ahead. The size of a batch is proposed to the other hosts one step early, so that their answer
    is there when the batch is placed.
    """

    def __init__(self, batches: TrainBatches, trainer: Trainer, start: int):
        self.sizes = batches.sizes()
        self._start, self._stop = start, len(batches)
        self._sharding = trainer.batch_sharding
        self._agreement = SizeAgreement(self.sizes, trainer.mesh)
        self._batches = batches.iterate(start)
        if start < self._stop:
            # The first batch is read here, so that the clock of the first step does not count it.
            self._read()

    def _read(self) -> None:
        self._upcoming: HostBatch = next(self._batches)
        self._proposal = self._agreement.propose(self._upcoming.distinct)

    def __iter__(self) -> Iterator[Feed]:
        for step in range(self._start, self._stop):
            batch, size = self._upcoming, self._agreement.size(self._proposal)
            if step + 1 < self._stop:
                # Before this step is dispatched: on the devices, the hosts' reduction then runs ahead of the step.
                self._read()
            yield Feed(step, place(batch, size, self._sharding), size)


class SizeAgreement:
    """Has all hosts pad a step's distinct ids to one size, without waiting for each other.

    A host proposes its number of distinct ids; a small reduction on the devices finds the largest of all hosts.

    Args:
      sizes: rising; the last one holds every batch.
    """

    def __init__(self, sizes: list[int], mesh: Mesh):
        self._sizes, self._several = sizes, jax.process_count() > 1
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = jax.jit(lambda counts: counts.max(), out_shardings=NamedSharding(mesh, P()))
        self._devices = mesh.size

    def propose(self, distinct: int) -> jax.Array | int:
        """Dispatches the reduction over the hosts and returns what `size` takes."""
        if not self._several:
            return distinct
        count = np.full(1, distinct, np.int32)
        counts = jax.make_array_from_callback((self._devices,), self._sharding, lambda _: count)
        return self._largest(counts)

    def size(self, proposal: jax.Array | int) -> int:
        """The size that holds the ids of all hosts. Waits for the reduction."""
        return smallest_size(self._sizes, int(jax.device_get(proposal)))
