"""Tokenizes one input file into file shards, one for each split: what a worker of `prepare` does.

Several workers may do so for the same file at the same time, as a cluster gives the file of a worker that it has lost
from sight to another one. Both write the same bytes, each under names of its own until a file is complete.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset as dataset_lib
from memoryllm_jax.data import documents
from memoryllm_jax.data import plan as plan_lib
from memoryllm_jax.data.dataset import SPLITS, ShardRecord
from memoryllm_jax.data.plan import FileRecord, Plan, Source, shard_name
from memoryllm_jax.data.text_file import RecordError
from memoryllm_jax.data.tokenizer import Tokenizer

_BATCH_CHARS = 1_000_000  # characters tokenized at a time
_UINT16_IDS = 1 << 16  # vocabularies of up to this size are stored as uint16, others as uint32
_PART = re.compile(rf"({'|'.join(SPLITS)}|record)-\d+\.[0-9a-f]{{32}}\.part")  # a file that a worker has not finished


class Task(NamedTuple):
    """Tokenizing one input file. A worker finds everything else in the output folder."""

    index: int  # of the input file in the plan
    output: str
    plan: str  # digest of the plan
    threads: int  # threads of the tokenizer
    on_bad_record: str  # as of `prepare`
    wait_s: float  # how long the plan may take to become visible on the worker's machine


def tokenize_file(task: Task, report: Callable[[int, int, int], None]) -> FileRecord:
    """Tokenizes one input file, and records in `.done` that it is finished; runs in a worker.

    Args:
      report: takes (index of the file, bytes of it read so far, tokens written so far).
    Returns: the record of the file, which an earlier run may have finished.
    Raises: UserError; nothing unfinished is left behind.
    """
    _check_plan(task)
    plan, model = _open_plan(task.output, task.plan)
    source = plan.sources[task.index]
    record = plan_lib.finished_record(task.index, task.plan, source, task.output)
    if record is not None:
        check_skipped(record.skipped, task.on_bad_record, source.path)
        return record
    if (found := documents.size(source.path)) != source.size:
        raise UserError(f"{source.path}: expected {source.size} bytes, as when this run began, found {found}")
    with _scratch(task.output) as folder:
        return _write_shards(task, plan, model, folder, report)


# Files of one run share the tokenizer. The digest is part of the key: a worker of a cluster outlives a run.
@functools.lru_cache(2)
def _open_plan(output: str, digest: str) -> tuple[Plan, Tokenizer]:
    """The plan in the output folder, and its tokenizer, for a worker."""
    plan = plan_lib.read_plan(output)
    return plan, dataset_lib.load_tokenizer(output, plan.model)


def _check_plan(task: Task) -> None:
    """Raises: UserError if the output folder, as this machine sees it, does not belong to this run."""
    deadline = time.monotonic() + task.wait_s
    while (found := plan_lib.digest(task.output)) != task.plan:
        if time.monotonic() >= deadline:
            problem = "the plan of another run" if found else "none"
            raise UserError(f"{task.output}: expected the plan of this run, which all workers see, found {problem}")
        time.sleep(1)


def check_skipped(skipped: dict[str, int], on_bad_record: str, where: str) -> None:
    """Raises: UserError if an earlier run skipped records and this one is to stop at them."""
    if skipped and on_bad_record == "stop":
        count = sum(skipped.values())
        raise UserError(f"{where}: expected no skipped records, found {count:,}; give on_bad_record=skip, as before")


def _write_shards(task: Task, plan: Plan, model: Tokenizer, folder: str, report) -> FileRecord:
    """Tokenizes one input file into files of `folder`, and publishes them; results as of `tokenize_file`."""
    source = plan.sources[task.index]
    skipped: collections.Counter = collections.Counter()
    writers: dict[str, _ShardWriter] = {}
    try:
        for split in ("validation",) if source.held_out else SPLITS:
            writers[split] = _ShardWriter(split, task.index, folder, model)
        for texts, position in _batches(read_documents(source, plan, task.on_bad_record, skipped)):
            _write_batch(texts, source, plan, model, writers, task.threads)
            report(task.index, position, sum(writer.tokens for writer in writers.values()))
        shards = {split: writer.close() for split, writer in writers.items()}
        shards = {split: shard for split, shard in shards.items() if shard.tokens}
        # Another run may have begun meanwhile, with other arguments: its file shards have the same names.
        _check_plan(task)
        for split, shard in shards.items():
            _publish(writers[split].path, os.path.join(task.output, shard.file))
        record = FileRecord(plan=task.plan, shards=shards, skipped=dict(skipped))
        _publish_record(task, record, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        for writer in writers.values():
            writer.abandon()
    return record


class _ShardWriter:
    """Writes one file shard under a name of its own; the caller publishes it."""

    def __init__(self, split: str, index: int, folder: str, model: Tokenizer):
        self.name, self.path = shard_name(split, index), _part_path(split, index, folder)
        self._dtype, self._model = dtype_of(model), model
        self._file, self._sha = open(self.path, "xb"), hashlib.sha256()
        self.documents = self.tokens = self.bytes = 0

    def write(self, texts: list[str], ids_of_texts: list[list[int]]) -> None:
        """Appends documents, each between bos and eos. Raises: UserError for an id outside the vocabulary."""
        bos = [] if self._model.bos_id is None else [self._model.bos_id]
        eos = [] if self._model.eos_id is None else [self._model.eos_id]
        # From an iterator: a list of all ids would hold those of a document of gigabytes once more.
        between = (itertools.chain(bos, ids, eos) for ids in ids_of_texts)
        array = np.fromiter(itertools.chain.from_iterable(between), np.int64)
        if array.size and array.max() >= self._model.vocab_size:
            raise UserError(f"tokenizer: expected ids below {self._model.vocab_size}, found {array.max()}")
        data = array.astype(self._dtype).tobytes()
        self._file.write(data)
        self._sha.update(data)
        self.documents += len(texts)
        self.tokens += array.size
        self.bytes += sum(len(text.encode()) for text in texts)

    def close(self) -> ShardRecord:
        """Returns: the file shard's record for dataset.json."""
        self._file.flush()
        os.fsync(self._file.fileno())  # so that a power cut cannot leave a record without its file shard
        self._file.close()
        return ShardRecord(
            file=self.name,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
            sha256=self._sha.hexdigest(),
        )

    def abandon(self) -> None:
        """Removes the file, unless it was published."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path)


def dtype_of(model: Tokenizer) -> np.dtype:
    """The type in which file shards hold the ids of a tokenizer."""
    return np.dtype("<u2") if model.vocab_size <= _UINT16_IDS else np.dtype("<u4")


def _publish_record(task: Task, record: FileRecord, folder: str) -> None:
    """Writes the record of a finished file."""
    path = _part_path("record", task.index, folder)
    try:
        with open(path, "xb") as file:
            file.write(plan_lib.encode_record(record))
            file.flush()
            os.fsync(file.fileno())
        _publish(path, plan_lib.record_path(task.index, task.output))
    finally:
        if os.path.exists(path):
            os.remove(path)


@contextlib.contextmanager
def _scratch(output: str) -> Iterator[str]:
    """Yields the folder for files that are not finished: on a disk the output folder, from which they are renamed."""
    if storage.is_url(output):
        with tempfile.TemporaryDirectory(prefix="memoryllm_jax_") as folder:
            yield folder
    else:
        yield output


def _part_path(name: str, index: int, folder: str) -> str:
    """A path for a file that is not finished. No other worker has the same one."""
    return os.path.join(folder, f"{name}-{index:05}.{uuid.uuid4().hex}.part")


def _publish(part: str, path: str) -> None:
    """Moves a finished file to its name, where it becomes visible as a whole."""
    if storage.is_url(path):
        storage.upload(part, path)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.replace(part, path)


def remove_parts(output: str) -> None:
    """Removes files that killed workers did not finish. A worker that is still alive after all ends with an error."""
    if storage.is_url(output):
        return
    for name in storage.names(output):
        if _PART.fullmatch(name):
            storage.remove(os.path.join(output, name))


def read_documents(
    source: Source, plan: Plan, on_bad_record: str, skipped: collections.Counter
) -> Iterator[tuple[str, int]]:
    """`documents.read` of an input file; `skipped` counts the records that it skips."""
    try:
        yield from documents.read(source.path, plan.text_key, skipped if on_bad_record == "skip" else None)
    except RecordError as error:
        raise UserError(f"{error} (on_bad_record=skip leaves such records out and counts them)") from error


def _batches(read: Iterator[tuple[str, int]]) -> Iterator[tuple[list[str], int]]:
    """Yields (documents of about _BATCH_CHARS characters together, bytes of the file read so far)."""
    batch, chars, position = [], 0, 0
    for text, position in read:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch, position
            batch, chars = [], 0
    yield batch, position


def _write_batch(texts: list[str], source, plan, model, writers: dict[str, _ShardWriter], threads: int) -> None:
    """Tokenizes documents and writes each to the file shard of its split."""
    by_split: dict[str, list[str]] = {split: [] for split in writers}
    for text in texts:
        by_split[_split_of(text, source, plan)].append(text)
    for split, chosen in by_split.items():
        writers[split].write(chosen, model.encode_batch(chosen, threads))


def _split_of(text, source, plan) -> str:
    if source.held_out:
        return "validation"
    # The hash, as a number in [0, 1), gives all copies of a document the same split, whatever files they are in.
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if share < plan.validation_fraction else "train"
