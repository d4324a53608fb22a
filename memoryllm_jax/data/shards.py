"""Text files to token shards that training reads: one file shard for each input file and split.

Work is shared out by input file. `.plan.json` in the output folder holds what was asked for, `.done/` a record of each
input file that is finished, so that a run that was killed goes on with the others. `dataset.json` is written last.
"""

import concurrent.futures
import concurrent.futures.process
import hashlib
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

SENTENCEPIECE_CHARS = 50_000_000  # text that a SentencePiece model is trained on, at most
_SAMPLED_FILES = 64  # that this text comes from, at most
_BATCH_CHARS = 1_000_000  # text tokenised at a time
_TRAIN_SPEC = "sentencepiece:train:"
_UINT16_IDS = 1 << 16


class Source(NamedTuple):
    """An input file."""

    index: int
    path: str
    size: int  # bytes as stored
    held_out: bool  # all of it is held out for validation


class Settings(NamedTuple):
    """What tokenising a file depends on, beside the tokenizer."""

    output: str
    text_key: str
    validation_fraction: float
    threads: int  # of a worker's tokenizer


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
    """Writes token shards into a folder, or goes on with one that was left unfinished.

    Args:
      pattern: comma-separated globs of text files, or "embedded".
      tokenizer_spec: sentencepiece:FILE, sentencepiece:train:VOCAB, llama3:FILE or hf:FILE.
      validation_pattern: files that are held out whole; then no other document is held out.
      validation_fraction: share of documents held out, chosen by the hash of their text.
      text_key: JSON field or parquet column that holds the text.
      workers: processes; 0: one for each core, at most one for each file.
    Returns: the contents of dataset.json. Raises: UserError.
    """
    if storage.is_url(output):
        raise ArgumentError(
            "output", f"expected a folder on a disk, which can be copied to a URL when it is done, found {output}"
        )
    if not 0 < validation_fraction < 1:
        raise ArgumentError("validation_fraction", f"expected a number between 0 and 1, found {validation_fraction}")
    if workers < 0:
        raise ArgumentError("workers", f"expected zero or more, found {workers}")
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
        _forget_fruitless_start(output)
        raise
    finally:
        lock.close()


def _sources(pattern, validation_pattern) -> list[Source]:
    held_out = documents.expand(validation_pattern) if validation_pattern else []
    matched = documents.expand(pattern)
    to_train = [path for path in matched if path not in set(held_out)]
    if len(to_train) < len(matched):
        print(f"held out of training: {len(matched) - len(to_train)} files that --validation_input names too")
    if not to_train:
        raise ArgumentError("input", f"expected files beside those of validation_input, found none in {pattern}")
    paths = [(path, False) for path in to_train] + [(path, True) for path in held_out]
    return [Source(i, path, documents.size(path), whole) for i, (path, whole) in enumerate(paths)]


def _forget_fruitless_start(output):
    """Leaves the folder as it was where nothing is there to go on from."""
    plan_path = os.path.join(output, ".plan.json")
    if _has_results(output) or not os.path.exists(plan_path):
        return
    for name in (".plan.json", "tokenizer.model"):
        if os.path.exists(os.path.join(output, name)):
            os.remove(os.path.join(output, name))


def _has_results(output) -> bool:
    done = os.path.join(output, ".done")
    return os.path.exists(os.path.join(output, "dataset.json")) or (os.path.isdir(done) and bool(os.listdir(done)))


def _prepare(plan, sources, output, workers) -> dict:
    manifest = os.path.join(output, "dataset.json")
    goes_on = _begin(plan, output)
    model = _tokenizer(plan["tokenizer"], sources, plan["text_key"], output, goes_on)
    if os.path.exists(manifest):
        print(f"{output}: already prepared")
        return storage.read_json(manifest, "a prepared data set")

    workers = min(workers or os.cpu_count() or 1, len(sources))
    threads = max(1, (os.cpu_count() or 1) // workers)
    settings = Settings(output, plan["text_key"], plan["validation_fraction"], threads)
    records = _tokenize(sources, settings, model, workers)
    splits = {split: _merged([record[split] for record in records if split in record]) for split in SPLITS}
    if not splits["train"]["tokens"]:
        raise UserError(f"{output}: no document was left to train on; check the input and the held-out share")
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
            f"({split['bytes'] / split['tokens']:.2f} bytes a token), {len(split['shards'])} shards"
        )
    return dataset


def _begin(plan, output) -> bool:
    """Writes the plan, or compares it with that of an earlier run. Returns whether there is a run to go on with."""
    plan_path = os.path.join(output, ".plan.json")
    if os.path.exists(plan_path) and _has_results(output):
        before = storage.read_json(plan_path, "the plan of an earlier prepare")
        different = [key for key in plan if before.get(key) != plan[key]]
        if different:
            raise UserError(
                f"{output}: was begun with another {', '.join(different)}; finish that, or use a new folder"
            )
        return True
    if os.path.exists(os.path.join(output, "dataset.json")):
        raise UserError(f"{output}: holds data without its plan; use a new folder")
    if os.path.exists(os.path.join(output, "tokenizer.model")) and not os.path.exists(plan_path):
        raise UserError(f"{output}: holds a tokenizer.model that `prepare` did not write; use another folder")
    storage.write_json(plan_path, plan)
    return False


def _tokenizer(spec, sources, text_key, output, goes_on) -> Tokenizer:
    """The tokenizer of the spec, copied to tokenizer.model; a run that goes on must name the same."""
    path = os.path.join(output, "tokenizer.model")
    if not spec.startswith(_TRAIN_SPEC):
        model = tokenizer_lib.load(spec)
        if goes_on and storage.sha256(path) != model.digest:
            raise UserError(f"{output}: was begun with another tokenizer than {spec}; use a new folder")
    elif goes_on:
        return tokenizer_lib.load(f"sentencepiece:{path}")
    else:
        size = spec.removeprefix(_TRAIN_SPEC)
        if not size.isdigit():
            raise ArgumentError("tokenizer", f"expected a vocabulary size at the end of {spec}, found {size!r}")
        print(f"training a SentencePiece model of {size} ids", flush=True)
        model = tokenizer_lib.train_sentencepiece(_sample(sources, text_key), int(size), os.cpu_count())
    storage.write_bytes(path, model.content)
    return model


def _sample(sources, text_key) -> Iterator[str]:
    """Documents for training a tokenizer: the same number of characters from some files, spread evenly."""
    sources = [source for source in sources if not source.held_out]
    chosen = sources[:: -(-len(sources) // _SAMPLED_FILES)]
    for source in chosen:
        left = SENTENCEPIECE_CHARS // len(chosen)
        for text, _ in documents.read(source.path, text_key):
            yield text
            left -= len(text)
            if left < 0:
                break


class _Report:
    """Progress over all files, from what workers send: (file's index, bytes read of it, tokens written)."""

    def __init__(self, sources: list[Source], finished: list[Source]):
        self._sizes = [source.size for source in sources]
        self._bytes = {source.index: source.size for source in finished}
        self._tokens: dict[int, int] = {}
        self._start = time.monotonic()
        self._progress = Progress("prepare", sum(self._sizes), "B", initial=sum(self._bytes.values()))

    def __call__(self, index: int, position: int, tokens: int) -> None:
        # A reader may stand past the end of what the file holds, by its buffer.
        self._bytes[index], self._tokens[index] = min(position, self._sizes[index]), tokens
        rate = sum(self._tokens.values()) / (time.monotonic() - self._start)
        self._progress.update(sum(self._bytes.values()), f"{rate / 1e3:,.0f} k tokens/s")

    def close(self) -> None:
        self._progress.close()


def _tokenize(sources, settings, model, workers) -> list[dict]:
    """The record of each file, in order; records of an earlier run are taken as they are."""
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
    # Spawned, not forked: JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    arguments = (settings, model.to_json(), reports)
    records = {}
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        futures = {pool.submit(_work, source): source.index for source in todo}
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = concurrent.futures.wait(waiting, timeout=0.2)
                for future in finished:
                    records[futures[future]] = future.result()
                _drain(reports, report)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"a worker was killed, perhaps for want of memory; try fewer than --workers={workers}"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return records


def _drain(reports, report):
    while True:
        try:
            report(*reports.get_nowait())
        except queue.Empty:
            return


_worker = {}  # of a worker process: what `_start_worker` was given


def _start_worker(settings, model, reports):
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    # A parent that ends early no longer reads the queue; a worker must not wait for it.
    reports.cancel_join_thread()
    _worker.update(settings=settings, model=Tokenizer.from_json(model), reports=reports)


def _work(source):
    def report(*progress):
        _worker["reports"].put(progress)

    return _tokenize_file(source, _worker["settings"], _worker["model"], report)


def _dtype(model) -> np.dtype:
    return np.dtype("<u2") if model.vocab_size <= _UINT16_IDS else np.dtype("<u4")


def _record_path(source, output):
    return os.path.join(output, ".done", f"{source.index:05}.json")


def _record_of(source, output, model) -> dict | None:
    """What an earlier run recorded of this file, if its shards are still there."""
    if not os.path.exists(_record_path(source, output)):
        return None
    record = storage.read_json(_record_path(source, output), "a record of an earlier prepare")
    for shard in record.values():
        path = os.path.join(output, shard["file"])
        if not os.path.exists(path) or os.path.getsize(path) != shard["tokens"] * _dtype(model).itemsize:
            return None
    return record


class _ShardWriter:
    """Writes one file shard to PATH.part; `close` gives it its name."""

    def __init__(self, split, source, settings, model):
        self.name = f"{split}-{source.index:05}.bin"
        self._path = os.path.join(settings.output, self.name)
        self._dtype, self._model = _dtype(model), model
        self._file, self._sha = open(f"{self._path}.part", "wb"), hashlib.sha256()
        self.documents = self.tokens = self.bytes = 0

    def write(self, texts: list[str], ids_of_texts: list[list[int]]) -> None:
        bos = [] if self._model.bos_id is None else [self._model.bos_id]
        eos = [] if self._model.eos_id is None else [self._model.eos_id]
        flat = [i for ids in ids_of_texts for i in (*bos, *ids, *eos)]
        array = np.array(flat, np.int64)
        if array.size and array.max() >= self._model.vocab_size:
            raise UserError(f"tokenizer: gave id {array.max()}, outside its vocabulary of {self._model.vocab_size}")
        data = array.astype(self._dtype).tobytes()
        self._file.write(data)
        self._sha.update(data)
        self.documents += len(texts)
        self.tokens += array.size
        self.bytes += sum(len(text.encode()) for text in texts)

    def close(self) -> dict:
        """Returns: the shard's record in dataset.json. A shard without tokens leaves no file."""
        self._file.close()
        if self.tokens:
            os.replace(f"{self._path}.part", self._path)
        else:
            os.remove(f"{self._path}.part")
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return {"file": self.name, **counts, "sha256": self._sha.hexdigest()}

    def abandon(self) -> None:
        self._file.close()
        if os.path.exists(f"{self._path}.part"):
            os.remove(f"{self._path}.part")


def _tokenize_file(source, settings, model, report: Callable[[int, int, int], None]) -> dict:
    """{split: shard record} of one input file, also written to `.done`. Raises: UserError; no part is left behind."""
    writers: dict[str, _ShardWriter] = {}
    try:
        for split in ("validation",) if source.held_out else SPLITS:
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
    """(documents of about _BATCH_CHARS together, bytes of the file read so far)."""
    batch, chars, position = [], 0, 0
    for text, position in documents.read(path, text_key):
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch, position
            batch, chars = [], 0
    yield batch, position


def _write_batch(texts, source, settings, model, writers):
    by_split: dict[str, list[str]] = {split: [] for split in writers}
    for text in texts:
        by_split[_split_of(text, source, settings)].append(text)
    for split, chosen in by_split.items():
        writers[split].write(chosen, model.encode_batch(chosen, settings.threads))


def _split_of(text, source, settings) -> str:
    if source.held_out:
        return "validation"
    # By the hash, so that copies of a document fall on the same side, whatever file they are in.
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if share < settings.validation_fraction else "train"


def _merged(shards: list[dict]) -> dict:
    """A split's record in dataset.json."""
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    return totals | {"shards": shards}


def _hold_out_the_end(shards: list[dict], fraction, output, model) -> dict[str, dict]:
    """Splits where no document was held out by its hash: the last tokens of the training text are held out."""
    *others, last = shards
    path = os.path.join(output, last["file"])
    ids = np.fromfile(path, _dtype(model))
    wanted = max(2, round(fraction * sum(shard["tokens"] for shard in shards)))
    cut = len(ids) - min(wanted, len(ids) - 2)
    if cut < 2:
        raise UserError(f"{output}: {len(ids)} tokens are too few to hold some out; give --validation_input")
    name = last["file"].replace("train", "validation")
    tail_bytes = len(model.decode(ids[cut:]).encode())
    storage.write_bytes(os.path.join(output, name), ids[cut:].tobytes())
    storage.write_bytes(path, ids[:cut].tobytes())
    held_out = {
        "file": name,
        "documents": 0,
        "tokens": len(ids) - cut,
        "bytes": tail_bytes,
        "sha256": storage.sha256(os.path.join(output, name)),
    }
    last = last | {"tokens": cut, "bytes": last["bytes"] - tail_bytes, "sha256": storage.sha256(path)}
    print(f"no document fell into the held-out share: held out the last {len(ids) - cut:,} tokens instead")
    return {"train": _merged([*others, last]), "validation": _merged([held_out])}
