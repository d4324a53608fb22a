"""Text files to token shards that training reads."""

import concurrent.futures.process
import hashlib
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import documents, tokenizer
from memoryllm_jax.data.dataset import FORMAT

SENTENCEPIECE_CHARS = 50_000_000  # text that a SentencePiece model is trained on, at most
_BATCH_CHARS = 1_000_000
_TRAIN_SPEC = "sentencepiece:train:"


class Source(NamedTuple):
    index: int
    path: str
    held_out: bool  # the whole file


class Settings(NamedTuple):
    output: str
    text_key: str
    validation_fraction: float
    threads: int


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
    """Writes the token shards and returns the contents of dataset.json. Raises: UserError."""
    if storage.is_url(output):
        raise UserError(f"--output={output}: expected a folder on a disk, which can be copied to a URL when it is done")
    if not 0 < validation_fraction < 1:
        raise UserError(f"--validation_fraction: expected a number between 0 and 1, found {validation_fraction}")
    if workers < 0:
        raise UserError(f"--workers: expected zero or more, found {workers}")
    held_out = documents.expand(validation_pattern) if validation_pattern else []
    matched = documents.expand(pattern)
    to_train = [path for path in matched if path not in set(held_out)]
    if len(to_train) < len(matched):
        print(f"held out of training: {len(matched) - len(to_train)} files that --validation_input names too")
    if not to_train:
        raise UserError(f"--input={pattern}: expected files beside those of --validation_input, found none")
    paths = [(path, False) for path in to_train] + [(path, True) for path in held_out]
    sources = [Source(i, path, whole) for i, (path, whole) in enumerate(paths)]
    if held_out:
        validation_fraction = 0.0
    sizes = [documents.size(source.path) for source in sources]
    lock = storage.lock_folder(output)
    plan = {
        "format": FORMAT,
        "tokenizer": tokenizer_spec,
        "text_key": text_key,
        "validation_fraction": validation_fraction,
        "sources": [[source.path, size, source.held_out] for source, size in zip(sources, sizes)],
    }
    try:
        return _prepare(plan, sources, sizes, output, workers)
    except UserError:
        # With nothing to go on from, leave the folder as it was.
        if not _has_results(output) and os.path.exists(os.path.join(output, ".plan.json")):
            for name in (".plan.json", "tokenizer.model"):
                if os.path.exists(os.path.join(output, name)):
                    os.remove(os.path.join(output, name))
        raise
    finally:
        lock.close()


def _has_results(output):
    done = os.path.join(output, ".done")
    return os.path.exists(os.path.join(output, "dataset.json")) or (os.path.isdir(done) and bool(os.listdir(done)))


def _prepare(plan, sources, sizes, output, workers):
    manifest, plan_path = os.path.join(output, "dataset.json"), os.path.join(output, ".plan.json")
    go_on = os.path.exists(plan_path) and _has_results(output)
    if go_on:
        before = storage.read_json(plan_path, "the plan of an earlier prepare")
        different = [key for key in plan if before.get(key) != plan[key]]
        if different:
            raise UserError(
                f"{output}: was begun with another {', '.join(different)}; finish that, or use a new folder"
            )
    elif os.path.exists(manifest):
        raise UserError(f"{output}: holds data without its plan; use a new folder")
    else:
        if os.path.exists(os.path.join(output, "tokenizer.model")) and not os.path.exists(plan_path):
            raise UserError(f"{output}: holds a tokenizer.model that `prepare` did not write; use another folder")
        storage.write_json(plan_path, plan)
    model = _tokenizer(plan["tokenizer"], sources, plan["text_key"], output, go_on)
    if os.path.exists(manifest):
        print(f"{output}: already prepared")
        return storage.read_json(manifest, "a prepared data set")

    workers = min(workers or os.cpu_count(), len(sources))
    threads = max(1, (os.cpu_count() or 1) // workers)
    settings = Settings(output, plan["text_key"], plan["validation_fraction"], threads)
    results = _tokenize(sources, sizes, settings, model, workers)
    splits = {name: _merge(name, results) for name in ("train", "validation")}
    if not splits["train"]["tokens"]:
        raise UserError(f"{output}: no document was left to train on; check the input and the held-out share")
    if not splits["validation"]["tokens"]:
        _hold_out_the_end(splits, plan["validation_fraction"], output, model)
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
        ratio = split["bytes"] / split["tokens"]
        print(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens "
            f"({ratio:.2f} bytes a token), {len(split['shards'])} shards"
        )
    return dataset


def _tokenizer(spec, sources, text_key, output, go_on):
    """The tokenizer of the spec, kept in the folder as tokenizer.model; to go on it must be the same."""
    path = os.path.join(output, "tokenizer.model")
    if not spec.startswith(_TRAIN_SPEC):
        model = tokenizer.load(spec)
        if go_on and storage.sha256(path) != model.digest:
            raise UserError(f"{output}: was begun with another tokenizer than {spec}; use a new folder")
    elif go_on:
        return tokenizer.load(f"sentencepiece:{path}")
    else:
        size = spec.removeprefix(_TRAIN_SPEC)
        if not size.isdigit():
            raise UserError(f"--tokenizer={spec}: expected a vocabulary size at the end, found {size!r}")
        print(f"training a SentencePiece model of {size} ids", flush=True)
        model = tokenizer.train_sentencepiece(_sample(sources, text_key), int(size), os.cpu_count())
    storage.write_bytes(path, model.content)
    return model


def _sample(sources, text_key):
    """Documents for training a tokenizer: the same number of characters from up to 64 files, spread evenly."""
    sources = [source for source in sources if not source.held_out]
    chosen = sources[:: -(-len(sources) // 64)]
    for source in chosen:
        left = SENTENCEPIECE_CHARS // len(chosen)
        for text, _ in documents.read(source.path, text_key):
            yield text
            left -= len(text)
            if left < 0:
                break


def _tokenize(sources, sizes, settings, model, workers):
    """Results of all files, in order; those of an earlier run are taken as they are."""
    os.makedirs(os.path.join(settings.output, ".done"), exist_ok=True)
    results = {source.index: _done(source, settings.output, model) for source in sources}
    todo = [source for source in sources if results[source.index] is None]
    done_bytes = {source.index: size for source, size in zip(sources, sizes) if results[source.index]}
    progress = Progress("prepare", sum(sizes), "B", initial=sum(done_bytes.values()))
    tokens, start = {}, time.monotonic()

    def report(index, position, count):
        done_bytes[index], tokens[index] = min(position, sizes[index]), count
        rate = sum(tokens.values()) / (time.monotonic() - start)
        progress.update(sum(done_bytes.values()), f"{rate / 1e3:,.0f} k tokens/s")

    if workers == 1:
        for source in todo:
            results[source.index] = _tokenize_file(source, settings, model, report)
    elif todo:
        context = multiprocessing.get_context("spawn")
        reports = context.Queue()
        arguments = (settings, model.to_json(), reports)
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
            futures = {pool.submit(_work, source): source.index for source in todo}
            try:
                waiting = set(futures)
                while waiting:
                    finished, waiting = concurrent.futures.wait(waiting, timeout=0.2)
                    for future in finished:
                        results[futures[future]] = future.result()
                    while True:
                        try:
                            report(*reports.get_nowait())
                        except queue.Empty:
                            break
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError(
                    f"a worker was killed, perhaps for want of memory; try fewer than --workers={workers}"
                ) from error
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    progress.close()
    return [results[source.index] for source in sources]


_worker = {}


def _start_worker(settings, model, reports):
    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to tell of
    reports.cancel_join_thread()  # a parent that ends early no longer reads them
    _worker.update(settings=settings, model=tokenizer.Tokenizer.from_json(model), reports=reports)


def _work(source):
    return _tokenize_file(source, _worker["settings"], _worker["model"], lambda *args: _worker["reports"].put(args))


def _dtype(model):
    return np.dtype("<u2") if model.vocab_size <= 1 << 16 else np.dtype("<u4")


def _record_path(source, output):
    return os.path.join(output, ".done", f"{source.index:05}.json")


def _done(source, output, model):
    """What an earlier run recorded of this file, if its shards are still there."""
    if not os.path.exists(_record_path(source, output)):
        return None
    record = storage.read_json(_record_path(source, output), "a record of an earlier prepare")
    for shard in record.values():
        path = os.path.join(output, shard["file"])
        if not os.path.exists(path) or os.path.getsize(path) != shard["tokens"] * _dtype(model).itemsize:
            return None
    return record


class _Shard:
    """One shard being written; it gets its name when it is whole."""

    def __init__(self, split, source, settings, model):
        self.name = f"{split}-{source.index:05}.bin"
        self.path = os.path.join(settings.output, self.name)
        self.dtype, self.model = _dtype(model), model
        self.file, self.sha = open(f"{self.path}.part", "wb"), hashlib.sha256()
        self.documents = self.tokens = self.bytes = 0

    def write(self, texts, ids_of_texts):
        bos, eos = ([] if i is None else [i] for i in (self.model.bos_id, self.model.eos_id))
        flat = [i for ids in ids_of_texts for i in (*bos, *ids, *eos)]
        array = np.array(flat, np.int64)
        if array.size and array.max() >= self.model.vocab_size:
            raise UserError(f"tokenizer: gave id {array.max()}, outside its vocabulary of {self.model.vocab_size}")
        data = array.astype(self.dtype).tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.documents += len(texts)
        self.tokens += array.size
        self.bytes += sum(len(text.encode()) for text in texts)

    def close(self):
        self.file.close()
        if self.tokens:
            os.replace(f"{self.path}.part", self.path)
        else:
            os.remove(f"{self.path}.part")
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return {"file": self.name, **counts, "sha256": self.sha.hexdigest()}


def _tokenize_file(source, settings, model, report):
    """{split: shard record} of one input file."""
    splits = ["validation"] if source.held_out else ["train", "validation"]
    shards = {}
    try:
        for split in splits:
            shards[split] = _Shard(split, source, settings, model)
        batch, chars, position = [], 0, 0

        def flush(position):
            split_of = [_split(text, source, settings) for text in batch]
            for split, shard in shards.items():
                texts = [text for text, its in zip(batch, split_of) if its == split]
                shard.write(texts, model.encode_batch(texts, settings.threads))
            batch.clear()
            report(source.index, position, sum(shard.tokens for shard in shards.values()))

        for text, position in documents.read(source.path, settings.text_key):
            batch.append(text)
            chars += len(text)
            if chars >= _BATCH_CHARS:
                flush(position)
                chars = 0
        flush(position)
        if not any(shard.documents for shard in shards.values()):
            raise UserError(f"{source.path}: expected documents, found none")
        record = {split: shard.close() for split, shard in shards.items()}
    except BaseException as error:
        for shard in shards.values():
            shard.file.close()
            if os.path.exists(f"{shard.path}.part"):
                os.remove(f"{shard.path}.part")
        if isinstance(error, OSError):
            raise UserError(f"{settings.output}: cannot be written: {error.strerror}") from error
        raise
    record = {split: shard for split, shard in record.items() if shard["tokens"]}
    storage.write_json(_record_path(source, settings.output), record)
    return record


def _split(text, source, settings):
    if source.held_out:
        return "validation"
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if share < settings.validation_fraction else "train"


def _merge(split, results):
    shards = [record[split] for record in results if split in record]
    return {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")} | {"shards": shards}


def _hold_out_the_end(splits, fraction, output, model):
    """No document was held out by its hash: the last tokens of the training text are."""
    last = splits["train"]["shards"][-1]
    path = os.path.join(output, last["file"])
    ids = np.fromfile(path, _dtype(model))
    cut = len(ids) - min(max(2, round(fraction * splits["train"]["tokens"])), len(ids) - 2)
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
    last.update(tokens=cut, bytes=last["bytes"] - tail_bytes, sha256=storage.sha256(path))
    results = [{"train": shard} for shard in splits["train"]["shards"]]
    splits.update(train=_merge("train", results), validation=_merge("validation", [{"validation": held_out}]))
    print(f"no document fell into the held-out share: held out the last {len(ids) - cut:,} tokens instead")
