"""Turns text files into file shards of tokens for training: one file shard for each input file and split.

Each worker tokenizes whole input files, in processes of this machine or on a Dask cluster. In the output folder,
`.plan.json` and `.done/` hold what is to be done and what is finished (plan.py), so that a run that was killed goes on
with the other files. `dataset.json` is written last.
"""

import collections
import contextlib
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator

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
from memoryllm_jax.data.input_file import Task, check_skipped, dtype_of, read_documents, remove_parts, tokenize_file
from memoryllm_jax.data.plan import PLAN, FileRecord, Plan, Source
from memoryllm_jax.data.tokenizer import Tokenizer

SENTENCEPIECE_CHARS = 50_000_000  # characters that a SentencePiece model is trained on, at most
_SAMPLED_FILES = 64  # input files that these characters come from, at most
_TRAIN_SPEC = "sentencepiece:train:"
_TOKENIZER = "tokenizer.model"
# NFS clients may see an old state of a folder for as long as their cache of attributes lasts: 60 seconds by default.
_SHARED_WAIT_S = 60


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
    remove_parts(output)
    if storage.exists(os.path.join(output, "dataset.json")):
        plan_lib.remove_records(output)  # of a run that was killed after it had written dataset.json
        print(f"{output}: already prepared")
        record = dataset_lib.read_record(output)
        check_skipped(record.skipped_records, on_bad_record, output)
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
        dtype=dtype_of(model).name,
        splits=SplitRecords(**splits),
        skipped_records=dict(skipped),
    )
    check_held()
    storage.write_json(os.path.join(output, "dataset.json"), records.to_json(record))
    plan_lib.remove_records(output)
    remove_parts(output)
    for name, split in splits.items():
        count = len(split.shards)
        print(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens "
            f"({split.bytes / split.tokens:.2f} bytes a token), {count} file shard{'' if count == 1 else 's'}"
        )
    return record


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
    return tokenizer_lib.train_sentencepiece(lambda: _sample(plan, on_bad_record), int(size), os.cpu_count())


def _sample(plan: Plan, on_bad_record: str) -> Iterator[str]:
    """Documents to train a tokenizer on: about equally many characters from each of some evenly spread files."""
    sources = [source for source in plan.sources if not source.held_out]
    every = math.ceil(len(sources) / _SAMPLED_FILES)
    chosen = sources[::every]
    for source in chosen:
        left = SENTENCEPIECE_CHARS // len(chosen)
        for text, _ in read_documents(source, plan, on_bad_record, collections.Counter()):
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
    ids = np.frombuffer(storage.read_bytes(path, "a file shard"), dtype_of(model))
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
