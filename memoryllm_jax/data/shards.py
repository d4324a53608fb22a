"""Turns text files into file shards of tokens for training: one file shard for each input file and split.

Each worker process tokenizes whole input files. In the output folder, `.plan.json` holds the arguments and `.done/` has
a record of each finished input file, so that a run that was killed goes on with the others. `dataset.json` is written
last.
"""

import concurrent.futures
import concurrent.futures.process
import hashlib
import math
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import documents
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.dataset import FORMAT, SPLITS
from memoryllm_jax.data.tokenizer import Tokenizer

SENTENCEPIECE_CHARS = 50_000_000  # characters that a SentencePiece model is trained on, at most
_SAMPLED_FILES = 64  # input files that these characters come from, at most
_BATCH_CHARS = 1_000_000  # characters tokenized at a time
_TRAIN_SPEC = "sentencepiece:train:"
_UINT16_IDS = 1 << 16  # vocabularies of up to this size are stored as uint16, others as uint32


class Source(NamedTuple):
    """An input file."""

    index: int  # names its file shards
    path: str
    size: int  # bytes as stored
    held_out: bool  # whether the whole file is held out for validation


class Settings(NamedTuple):
    """What tokenizing a file depends on, apart from the tokenizer."""

    output: str
    text_key: str
    validation_fraction: float
    threads: int  # threads of the tokenizer in each worker


def prepare(
    pattern: str,
    tokenizer_spec: str,
    output: str,
    *,
    validation_pattern: str = "",
    validation_fraction: float = 0.005,
    text_key: str = "text",
    workers: int = 0,
) -> dict:
    """Writes file shards into a folder, or finishes what an earlier run with the same arguments left unfinished.

    Args:
      pattern: comma-separated globs of text files, or "embedded".
      tokenizer_spec: sentencepiece:FILE, sentencepiece:train:VOCAB, llama3:FILE or hf:FILE.
      output: the folder, on a disk.
      validation_pattern: globs of files that are held out whole; then no other document is held out.
      validation_fraction: share of the documents that is held out, chosen by the hash of their text.
      text_key: JSON field or parquet column that holds the text.
      workers: processes; 0: one for each core, at most one for each file.
    Returns: the contents of dataset.json.
    Raises: UserError.
    """
    if storage.is_url(output):
        raise ArgumentError(
            "output", f"expected a folder on a disk, which can be copied to a URL afterwards, found {output}"
        )
    if not 0 < validation_fraction < 1:
        raise ArgumentError("validation_fraction", f"expected a number between 0 and 1, found {validation_fraction}")
    if workers < 0:
        raise ArgumentError("workers", f"expected at least 0, found {workers}")
    sources = _sources(pattern, validation_pattern)
    plan = {
        "format": FORMAT,
        "tokenizer": tokenizer_spec,
        "text_key": text_key,
        "validation_fraction": 0.0 if validation_pattern else validation_fraction,
        "sources": [[source.path, source.size, source.held_out] for source in sources],
    }
    lock = storage.lock_folder(output)
    try:
        return _prepare(plan, sources, output, workers)
    except UserError:
        _undo_start(output)
        raise
    finally:
        lock.close()


def _sources(pattern: str, validation_pattern: str) -> list[Source]:
    """The input files, those that are held out whole last. A file that both patterns match is held out."""
    held_out = documents.expand(validation_pattern) if validation_pattern else []
    matched = documents.expand(pattern)
    to_train = [path for path in matched if path not in set(held_out)]
    if len(to_train) < len(matched):
        print(f"{len(matched) - len(to_train)} files of the input are held out, as validation_input names them too")
    if not to_train:
        raise ArgumentError("input", f"expected files other than those of validation_input, found none in {pattern}")
    paths = [(path, False) for path in to_train] + [(path, True) for path in held_out]
    return [Source(i, path, documents.size(path), whole) for i, (path, whole) in enumerate(paths)]


def _undo_start(output: str) -> None:
    """Removes the plan and the tokenizer of a run that failed before any input file was finished."""
    plan_path = os.path.join(output, ".plan.json")
    if _has_results(output) or not os.path.exists(plan_path):
        return
    for name in (".plan.json", "tokenizer.model"):
        if os.path.exists(os.path.join(output, name)):
            os.remove(os.path.join(output, name))


def _has_results(output: str) -> bool:
    """Whether an earlier run finished at least one input file."""
    done = os.path.join(output, ".done")
    return os.path.exists(os.path.join(output, "dataset.json")) or (os.path.isdir(done) and bool(os.listdir(done)))


def _prepare(plan: dict, sources: list[Source], output: str, workers: int) -> dict:
    """`prepare` in a folder that is locked. Returns: the contents of dataset.json."""
    manifest = os.path.join(output, "dataset.json")
    resumes = _begin(plan, output)
    model = _tokenizer(plan["tokenizer"], sources, plan["text_key"], output, resumes)
    if os.path.exists(manifest):
        print(f"{output}: already prepared")
        return storage.read_json(manifest, "a prepared data set")

    cores = os.cpu_count() or 1
    workers = min(workers or cores, len(sources))
    threads = max(1, cores // workers)
    settings = Settings(output, plan["text_key"], plan["validation_fraction"], threads)
    records = _tokenize(sources, settings, model, workers)
    splits = {split: _merged([record[split] for record in records if split in record]) for split in SPLITS}
    if not splits["train"]["tokens"]:
        raise UserError(f"{output}: expected documents to train on, found none; check input and validation_fraction")
    if not splits["validation"]["tokens"]:
        splits = _hold_out_the_end(splits["train"]["shards"], plan["validation_fraction"], output, model)
    dataset = {
        "format": FORMAT,
        "tokenizer": {
            "kind": model.kind,
            "file": "tokenizer.model",
            "digest": model.digest,
            "bos_id": model.bos_id,
            "eos_id": model.eos_id,
        },
        "vocab_size": model.vocab_size,
        "dtype": _dtype(model).name,
        "splits": splits,
    }
    storage.write_json(manifest, dataset)
    shutil.rmtree(os.path.join(output, ".done"))
    for name, split in splits.items():
        print(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens "
            f"({split['bytes'] / split['tokens']:.2f} bytes a token), {len(split['shards'])} file shards"
        )
    return dataset


def _begin(plan: dict, output: str) -> bool:
    """Writes the plan, or compares it with the plan of an earlier run.

    Returns: whether this run resumes an earlier one. Raises: UserError if their plans differ.
    """
    plan_path = os.path.join(output, ".plan.json")
    if os.path.exists(plan_path) and _has_results(output):
        before = storage.read_json(plan_path, "the plan of an earlier prepare")
        different = [key for key in plan if before.get(key) != plan[key]]
        if different:
            raise UserError(
                f"{output}: was begun with another {', '.join(different)}; finish that run, or use a new folder"
            )
        return True
    if os.path.exists(os.path.join(output, "dataset.json")):
        raise UserError(f"{output}: holds data without its plan; use a new folder")
    if os.path.exists(os.path.join(output, "tokenizer.model")) and not os.path.exists(plan_path):
        raise UserError(f"{output}: holds a tokenizer.model that `prepare` did not write; use another folder")
    storage.write_json(plan_path, plan)
    return False


def _tokenizer(spec: str, sources: list[Source], text_key: str, output: str, resumes: bool) -> Tokenizer:
    """Loads or trains the tokenizer of the spec and copies it to tokenizer.model.

    Args:
      resumes: whether an earlier run has written tokenizer.model; a trained tokenizer is then read from there.
    Raises: UserError if the earlier run had another tokenizer.
    """
    path = os.path.join(output, "tokenizer.model")
    if spec.startswith(_TRAIN_SPEC):
        if resumes:
            return tokenizer_lib.load(f"sentencepiece:{path}")
        model = _train_tokenizer(spec, sources, text_key)
    else:
        model = tokenizer_lib.load(spec)
        if resumes and storage.sha256(path) != model.digest:
            raise UserError(f"{output}: was begun with another tokenizer than {spec}; use a new folder")
    storage.write_bytes(path, model.content)
    return model


def _train_tokenizer(spec: str, sources: list[Source], text_key: str) -> Tokenizer:
    size = spec.removeprefix(_TRAIN_SPEC)
    if not size.isdecimal():
        raise ArgumentError("tokenizer", f"expected a vocabulary size at the end of {spec}, found {size!r}")
    print(f"training a SentencePiece model of {size} ids", flush=True)
    return tokenizer_lib.train_sentencepiece(_sample(sources, text_key), int(size), os.cpu_count())


def _sample(sources: list[Source], text_key: str) -> Iterator[str]:
    """Documents to train a tokenizer on: about equally many characters from each of some evenly spread files."""
    sources = [source for source in sources if not source.held_out]
    every = math.ceil(len(sources) / _SAMPLED_FILES)
    chosen = sources[::every]
    for source in chosen:
        left = SENTENCEPIECE_CHARS // len(chosen)
        for text, _ in documents.read(source.path, text_key):
            yield text
            left -= len(text)
            if left < 0:
                break


class _Report:
    """Progress over all files. A worker reports (index of its file, bytes of it read so far, tokens written so far)."""

    def __init__(self, sources: list[Source], finished: list[Source]):
        self._sizes = [source.size for source in sources]
        self._bytes = {source.index: source.size for source in finished}
        self._tokens: dict[int, int] = {}
        self._start = time.monotonic()
        self._progress = Progress("prepare", sum(self._sizes), "B", initial=sum(self._bytes.values()))

    def __call__(self, index: int, position: int, tokens: int) -> None:
        # A buffered reader may be past the size that was measured.
        self._bytes[index] = min(position, self._sizes[index])
        self._tokens[index] = tokens
        rate = sum(self._tokens.values()) / (time.monotonic() - self._start)
        self._progress.update(sum(self._bytes.values()), f"{rate / 1e3:,.0f} k tokens/s")

    def close(self) -> None:
        self._progress.close()


def _tokenize(sources, settings, model, workers) -> list[dict]:
    """Tokenizes all files but those that an earlier run finished. Returns: the record of each file, in order."""
    os.makedirs(os.path.join(settings.output, ".done"), exist_ok=True)
    records = {source.index: _record_of(source, settings.output, model) for source in sources}
    todo = [source for source in sources if records[source.index] is None]
    report = _Report(sources, [source for source in sources if records[source.index] is not None])
    if workers == 1:
        for source in todo:
            records[source.index] = _tokenize_file(source, settings, model, report)
    elif todo:
        records |= _in_processes(todo, settings, model, workers, report)
    report.close()
    return [records[source.index] for source in sources]


def _in_processes(todo, settings, model, workers, report) -> dict[int, dict]:
    """Tokenizes files in worker processes. Returns: {index of a file: its record}. Raises: UserError."""
    # Not "fork", which would copy JAX's locks but not the threads that hold them.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    arguments = (settings, model.to_json(), reports)
    records = {}
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        futures = {pool.submit(_work, source): source.index for source in todo}
        waiting = set(futures)
        try:
            while waiting:
                # The timeout lets progress be shown while no file is finished.
                finished, waiting = concurrent.futures.wait(waiting, timeout=0.2)
                for future in finished:
                    records[futures[future]] = future.result()
                _drain(reports, report)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"a worker process was killed, perhaps for lack of memory; try fewer workers than {workers}"
            ) from error
        except BaseException:
            # Leaving the `with` block would first tokenize all files that have not been started.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return records


def _drain(reports: multiprocessing.Queue, report: _Report) -> None:
    """Passes on all progress reports that the workers have sent."""
    while True:
        try:
            report(*reports.get_nowait())
        except queue.Empty:
            return


_worker = {}  # in a worker process: the arguments of `_start_worker`, for `_work`


def _start_worker(settings, model, reports) -> None:
    """Sets up a worker process, before it gets any file."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    # A parent that is killed cannot stop its workers.
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent stops its workers
    # A worker normally waits at its end until its reports are read. A parent that fails no longer reads them.
    reports.cancel_join_thread()
    _worker.update(settings=settings, model=Tokenizer.from_json(model), reports=reports)


def _work(source: Source) -> dict:
    """`_tokenize_file` in a worker process."""

    def report(*progress):
        _worker["reports"].put(progress)

    return _tokenize_file(source, _worker["settings"], _worker["model"], report)


def _dtype(model) -> np.dtype:
    return np.dtype("<u2") if model.vocab_size <= _UINT16_IDS else np.dtype("<u4")


def _record_path(source, output):
    return os.path.join(output, ".done", f"{source.index:05}.json")


def _record_of(source, output, model) -> dict | None:
    """The record that an earlier run wrote for this file, or None if there is none or its file shards have changed."""
    if not os.path.exists(_record_path(source, output)):
        return None
    record = storage.read_json(_record_path(source, output), "a record of an earlier prepare")
    for shard in record.values():
        path = os.path.join(output, shard["file"])
        if not os.path.exists(path) or os.path.getsize(path) != shard["tokens"] * _dtype(model).itemsize:
            return None
    return record


class _ShardWriter:
    """Writes one file shard to PATH.part; `close` renames it to PATH."""

    def __init__(self, split, source, settings, model):
        self.name = f"{split}-{source.index:05}.bin"
        # Not `storage.replaced`, which always ends with a file: a file shard without a token is not kept, and the file
        # shards of both splits are open at once.
        self._path = os.path.join(settings.output, self.name)
        self._dtype, self._model = _dtype(model), model
        self._file, self._sha = open(f"{self._path}.part", "wb"), hashlib.sha256()
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

    def close(self) -> dict:
        """Returns: the file shard's record for dataset.json. Without any token no file is written."""
        self._file.close()
        if self.tokens:
            os.replace(f"{self._path}.part", self._path)
        else:
            os.remove(f"{self._path}.part")
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return {"file": self.name, **counts, "sha256": self._sha.hexdigest()}

    def abandon(self) -> None:
        """Removes the unfinished file."""
        self._file.close()
        if os.path.exists(f"{self._path}.part"):
            os.remove(f"{self._path}.part")


def _tokenize_file(source, settings, model, report: Callable[[int, int, int], None]) -> dict:
    """Tokenizes one input file, and records in `.done` that it is finished.

    Returns: {split: record of its file shard}. Raises: UserError; no .part file is left behind.
    """
    splits = ("validation",) if source.held_out else SPLITS
    writers: dict[str, _ShardWriter] = {}
    try:
        for split in splits:
            writers[split] = _ShardWriter(split, source, settings, model)
        position = 0
        for texts, position in _batches(source.path, settings.text_key):
            _write_batch(texts, source, settings, model, writers)
            report(source.index, position, sum(writer.tokens for writer in writers.values()))
        if not any(writer.documents for writer in writers.values()):
            raise UserError(f"{source.path}: expected documents, found none")
        record = {split: writer.close() for split, writer in writers.items()}
    except BaseException as error:
        for writer in writers.values():
            writer.abandon()
        if isinstance(error, OSError):
            raise UserError(f"{settings.output}: cannot be written: {error.strerror}") from error
        raise
    record = {split: shard for split, shard in record.items() if shard["tokens"]}
    storage.write_json(_record_path(source, settings.output), record)
    return record


def _batches(path, text_key) -> Iterator[tuple[list[str], int]]:
    """Yields (documents of about _BATCH_CHARS characters together, bytes of the file read so far)."""
    batch, chars, position = [], 0, 0
    for text, position in documents.read(path, text_key):
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch, position
            batch, chars = [], 0
    yield batch, position


def _write_batch(texts: list[str], source, settings, model, writers: dict[str, _ShardWriter]) -> None:
    """Tokenizes documents and writes each to the file shard of its split."""
    by_split: dict[str, list[str]] = {split: [] for split in writers}
    for text in texts:
        by_split[_split_of(text, source, settings)].append(text)
    for split, chosen in by_split.items():
        writers[split].write(chosen, model.encode_batch(chosen, settings.threads))


def _split_of(text, source, settings) -> str:
    if source.held_out:
        return "validation"
    # The hash, as a number in [0, 1), gives all copies of a document the same split, whatever files they are in.
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if share < settings.validation_fraction else "train"


def _merged(shards: list[dict]) -> dict:
    """The record of a split in dataset.json, from those of its file shards."""
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    return totals | {"shards": shards}


def _hold_out_the_end(shards: list[dict], fraction, output, model) -> dict[str, dict]:
    """Moves the last training tokens to the validation split, for texts of so few documents that none was held out.

    Args:
      shards: records of the training split's file shards; the tokens come from the last one.
    Returns: {split: its record}. Raises: UserError if there are too few tokens.
    """
    *others, last = shards
    path = os.path.join(output, last["file"])
    ids = np.fromfile(path, _dtype(model))
    # Each split needs two tokens: one to predict, and one to predict it from.
    wanted = max(2, round(fraction * sum(shard["tokens"] for shard in shards)))
    cut = len(ids) - min(wanted, len(ids) - 2)
    if cut < 2:
        raise UserError(f"{output}: {len(ids)} tokens are too few to hold some out; give validation_input")
    name = last["file"].replace("train", "validation")
    tail_bytes = len(model.decode(ids[cut:]).encode())
    storage.write_bytes(os.path.join(output, name), ids[cut:].tobytes())
    storage.write_bytes(path, ids[:cut].tobytes())
    held_out = {
        "file": name,
        "documents": 0,  # the tail holds no whole document
        "tokens": len(ids) - cut,
        "bytes": tail_bytes,
        "sha256": storage.sha256(os.path.join(output, name)),
    }
    last = last | {"tokens": cut, "bytes": last["bytes"] - tail_bytes, "sha256": storage.sha256(path)}
    print(f"no document was held out by its hash, so the last {len(ids) - cut:,} tokens are held out")
    return {"train": _merged([*others, last]), "validation": _merged([held_out])}
