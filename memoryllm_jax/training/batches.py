"""Batches out of prepared token shards: globally shuffled, and found again from the step number.

The training text is one stream of tokens cut into windows of seq_len. Grain shuffles the windows anew each epoch
and gives random access to the result, so the batch of any step is a function of (data, seed, step): resuming needs
one integer, and any number of hosts reads the same global batches, each its own batch shards only.

Shards on a disk are memory-mapped. Of those behind a URL each window is one ranged read, and all windows of a batch
shard are under way at once.
"""

import abc
import bisect
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config, ModelConfig
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model.sharding import batch_shards


class Batch(NamedTuple):
    """Positions of one optimizer step, by batch shard S and micro-batch A, with N positions in each.

    ids_SU: distinct token ids of a shard's positions, all micro-batches together, padded to U; or, as [1, U], the whole
      vocabulary, of which each shard evaluates a part for all.
    index_SAN: which of them each position holds.
    targets_SAN, weights_SAN: the next token, and its weight in the loss: 0 where there is none.
    """

    ids_SU: jax.Array
    index_SAN: jax.Array
    targets_SAN: jax.Array
    weights_SAN: jax.Array


_SAMPLES = 16  # batch shards looked at to plan the number of distinct ids
_GROWTH = 1.25  # between the sizes that distinct ids are padded to


class HostBatch(dict):
    """{batch shard: (distinct ids, index, targets, weights)} of this host's shards."""

    @property
    def distinct(self) -> int:
        """The largest number of distinct ids of a shard."""
        return max(len(ids) for ids, *_ in self.values())


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique(ids, return_inverse=True), by marks on the vocabulary: several times as fast as a sort."""
    seen = np.zeros(ids.max() + 1, bool)
    seen[ids] = True
    distinct = np.flatnonzero(seen)
    place = np.empty(len(seen), np.int32)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[ids]


class Batches(abc.ABC):
    """Batches by number, as a Grain source: training steps, or the held-out split from its start to its end.

    Args:
      shards: number of batch shards.  local: those of this host.
    """

    def __init__(self, config: Config, shards: int, local: list[int]):
        self.config, self.shards, self.local = config, shards, local
        self.rows = config.batch_size // shards  # sequences a shard
        self.micro = config.accumulate

    def __getitem__(self, step) -> HostBatch:
        return HostBatch({k: self._shard(*self._rows(int(step), k)) for k in self.local})

    @abc.abstractmethod
    def _rows(self, step, shard):
        """(windows [rows, T+1], weights [rows, T]) of one batch shard."""

    def _shard(self, windows, weights):
        inputs = np.ascontiguousarray(windows[:, :-1]).reshape(-1)
        if self.config.model.unique_tokens:
            ids, index = _distinct(inputs)
        else:
            ids, index = inputs, np.arange(len(inputs))
        micro = (self.micro, -1)
        return (
            ids.astype(np.int32),
            index.reshape(micro).astype(np.int32),
            windows[:, 1:].reshape(micro).astype(np.int32),
            weights.reshape(micro).astype(np.float32),
        )

    def sizes(self) -> list[int]:
        """What distinct ids are padded to: a size that nearly every batch fits, and larger ones up to all there are.

        The plan comes from batches spread over the data, so it is the same on every host and after a restart.
        """
        most = self.rows * self.config.seq_len
        if not self.config.model.unique_tokens:
            return [most]
        most = min(most, self.config.model.vocab_size)
        steps = np.unique(np.linspace(0, len(self) - 1, _SAMPLES).astype(int))
        shards = range(0, self.shards, -(-self.shards // max(1, _SAMPLES // len(steps))))
        counts = [len(np.unique(self._rows(int(s), k)[0][:, :-1])) for s in steps for k in shards]
        quantum = 128 if most >= 4096 else 8
        size, sizes = np.mean(counts) + 3 * np.std(counts), []
        while not sizes or sizes[-1] < most:
            sizes.append(min(most, -(-int(size) // quantum) * quantum))
            size = max(size, sizes[-1]) * _GROWTH
        return sizes


class TrainBatches(Batches):
    """Windows of seq_len + 1 tokens, the last of one being the first of the next, shuffled anew each epoch."""

    def __init__(self, config, dataset: Dataset, shards, local):
        super().__init__(config, shards, local)
        self.tokens = dataset.train
        self.windows = (self.tokens.tokens - 1) // config.seq_len
        if not self.windows:
            raise UserError(
                f"config.seq_len: {config.seq_len} tokens are more than {dataset.path} has to train on, "
                f"{dataset.train.tokens}"
            )
        epochs = config.steps * config.batch_size / self.windows
        if epochs > config.data.epochs:
            needed = -(-config.steps * config.batch_size // self.windows)
            raise UserError(
                f"config.data.epochs: {config.steps} steps of {config.batch_size} sequences need {epochs:.2f} epochs "
                f"of {dataset.path}, which has {self.windows} sequences; set it to {needed}, or train fewer steps"
            )
        source = grain.MapDataset.range(self.windows).seed(config.seed).shuffle()
        self._order = source.repeat(config.data.epochs) if config.data.epochs > 1 else source

    def __len__(self):
        return self.config.steps

    def epoch(self, step: int) -> float:
        """Passes over the training tokens made before this step."""
        return step * self.config.batch_size / self.windows

    def _rows(self, step, shard):
        T, first = self.config.seq_len, step * self.config.batch_size + shard * self.rows
        starts = [int(self._order[i]) * T for i in range(first, first + self.rows)]
        return np.stack(self.tokens.read_each(starts, T + 1)), np.ones((self.rows, T), np.float32)

    def iterate(self, start: int):
        """HostBatches of steps start, start + 1, ..., read ahead by threads."""
        d = self.config.data
        options = grain.ReadOptions(num_threads=d.threads, prefetch_buffer_size=d.prefetch)
        return iter(grain.MapDataset.source(self)[start:].to_iter_dataset(options))


class ValidationBatches(Batches):
    """Every held-out token is a target once, but for the stream's first; positions past the end have no weight."""

    def __init__(self, config, dataset: Dataset, shards, local):
        super().__init__(config, shards, local)
        self.tokens = dataset.validation
        if self.tokens.tokens < 2:
            raise UserError(f"{dataset.path}: expected held-out tokens, found {self.tokens.tokens}")

    def __len__(self):
        batches = -(-(self.tokens.tokens - 1) // (self.config.batch_size * self.config.seq_len))
        return min(batches, self.config.eval.batches or batches)

    def _rows(self, step, shard):
        T = self.config.seq_len
        windows, weights = np.zeros((self.rows, T + 1), np.int64), np.zeros((self.rows, T), np.float32)
        first = (step * self.config.batch_size + shard * self.rows) * T
        starts = [start for start in range(first, first + self.rows * T, T) if start < self.tokens.tokens - 1]
        for row, window in enumerate(self.tokens.read_each(starts, T + 1)):
            windows[row, : len(window)] = window
            weights[row, : len(window) - 1] = 1
        return windows, weights


def local_shards(sharding: NamedSharding, shards: int) -> list[int]:
    """Batch shards that this host's devices hold."""
    slices = sharding.addressable_devices_indices_map((shards,)).values()
    return sorted({index[0].indices(shards)[0] for index in slices})


def place(batch: HostBatch, size: int, sharding: NamedSharding, model: ModelConfig) -> Batch:
    """The batch as global arrays, its distinct ids padded to `size`; at the vocabulary's size they are all ids."""
    shards = batch_shards(sharding.mesh)
    whole = is_vocabulary(size, model)

    def padded(shard):
        ids, index, *rest = batch[shard]
        return (None, ids[index], *rest) if whole else (np.pad(ids, (0, size - len(ids))), index, *rest)

    parts = {shard: padded(shard) for shard in batch}

    def placed(field):
        shape = (shards, *next(iter(parts.values()))[field].shape)
        return jax.make_array_from_callback(
            shape, sharding, lambda index: parts[index[0].indices(shards)[0]][field][None]
        )

    ids = vocabulary(size, sharding) if whole else placed(0)
    return Batch(ids, *(placed(field) for field in range(1, len(Batch._fields))))


def is_vocabulary(size: int, model: ModelConfig) -> bool:
    """Whether ids padded to `size` are all there are, of which all shards share one set of rows."""
    return model.unique_tokens and size == model.vocab_size


def vocabulary(size: int, sharding: NamedSharding) -> jax.Array:
    """[1, V] all token ids, the last one repeated until the batch shards divide them, each of which holds a part."""
    shards = batch_shards(sharding.mesh)
    ids = np.minimum(np.arange(-(-size // shards) * shards, dtype=np.int32), size - 1)[None]
    where = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec))
    return jax.make_array_from_callback(ids.shape, where, lambda index: ids[index])


class SizeAgreement:
    """The size that all hosts pad a step's distinct ids to, agreed on the devices without waiting for them.

    `propose` sends this host's count before the step before is dispatched; by the time the size is needed, that
    small reduction is long done.
    """

    def __init__(self, sizes: list[int], mesh):
        self.sizes, self.several = sizes, jax.process_count() > 1
        self._sharding = NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        replicated = NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._largest = jax.jit(lambda counts: counts.max(), out_shardings=replicated)
        self._devices = mesh.size

    def propose(self, distinct: int):
        if not self.several:
            return distinct
        count = np.full(1, distinct, np.int32)
        counts = jax.make_array_from_callback((self._devices,), self._sharding, lambda _: count)
        return self._largest(counts)

    def size(self, proposal) -> int:
        distinct = int(jax.device_get(proposal))
        return self.sizes[bisect.bisect_left(self.sizes, distinct)]
