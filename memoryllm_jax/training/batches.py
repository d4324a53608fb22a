"""Batches from prepared data: shuffled globally, and a function of the step's number.

A sequence is a function of (data, seed, its number), as order.py says, so the batch of any step is a function of (data,
seed, step). A run therefore resumes from the number of its step alone, and any number of hosts makes the same global
batches; each host reads only its own batch shards.

Each batch shard comes with its distinct token ids, as the token memory is evaluated once for each of them. Their number
is padded to one of a few sizes (sizes.py).
"""

import abc
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data import document_starts
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import bigrams, memories
from memoryllm_jax.model.sharding import batch_shards
from memoryllm_jax.training import sizes
from memoryllm_jax.training.order import Order
from memoryllm_jax.training.sizes import Sizes

# Tokens that are read to plan the sizes, and the bounds of the number of batch shards that they make up. Of 64 shards
# or more, the standard deviation of the counts is known within 10%.
_SAMPLED_TOKENS = 1 << 23
_FEWEST_SAMPLES, _MOST_SAMPLES = 16, 256
_READ_TOKENS = 1 << 20  # of them, read at a time


class Batch(NamedTuple):
    """The batch of one optimizer step on the devices: S batch shards of A micro-batches of N positions.

    ids_SU: the distinct token ids of each shard, in all of its micro-batches, padded to U; int32.
    index_SAN: where each position's token id stands in its shard's ids; int32.
    targets_SAN: the token after each position; int32.
    weights_SAN: weight of each target in the loss, 0 where there is no target; float32.
    start_SAN: the position in its sequence at which each position's document begins, int32; None without
      config.data.document_mask.
    row_ids_SU: the rows that the ids read of the token memory, int32; None if these are those of the ids.
    """

    ids_SU: jax.Array
    index_SAN: jax.Array
    targets_SAN: jax.Array
    weights_SAN: jax.Array
    start_SAN: jax.Array | None = None
    row_ids_SU: jax.Array | None = None


class Windows(NamedTuple):
    """The sequences of one batch shard, as they are read.

    ids: token ids [sequences, T+1]; each sequence ends with its last target.
    weights: weights of the targets [sequences, T].
    """

    ids: np.ndarray
    weights: np.ndarray


class ShardBatch(NamedTuple):
    """One batch shard of a `Batch` on its host, before its ids are padded. Fields as in `Batch`."""

    ids_U: np.ndarray
    index_AN: np.ndarray
    targets_AN: np.ndarray
    weights_AN: np.ndarray
    start_AN: np.ndarray | None
    row_ids_U: np.ndarray | None = None


class HostBatch(dict[int, ShardBatch]):
    """{number of the batch shard: ShardBatch}, for the batch shards of this host."""

    @property
    def distinct(self) -> int:
        """The largest number of distinct ids in a batch shard."""
        return max(len(shard.ids_U) for shard in self.values())


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique(ids, return_inverse=True), several times as fast: marks ids in an array instead of sorting them."""
    seen = np.zeros(ids.max() + 1, bool)
    seen[ids] = True
    distinct = np.flatnonzero(seen)
    place = np.empty(len(seen), np.int32)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[ids]


class Batches(abc.ABC):
    """A sequence of batches, which Grain can read from: `batches[number]` is a `HostBatch`.

    Args:
      shards: number of batch shards, of all hosts.
      local: numbers of this host's batch shards.
    Attributes:
      is_mixture: whether the data's folders have weights.
    """

    def __init__(self, config: Config, dataset: Dataset, shards: int, local: list[int]):
        self.config, self.shards, self.local = config, shards, local
        self.is_mixture = bool(dataset.shares)
        self.sequences = config.batch_size // shards  # sequences of a batch shard
        self._first_id = document_starts.first_id(dataset, dataset.path) if config.data.document_mask else None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, step) -> HostBatch:
        # All shards in one call, which reads them concurrently: object storage takes about one round trip for a batch.
        windows = self.windows([(int(step), shard) for shard in self.local])
        return HostBatch({shard: self.shard_batch(found) for shard, found in zip(self.local, windows, strict=True)})

    @abc.abstractmethod
    def windows(self, places: Sequence[tuple[int, int]]) -> list[Windows]:
        """Reads batch shards, each given as (step, number of the shard). Raises: UserError."""

    def shard_batch(self, read: Windows) -> ShardBatch:
        """Splits the sequences of one batch shard into inputs and targets, and finds the distinct ids."""
        windows, weights = read
        start = None
        if self._first_id is not None:
            start = document_starts.starts(windows[:, :-1], self._first_id)
        ids, row_ids, index = self._entries(windows[:, :-1], start)
        by_micro_batch = (self.config.accumulate, -1)
        return ShardBatch(
            ids.astype(np.int32),
            index.reshape(by_micro_batch).astype(np.int32),
            windows[:, 1:].reshape(by_micro_batch).astype(np.int32),
            weights.reshape(by_micro_batch).astype(np.float32),
            None if start is None else start.reshape(by_micro_batch),
            row_ids,
        )

    def _entries(self, inputs_BT: np.ndarray, start_BT: np.ndarray | None):
        """(distinct ids, the rows that they read or None, the place of each position's id among them)."""
        m = self.config.model
        inputs = np.ascontiguousarray(inputs_BT).reshape(-1)
        row_ids = None
        if memories.of(m).by_bigram:
            is_first_BT = None if start_BT is None else start_BT == np.arange(start_BT.shape[1])
            row_ids = bigrams.row_ids(inputs_BT, m.vocab_size, is_first_BT).reshape(-1)
        if not m.unique_tokens:
            # Each position stands for a distinct id, so that the step is the same code with and without unique_tokens.
            return inputs, row_ids, np.arange(len(inputs))
        if row_ids is not None:
            return bigrams.distinct(inputs, row_ids)
        ids, index = _distinct(inputs)
        return ids, None, index

    def sizes(self) -> Sizes:
        """Numbers of ids that distinct ids are padded to, planned for all batch shards and steps (`sizes.plan`).

        They follow from batches spread over all steps, so they are the same on every host and after a restart.
        """
        positions = self.sequences * self.config.seq_len
        if not self.config.model.unique_tokens:
            return Sizes((positions,), positions)
        counts = self._sampled_counts()
        most = most_entries(self.config, positions)
        return sizes.plan(np.mean(counts), np.std(counts), self.shards, len(self), most, self.one_size, max(counts))

    @property
    def one_size(self) -> bool:
        """Whether one size serves all steps. Without a token memory, padding costs no more than a lookup."""
        return not self.config.model.row_dim

    def attention_share(self) -> float:
        """The share of causal attention's pairs that the config leaves unmasked, in batches spread over all steps."""
        if self._first_id is None:
            return 1.0
        shares = [
            document_starts.attention_share(document_starts.starts(ids[:, :-1], self._first_id))
            for ids in self._sampled_windows()
        ]
        return float(np.mean(shares))

    def _sampled_counts(self) -> list[int]:
        """The number of distinct ids in each of some batch shards, spread over all steps."""
        return [len(self._entries(ids[:, :-1], None)[0]) for ids in self._sampled_windows()]

    def _sampled_windows(self) -> Iterator[np.ndarray]:
        """Yields the token ids [sequences, T+1] of some batch shards, spread over all steps."""
        positions = self.sequences * self.config.seq_len
        samples = min(max(_SAMPLED_TOKENS // positions, _FEWEST_SAMPLES), _MOST_SAMPLES)
        numbers = np.unique(np.linspace(0, len(self) * self.shards - 1, samples).astype(int))
        at_a_time = max(1, _READ_TOKENS // positions)
        for first in range(0, len(numbers), at_a_time):
            places = [divmod(int(number), self.shards) for number in numbers[first : first + at_a_time]]
            for ids, _ in self.windows(places):
                yield ids


class TrainBatches(Batches):
    """Windows of seq_len + 1 tokens, shuffled anew each epoch. Neighbours share a token: last target, first input.

    Attributes:
      tokens: the training split.
      order: of the sequences.
    """

    def __init__(self, config: Config, dataset: Dataset, shards: int, local: list[int]):
        super().__init__(config, dataset, shards, local)
        self.tokens = dataset.train
        self.order = Order(config, dataset)

    def __len__(self):
        return self.config.steps

    def epoch(self, step: int) -> float:
        """Number of passes over the training tokens that are made before this step; the most of a mixture's sources."""
        return max(self.order.epochs(step))

    @property
    def bytes_a_token(self) -> float:
        """Bytes of text in a token: of all training tokens; in a mixture, the mean over its sources by their shares."""
        return sum(float(source.share) * (source.train.bytes / source.train.tokens) for source in self.order.sources)

    def windows(self, places):
        T, count = self.config.seq_len, self.sequences
        starts = []
        for step, shard in places:
            first = step * self.config.batch_size + shard * count  # number of its first sequence
            starts += [self.order.start(number) for number in range(first, first + count)]
        read = self.tokens.read_each(starts, T + 1)
        weights = np.ones((count, T), np.float32)
        return [Windows(np.stack(read[i : i + count]), weights) for i in range(0, len(read), count)]

    def iterate(self, start: int) -> Iterator[HostBatch]:
        """Yields the batches of steps start, start + 1, ..., which threads read ahead."""
        d = self.config.data
        # Batches are sliced, not skipped: a run that resumes reads none of those before `start`.
        options = grain.ReadOptions(num_threads=d.threads, prefetch_buffer_size=d.prefetch)
        return iter(grain.MapDataset.source(self)[start:].to_iter_dataset(options))


class ValidationBatches(Batches):
    """Held-out windows in order. Every token but the first is a target once; positions past the end have weight 0.

    The sources of a mixture follow one another, each from the start of a batch, so that a batch is of one source. The
    batches of config.eval.batches are divided among them in proportion, rounded up.

    Attributes:
      tokens: the held-out split.
      sources: those that have held-out tokens to predict.
    """

    def __init__(self, config: Config, dataset: Dataset, shards: int, local: list[int]):
        super().__init__(config, dataset, shards, local)
        self.tokens = dataset.validation
        self.sources = [source for source in dataset.sources if source.validation.tokens > 1]
        if not self.sources:
            raise UserError(f"{dataset.path}: expected held-out tokens, found {self.tokens.tokens}")
        tokens = config.batch_size * config.seq_len
        whole = [-(-(source.validation.tokens - 1) // tokens) for source in self.sources]
        wanted = min(sum(whole), config.eval.batches or sum(whole))
        self._numbers = [
            (source, number)
            for source, batches in enumerate(whole)
            for number in range(-(-wanted * batches // sum(whole)))
        ]

    def __len__(self):
        return len(self._numbers)

    @property
    def one_size(self):
        return True  # padding costs little without a backward pass

    def source_of(self, number: int) -> int:
        """The index in `sources` of the source that a batch is of."""
        return self._numbers[number][0]

    def windows(self, places):
        T, count = self.config.seq_len, self.sequences
        spans = []
        for step, shard in places:
            source, number = self._numbers[step]
            held_out = self.sources[source].validation
            first, end = held_out.start + (number * self.shards + shard) * count * T, held_out.start + held_out.tokens
            # A window that would begin with the last token has no target.
            spans.append([(start, end) for start in range(first, first + count * T, T) if start < end - 1])
        read = iter(self.tokens.read_each([start for of_shard in spans for start, _ in of_shard], T + 1))
        # A source's last window is cut off where the next source begins.
        return [self._padded([next(read)[: end - start] for start, end in of_shard]) for of_shard in spans]

    def _padded(self, windows: list[np.ndarray]) -> Windows:
        """The sequences of one batch shard. The last window of the split is shorter, and none follow it."""
        T, count = self.config.seq_len, self.sequences
        ids = np.zeros((count, T + 1), np.int64)
        weights = np.zeros((count, T), np.float32)
        for sequence, window in enumerate(windows):
            ids[sequence, : len(window)] = window
            weights[sequence, : len(window) - 1] = 1
        return Windows(ids, weights)


def most_entries(config: Config, positions: int) -> int:
    """The most distinct ids, or bigrams, that a batch shard of so many positions may have."""
    return positions if memories.of(config.model).by_bigram else min(positions, config.model.vocab_size)


def local_shards(sharding: NamedSharding, shards: int) -> list[int]:
    """Numbers of the batch shards that this host's devices hold."""
    slices = sharding.addressable_devices_indices_map((shards,)).values()
    return sorted({index[0].indices(shards)[0] for index in slices})


def abstract_batch(config: Config, shards: int, sharding: NamedSharding, size: int) -> Batch:
    """The shapes, dtypes and shardings of a batch whose shards' ids are padded to `size`, to compile a step for."""
    positions = shards, config.accumulate, config.batch_size * config.seq_len // shards // config.accumulate
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return Batch(
        ids_SU=array((shards, size), jnp.int32),
        index_SAN=array(positions, jnp.int32),
        targets_SAN=array(positions, jnp.int32),
        weights_SAN=array(positions, jnp.float32),
        start_SAN=array(positions, jnp.int32) if config.data.document_mask else None,
        row_ids_SU=array((shards, size), jnp.int32) if memories.of(config.model).by_bigram else None,
    )


def place(batch: HostBatch, size: int, sharding: NamedSharding) -> Batch:
    """Places a batch on the devices as global arrays.

    Args:
      batch: this host's batch shards; the other hosts place theirs.
      size: number of ids that each shard's distinct ids are padded to.
      sharding: of the leading axis, which has one entry for each batch shard.
    """
    shards = batch_shards(sharding.mesh)

    # Padded with id 0, whose rows are evaluated for nothing: no position's index points at them.
    def pad(ids_U):
        return None if ids_U is None else np.pad(ids_U, (0, size - len(ids_U)))

    padded = {
        number: shard._replace(ids_U=pad(shard.ids_U), row_ids_U=pad(shard.row_ids_U))
        for number, shard in batch.items()
    }

    def placed(field: str) -> jax.Array | None:
        """One field of all shards, with the shards on a new leading axis; None if the shards have none."""
        parts = {number: getattr(shard, field) for number, shard in padded.items()}
        any_part = next(iter(parts.values()))
        if any_part is None:
            return None

        # JAX asks for the slices of this host's devices alone, so the other hosts' batch shards are not needed.
        def part_at(index) -> np.ndarray:
            number = index[0].indices(shards)[0]
            return parts[number][None]

        return jax.make_array_from_callback((shards, *any_part.shape), sharding, part_at)

    return Batch(
        ids_SU=placed("ids_U"),
        index_SAN=placed("index_AN"),
        targets_SAN=placed("targets_AN"),
        weights_SAN=placed("weights_AN"),
        start_SAN=placed("start_AN"),
        row_ids_SU=placed("row_ids_U"),
    )
