"""Turns text files into file shards of tokens for training: one file shard for each input file and split.

Each worker tokenizes whole input files, in processes of this machine or on a Dask cluster. In the output folder,
`.plan.json` and `.done/` hold what is to be done and what is finished (plan.py), so that a run that was killed goes on
with the other files. `dataset.json` is written last.
"""

import collections
import contextlib
import functools
import hashlib
import math
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import dataset as dataset_lib
from memoryllm_jax.data import documents, executors
from memoryllm_jax.data import plan as plan_lib
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.dataset import (
    FORMAT,
    SPLITS,
    DatasetRecord,
    ShardRecord,
    SplitRecord,
    SplitRecords,
    TokenizerRecord,
)
from memoryllm_jax.data.plan import PLAN, FileRecord, Plan, Source, shard_name
from memoryllm_jax.data.tokenizer import Tokenizer

SENTENCEPIECE_CHARS = 50_000_000  # characters that a SentencePiece model is trained on, at most
_SAMPLED_FILES = 64  # input files that these characters come from, at most
_BATCH_CHARS = 1_000_000  # characters tokenized at a time
_TRAIN_SPEC = "sentencepiece:train:"
_UINT16_IDS = 1 << 16  # vocabularies of up to this size are stored as uint16, others as uint32
_TOKENIZER = "tokenizer.model"
_PART = re.compile(rf"({'|'.join(SPLITS)}|record)-\d+\.[0-9a-f]{{32}}\.part")  # a file that a worker has not finished
# NFS clients may see an old state of a folder for as long as their cache of attributes lasts: 60 seconds by default.
_SHARED_WAIT_S = 60


class Task(NamedTuple):
    """Tokenizing one input file. A worker finds everything else in the output folder."""

    index: int  # of the input file in the plan
    output: str
    plan: str  # digest of the plan
    threads: int  # threads of the tokenizer
    on_bad_record: str  # as of `prepare`
    wait_s: float  # how long the plan may take to become visible on the worker's machine


def prepare(
    pattern: str,
    tokenizer_spec: str,
    output: str,
    *,
    validation_pattern: str = "",
    validation_fraction: float = 0.005,
    text_key: str = "text",
    workers: int = 0,
    scheduler: str = "",
    on_bad_record: str = "stop",
    special_tokens_in_text: str = "text",
) -> DatasetRecord:
    """Writes file shards into a folder, or finishes what an earlier run with the same arguments left unfinished.

    Args:
      pattern: comma-separated globs of text files, or "embedded".
      tokenizer_spec: sentencepiece:FILE, sentencepiece:train:VOCAB, llama3:FILE or hf:FILE.
      output: the folder, or a URL that fsspec writes to.
      validation_pattern: globs of files that are held out whole; then no other document is held out.
      validation_fraction: share of the documents that is held out, chosen by the hash of their text.
      text_key: JSON field or parquet column that holds the text.
      workers: processes; 0: one for each core, at most one for each file.
      scheduler: address of a Dask scheduler, whose workers tokenize the files and share the folder; "": this machine.
      on_bad_record: "stop" at a record without text, or "skip" it; dataset.json then holds the number by cause.
      special_tokens_in_text: "text" or "parse", as of `tokenizer.load`.
    Returns: the contents of dataset.json.
    Raises: UserError.
    """
    if not 0 < validation_fraction < 1:
        raise ArgumentError("validation_fraction", f"expected a number between 0 and 1, found {validation_fraction}")
    if workers < 0:
        raise ArgumentError("workers", f"expected at least 0, found {workers}")
    for name, value, choices in (
        ("on_bad_record", on_bad_record, ("stop", "skip")),
        ("special_tokens_in_text", special_tokens_in_text, ("text", "parse")),
    ):
        if value not in choices:
            raise ArgumentError(name, f"expected one of {', '.join(choices)}, found {value!r}")
    if workers and scheduler:
        raise ArgumentError("workers", f"expected 0 with a scheduler, which has workers of its own, found {workers}")
    sources = _sources(pattern, validation_pattern)
    plan = Plan(
        format=FORMAT,
        tokenizer=tokenizer_spec,
        text_key=text_key,
        validation_fraction=0.0 if validation_pattern else validation_fraction,
        sources=sources,
        special_tokens_in_text=special_tokens_in_text,
    )
    # Workers on other machines may have another working folder.
    output = storage.absolute(output)
    with executors.connected(scheduler) as client, _held(output) as check_held:
        return _prepare(plan, output, workers, client, check_held, on_bad_record)


@contextlib.contextmanager
def _held(output: str) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of the output folder, and removes what a run left that failed before it finished a file.

    Yields: a function that raises UserError if another run has taken over the folder, which only a URL allows.
    """
    if storage.is_url(output):
        claim = storage.Claim(output)
        check_held, discard, release = claim.check, claim.discard, lambda: None
    else:
        lock = storage.lock_folder(output)
        check_held, discard, release = lambda: None, lambda: storage.discard_lock(lock, output), lock.close
    try:
        yield check_held
    except UserError:
        check_held()  # if another run has taken over, what is there belongs to it
        _undo_start(output)
        if storage.names(output) <= {".lock"}:
            discard()
        raise
    finally:
        release()


def _sources(pattern: str, validation_pattern: str) -> tuple[Source, ...]:
    """The input files, those that are held out whole last. A file that both patterns match is held out."""
    held_out = documents.expand(validation_pattern) if validation_pattern else []
    matched = documents.expand(pattern)
    to_train = [path for path in matched if path not in set(held_out)]
    if len(to_train) < len(matched):
        held = len(matched) - len(to_train)
        print(f"files of the input that are held out, as validation_input names them too: {held}")
    if not to_train:
        raise ArgumentError("input", f"expected files other than those of validation_input, found none in {pattern}")
    paths = [(path, False) for path in to_train] + [(path, True) for path in held_out]
    return tuple(Source(path, documents.size(path), whole) for path, whole in paths)


def _undo_start(output: str) -> None:
    """Removes what a run wrote that failed before any input file was finished."""
    if _has_results(output):
        return
    if storage.exists(os.path.join(output, PLAN)):
        for name in (PLAN, _TOKENIZER):
            storage.remove(os.path.join(output, name))
    plan_lib.remove_records(output)


def _has_results(output: str) -> bool:
    """Whether an earlier run finished at least one input file."""
    return storage.exists(os.path.join(output, "dataset.json")) or bool(plan_lib.finished(output))


def _prepare(
    plan: Plan, output: str, workers: int, client, check_held: Callable[[], None], on_bad_record: str
) -> DatasetRecord:
    """`prepare` in a folder that belongs to this run. Returns: the contents of dataset.json."""
    plan, model = _begin(plan, output, check_held, on_bad_record)
    _remove_parts(output)
    if storage.exists(os.path.join(output, "dataset.json")):
        plan_lib.remove_records(output)  # of a run that was killed after it had written dataset.json
        print(f"{output}: already prepared")
        record = dataset_lib.read_record(output)
        _check_skipped(record.skipped_records, on_bad_record, output)
        return record
    files = _tokenize(plan, output, workers, client, check_held, on_bad_record)
    splits = {}
    for split in SPLITS:
        splits[split] = _merged([file.shards[split] for file in files if split in file.shards])
    skipped = sum((collections.Counter(file.skipped) for file in files), collections.Counter())
    causes = "; ".join(f"{cause}: {count:,}" for cause, count in skipped.most_common())
    if skipped:
        print(f"skipped {skipped.total():,} records ({causes})")
    if not splits["train"].tokens:
        if not any(file.shards for file in files):
            plan_lib.remove_records(output)  # so that the folder is left as it was
        found = f"only records that were skipped ({causes})" if skipped else "none"
        raise UserError(f"{output}: expected documents to train on, found {found}; check input and validation_fraction")
    if not splits["validation"].tokens:
        if not plan.validation_fraction:
            raise ArgumentError("validation_input", "expected documents, found none in these files")
        splits = _hold_out_the_end(splits["train"].shards, plan.validation_fraction, output, model)
    record = DatasetRecord(
        format=FORMAT,
        tokenizer=plan.model,
        vocab_size=model.vocab_size,
        dtype=_dtype(model).name,
        splits=SplitRecords(**splits),
        skipped_records=dict(skipped),
    )
    check_held()
    storage.write_json(os.path.join(output, "dataset.json"), records.to_json(record))
    plan_lib.remove_records(output)
    _remove_parts(output)
    for name, split in splits.items():
        count = len(split.shards)
        print(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens "
            f"({split.bytes / split.tokens:.2f} bytes a token), {count} file shard{'' if count == 1 else 's'}"
        )
    return record


def _check_skipped(skipped: dict[str, int], on_bad_record: str, where: str) -> None:
    """Raises: UserError if an earlier run skipped records and this one is to stop at them."""
    if skipped and on_bad_record == "stop":
        count = sum(skipped.values())
        raise UserError(f"{where}: expected no skipped records, found {count:,}; give on_bad_record=skip, as before")


def _begin(plan: Plan, output: str, check_held: Callable[[], None], on_bad_record: str) -> tuple[Plan, Tokenizer]:
    """Writes the tokenizer and then the plan that names it, or checks those of an earlier run.

    Returns: (the plan with its tokenizer, the tokenizer).
    Raises: UserError if the earlier run had another plan or tokenizer.
    """
    if storage.exists(os.path.join(output, PLAN)):
        if _has_results(output):
            return _resume(plan, plan_lib.read_plan(output), output)
    else:
        if storage.exists(os.path.join(output, "dataset.json")):
            raise UserError(f"{output}: holds data without its plan; use a new folder")
        if storage.exists(os.path.join(output, _TOKENIZER)):
            raise UserError(f"{output}: holds a {_TOKENIZER} that `prepare` did not write; use another folder")
        plan_lib.remove_records(output)  # nobody knows what they are records of
    # Written before the tokenizer too, as the plan shows that tokenizer.model is not the user's own file.
    plan_lib.write_plan(plan, output)
    is_trained = plan.tokenizer.startswith(_TRAIN_SPEC)
    model = (
        _train_tokenizer(plan, on_bad_record)
        if is_trained
        else tokenizer_lib.load(plan.tokenizer, plan.special_tokens_in_text)
    )
    check_held()
    storage.write_bytes(os.path.join(output, _TOKENIZER), model.content)
    plan = plan.with_model(_tokenizer_record(model))
    plan_lib.write_plan(plan, output)
    return plan, model


def _resume(plan: Plan, before: Plan, output: str) -> tuple[Plan, Tokenizer]:
    """Checks that this run goes on with what an earlier one began, by its plan `before`; results as of `_begin`."""
    before.check_same(plan, output)
    if storage.exists(os.path.join(output, "dataset.json")):
        # Plans of version 0.1.0 do not hold the tokenizer, but dataset.json does.
        before = before.with_model(dataset_lib.read_record(output).tokenizer)
    elif before.model is None:
        raise UserError(f"{output}: was begun by an earlier version of `prepare`; use a new folder")
    model = dataset_lib.load_tokenizer(output, before.model)
    if not plan.tokenizer.startswith(_TRAIN_SPEC):
        given = tokenizer_lib.load(plan.tokenizer, plan.special_tokens_in_text)
        # Not `before.model`, which lacks what version 0.1.0 did not record; `model` has it.
        if _tokenizer_record(given) != _tokenizer_record(model):
            raise UserError(f"{output}: was begun with another tokenizer than {plan.tokenizer}; use a new folder")
    return before, model


def _tokenizer_record(model: Tokenizer) -> TokenizerRecord:
    return TokenizerRecord(
        kind=model.kind,
        file=_TOKENIZER,
        digest=model.digest,
        bos_id=model.bos_id,
        eos_id=model.eos_id,
        special_tokens_in_text=model.special_tokens_in_text,
    )


def _train_tokenizer(plan: Plan, on_bad_record: str) -> Tokenizer:
    size = plan.tokenizer.removeprefix(_TRAIN_SPEC)
    if not size.isdecimal():
        raise ArgumentError("tokenizer", f"expected a vocabulary size at the end of {plan.tokenizer}, found {size!r}")
    print(f"training a SentencePiece model of {size} ids", flush=True)
    return tokenizer_lib.train_sentencepiece(_sample(plan, on_bad_record), int(size), os.cpu_count())


def _sample(plan: Plan, on_bad_record: str) -> Iterator[str]:
    """Documents to train a tokenizer on: about equally many characters from each of some evenly spread files."""
    sources = [source for source in plan.sources if not source.held_out]
    every = math.ceil(len(sources) / _SAMPLED_FILES)
    chosen = sources[::every]
    for source in chosen:
        left = SENTENCEPIECE_CHARS // len(chosen)
        for text, _ in _documents(source, plan, on_bad_record, collections.Counter()):
            yield text
            left -= len(text)
            if left < 0:
                break


class _Report:
    """Progress over all files. A worker reports (index of its file, bytes of it read so far, tokens written so far)."""

    def __init__(self, sources: tuple[Source, ...], finished: set[int]):
        self._sizes = [source.size for source in sources]  # None where a server does not say
        total = None if None in self._sizes else sum(self._sizes)
        self._finished = finished  # by an earlier run, whose bytes and tokens say nothing about the rate of this one
        self._bytes = {index: self._sizes[index] or 0 for index in finished}
        self._tokens: dict[int, int] = {}
        self._start = time.monotonic()
        self._progress = Progress("prepare", total, "B", initial=sum(self._bytes.values()))

    def __call__(self, index: int, position: int, tokens: int) -> None:
        if index in self._finished:
            return
        size = self._sizes[index]
        # A buffered reader may be past the size that was measured.
        self._bytes[index] = position if size is None else min(position, size)
        self._tokens[index] = tokens
        rate = sum(self._tokens.values()) / (time.monotonic() - self._start)
        self._progress.update(sum(self._bytes.values()), f"{rate / 1e3:,.0f} k tokens/s")

    def finish(self, index: int, record: FileRecord) -> None:
        """Reports that a file is finished."""
        size = self._sizes[index]
        position = self._bytes.get(index, 0) if size is None else size
        self(index, position, sum(shard.tokens for shard in record.shards.values()))

    def close(self) -> None:
        self._progress.close()


def _tokenize(plan, output, workers, client, check_held, on_bad_record) -> list[FileRecord]:
    """Tokenizes all files but those that an earlier run finished, which are checked.

    Returns: the records of all files, in order.
    """
    cores = os.cpu_count() or 1
    count = min(workers or cores, len(plan.sources))
    # On a cluster each thread of a Dask worker has a file of its own.
    threads = 1 if client else max(1, cores // count)
    wait_s = _SHARED_WAIT_S if client else 0
    digest = plan_lib.digest(output)
    tasks = [Task(index, output, digest, threads, on_bad_record, wait_s) for index in range(len(plan.sources))]
    finished = plan_lib.finished(output) & set(range(len(tasks)))
    report = _Report(plan.sources, finished)
    if client:
        results = executors.on_cluster(tokenize_file, tasks, client)
    else:
        results = executors.in_processes(tokenize_file, tasks, count, report)
    out = {}
    # closing: an error here stops the workers at once, not when the generator is collected.
    with contextlib.closing(results):
        for task, record in results:
            out[task.index] = record
            report.finish(task.index, record)
            check_held()
    report.close()
    return [out[index] for index in range(len(tasks))]


def _dtype(model) -> np.dtype:
    return np.dtype("<u2") if model.vocab_size <= _UINT16_IDS else np.dtype("<u4")


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


class _ShardWriter:
    """Writes one file shard under a name of its own; the caller publishes it."""

    def __init__(self, split: str, index: int, folder: str, model: Tokenizer):
        self.name, self.path = shard_name(split, index), _part_path(split, index, folder)
        self._dtype, self._model = _dtype(model), model
        self._file, self._sha = open(self.path, "xb"), hashlib.sha256()
        self.documents = self.tokens = self.bytes = 0

    def write(self, texts: list[str], ids_of_texts: list[list[int]]) -> None:
        """Appends documents, each between bos and eos. Raises: UserError for an id outside the vocabulary."""
        bos = [] if self._model.bos_id is None else [self._model.bos_id]
        eos = [] if self._model.eos_id is None else [self._model.eos_id]
        flat = [i for ids in ids_of_texts for i in (*bos, *ids, *eos)]
        array = np.array(flat, np.int64)
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


def tokenize_file(task: Task, report: Callable[[int, int, int], None]) -> FileRecord:
    """Tokenizes one input file, and records in `.done` that it is finished; runs in a worker.

    Several workers may do so for the same file at the same time: a cluster gives the file of a worker that it has lost
    from sight to another one. Both write the same bytes, each under names of its own until a file is complete.

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
        _check_skipped(record.skipped, task.on_bad_record, source.path)
        return record
    if (found := documents.size(source.path)) != source.size:
        raise UserError(f"{source.path}: expected {source.size} bytes, as when this run began, found {found}")
    with _scratch(task.output) as folder:
        return _write_shards(task, plan, model, folder, report)


def _write_shards(task: Task, plan: Plan, model: Tokenizer, folder: str, report) -> FileRecord:
    """Tokenizes one input file into files of `folder`, and publishes them; results as of `tokenize_file`."""
    source = plan.sources[task.index]
    skipped: collections.Counter = collections.Counter()
    writers: dict[str, _ShardWriter] = {}
    try:
        for split in ("validation",) if source.held_out else SPLITS:
            writers[split] = _ShardWriter(split, task.index, folder, model)
        for texts, position in _batches(_documents(source, plan, task.on_bad_record, skipped)):
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


def _remove_parts(output: str) -> None:
    """Removes files that killed workers did not finish. A worker that is still alive after all ends with an error."""
    if storage.is_url(output):
        return
    for name in storage.names(output):
        if _PART.fullmatch(name):
            storage.remove(os.path.join(output, name))


def _documents(
    source: Source, plan: Plan, on_bad_record: str, skipped: collections.Counter
) -> Iterator[tuple[str, int]]:
    """`documents.read` of an input file; `skipped` counts the records that it skips."""
    try:
        yield from documents.read(source.path, plan.text_key, skipped if on_bad_record == "skip" else None)
    except documents.RecordError as error:
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


def _merged(shards: list[ShardRecord]) -> SplitRecord:
    """The record of a split in dataset.json, from those of its file shards."""
    return SplitRecord(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=tuple(shards),
    )


def _hold_out_the_end(shards: tuple[ShardRecord, ...], fraction, output, model) -> dict[str, SplitRecord]:
    """Moves the last training tokens to the validation split, for texts of so few documents that none was held out.

    Args:
      shards: records of the training split's file shards; the tokens come from the last one.
    Returns: {split: its record}. Raises: UserError if there are too few tokens.
    """
    *others, last = shards
    path = os.path.join(output, last.file)
    ids = np.frombuffer(storage.read_bytes(path, "a file shard"), _dtype(model))
    # Each split needs two tokens: one to predict, and one to predict it from.
    wanted = max(2, round(fraction * sum(shard.tokens for shard in shards)))
    cut = len(ids) - min(wanted, len(ids) - 2)
    if cut < 2:
        raise UserError(f"{output}: {len(ids)} tokens are too few to hold some out; give validation_input")
    name = last.file.replace("train", "validation")
    tail_bytes = len(model.decode(ids[cut:]).encode())
    # A run that is killed from here on tokenizes the file again, as its file shard no longer is what its record says.
    storage.remove(plan_lib.record_path(int(re.search(r"\d+", name)[0]), output))
    kept, tail = ids[:cut].tobytes(), ids[cut:].tobytes()
    storage.write_bytes(os.path.join(output, name), tail)
    storage.write_bytes(path, kept)
    held_out = ShardRecord(
        file=name,
        documents=0,  # the tail holds no whole document
        tokens=len(ids) - cut,
        bytes=tail_bytes,
        sha256=hashlib.sha256(tail).hexdigest(),
    )
    last = ShardRecord(
        file=last.file,
        documents=last.documents,
        tokens=cut,
        bytes=last.bytes - tail_bytes,
        sha256=hashlib.sha256(kept).hexdigest(),
    )
    print(f"no document was held out by its hash, so the last {len(ids) - cut:,} tokens are held out")
    return {"train": _merged([*others, last]), "validation": _merged([held_out])}
