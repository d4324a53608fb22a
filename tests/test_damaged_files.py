"""Files that are damaged, odd or hostile: each reader gives a value or one UserError, in bounded memory and time.

The suite tries a few files for each reader, the same in every run. `-m long` tries many, drawn anew in every run.
"""

import base64
import contextlib
import gzip
import json
import os
import pathlib
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from typing import NamedTuple

import damage
import hypothesis
import pytest
import zstandard
from hypothesis import HealthCheck
from lab import GOLDEN

from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import documents, shards, tokenizer
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.hf import import_
from memoryllm_jax.hf import shards as hf_shards
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.memory import FileMemory
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.training import metrics

MADE_BEFORE = pathlib.Path(__file__).parent / "made_before"
SECONDS = 10  # of CPU time, which a reader may take for one small file
MEGABYTES = 16  # that a reader may take beside twice the size of its file
TRAINED = {"step": 1, "kind": "train", "tokens": 64, "tokens_per_second": 9.5, "model_flops_per_second": 1e6}
VALIDATED = {"step": 1, "kind": "validation", "loss": 2.5, "perplexity": 12.2, "bits_per_byte": 1.1}
LINES = [{"text": "Some words.", "n": 1}, {"text": "More of them."}, {"text": "Umlauts: ä ö ü", "meta": {"a": [1, 2]}}]


class Reader(NamedTuple):
    """A kind of file that people bring.

    Attributes:
      make: fills an empty folder with whole files.
      file: the one of them that is damaged.
      damaged: a strategy, for the bytes of the whole file.
      read: reads the folder as a command would.
      tries: examples in the suite.
    """

    make: Callable[[pathlib.Path], object]
    file: str
    damaged: Callable
    read: Callable[[pathlib.Path], object]
    tries: int = 40


def copy_of(source, *names):
    """A function that copies files and folders of `source`."""

    def make(folder):
        for name in names or os.listdir(source):
            copy = shutil.copytree if os.path.isdir(source / name) else shutil.copy
            copy(source / name, folder / name)

    return make


def lines_of(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def with_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def read_data(folder):
    data = Dataset(str(folder))
    data.tokenizer()
    data.train.read(0, 64)
    data.validation.read(0, 8)


def read_model(folder):
    with contextlib.closing(TrainedModel(str(folder))) as model:
        model.leaf_on_host("final_norm/scale")


def read_tol(folder):
    with contextlib.closing(TolFile(str(folder / "memory.safetensors"))) as tol:
        for name in tol.tensors:
            if not name.startswith(("rows.", "padding")):
                tol.read(name)
        tol.tokenizer()


def read_overlay(folder):
    with contextlib.closing(TolFile(str(MADE_BEFORE / "memory.safetensors"))) as tol:
        Overlay.open(str(folder / "memory-edits.safetensors"), FileMemory(tol))


def read_texts(folder):
    for name in os.listdir(folder):
        for _ in documents.read(str(folder / name)):
            pass


def make_unfinished(folder):
    """A folder of `prepare` that stopped at the second of two files."""
    # Beside the folder, as the plan holds absolute paths.
    (folder.parent / "a.jsonl").write_bytes(lines_of(*[{"text": f"words of document {i}"} for i in range(60)]))
    whole = lines_of({"text": "words"})
    (folder.parent / "b.jsonl").write_bytes(whole.replace(b"{", b"["))
    with pytest.raises(UserError, match=r"b.jsonl: expected one JSON object a line"):
        prepare(folder)
    (folder.parent / "b.jsonl").write_bytes(whole)  # as long as before, so that the run may go on


def prepare(folder):
    with contextlib.redirect_stdout(None):
        spec = f"sentencepiece:{MADE_BEFORE / 'data' / 'tokenizer.model'}"
        shards.prepare(str(folder.parent / "?.jsonl"), spec, str(folder), validation_fraction=0.2, workers=1)


def make_hf(folder):
    """The golden directory, with an index and the settings that real directories have."""
    copy_of(pathlib.Path(GOLDEN) / "memory", "config.json", "tokenizer.json")(folder)
    shutil.copy(pathlib.Path(GOLDEN) / "memory" / "model.safetensors", folder / "model-1.safetensors")
    tensors = hf_shards.read_headers(str(pathlib.Path(GOLDEN) / "memory"))
    hf_shards.write_index(str(folder), {"model-1.safetensors": list(tensors)}, 0)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')


def read_hf(folder):
    import_.import_model(str(folder), str(folder / "work"))


def tokenizer_of(kind, name):
    return lambda folder: tokenizer.load(f"{kind}:{folder / name}").encode("Some words.")


def make_llama3(folder):
    """A tokenizer.model of Llama 3 with a token for each byte."""
    first = b"!" + bytes(b for b in range(256) if b != ord("!"))
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % rank for rank, byte in enumerate(first)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def make_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": [line["text"] for line in LINES]})
    pytest.importorskip("pyarrow.parquet").write_table(table, folder / "a.parquet")


def make_verified(folder):
    """Data that a workdir, the same folder, remembers as verified."""
    copy_of(MADE_BEFORE / "data")(folder)
    data = Dataset(str(folder), str(folder))
    data.verify()
    data.remember_verified()


def read_verified(folder):
    with contextlib.redirect_stdout(None):  # a line says that damage is ignored
        Dataset(str(folder), str(folder)).verify()


def hf(name, damaged=damage.json_files, tries=12):
    return Reader(make_hf, name, damaged, read_hf, tries)


READERS = {
    "dataset.json": Reader(copy_of(MADE_BEFORE / "data"), "dataset.json", damage.json_files, read_data),
    "plan": Reader(make_unfinished, ".plan.json", damage.json_files, prepare, 15),
    "record": Reader(make_unfinished, ".done/00000.json", damage.json_files, prepare, 15),
    "description": Reader(
        copy_of(MADE_BEFORE / "memory"), "40/description/metadata", damage.json_files, read_model, 20
    ),
    "ToL": Reader(copy_of(MADE_BEFORE, "memory.safetensors"), "memory.safetensors", damage.safetensors_files, read_tol),
    "overlay": Reader(
        copy_of(MADE_BEFORE, "memory-edits.safetensors"),
        "memory-edits.safetensors",
        damage.safetensors_files,
        read_overlay,
    ),
    "config.json": hf("config.json"),
    "index": hf("model.safetensors.index.json"),
    "safetensors": hf("model-1.safetensors", damage.safetensors_files),
    "generation_config.json": hf("generation_config.json"),
    "tokenizer_config.json": Reader(
        make_hf, "tokenizer_config.json", damage.json_files, tokenizer_of("hf", "tokenizer.json"), 20
    ),
    "tokenizer.json": Reader(make_hf, "tokenizer.json", damage.json_files, tokenizer_of("hf", "tokenizer.json")),
    "SentencePiece": Reader(
        copy_of(MADE_BEFORE / "data", "tokenizer.model"),
        "tokenizer.model",
        damage.bytes_files,
        tokenizer_of("sentencepiece", "tokenizer.model"),
    ),
    "Llama 3": Reader(make_llama3, "tokenizer.model", damage.bytes_files, tokenizer_of("llama3", "tokenizer.model")),
    "verified_data.json": Reader(make_verified, "verified_data.json", damage.json_files, read_verified),
    "JSON lines": Reader(with_file("a.jsonl", lines_of(*LINES)), "a.jsonl", damage.lines_files, read_texts),
    "gzip": Reader(
        with_file("a.jsonl.gz", gzip.compress(lines_of(*LINES), mtime=0)), "a.jsonl.gz", damage.bytes_files, read_texts
    ),
    "Zstandard": Reader(
        with_file("a.jsonl.zst", zstandard.compress(lines_of(*LINES))), "a.jsonl.zst", damage.bytes_files, read_texts
    ),
    "parquet": Reader(make_parquet, "a.parquet", damage.bytes_files, read_texts),
    "task": Reader(
        with_file("piqa.jsonl", lines_of({"goal": "Open it.", "sol1": "Pull.", "sol2": "Push.", "label": 1})),
        "piqa.jsonl",
        damage.lines_files,
        lambda folder: pytest.importorskip("memoryllm_jax.evaluation.tasks.local").piqa(str(folder)),
    ),
    "metrics": Reader(
        with_file("metrics.jsonl", lines_of(TRAINED, VALIDATED)),
        "metrics.jsonl",
        damage.lines_files,
        lambda folder: metrics.records(str(folder / "metrics.jsonl")),
    ),
}


class TooLong(BaseException):
    """Raised where a reader hangs. No Exception, so that no reader takes it for a damaged file."""


@contextlib.contextmanager
def bounded(size: int):
    """Fails if the code within takes more than SECONDS of CPU time, or much more memory than the file has bytes."""

    def stop(*_):
        raise TooLong(f"more than {SECONDS} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert peak < 2 * size + (MEGABYTES << 20), f"{peak / 2**20:.0f} MiB for a file of {size:,} bytes"


def check(name, tmp_path, monkeypatch, **settings):
    """Damages a reader's file in many ways."""
    reader = READERS[name]
    monkeypatch.setattr(store.Checkpoints, "save", lambda *_: None)  # an import that succeeds need not write
    whole = tmp_path / "whole"
    whole.mkdir()
    reader.make(whole)
    content = (whole / reader.file).read_bytes()
    reader.read(shutil.copytree(whole, tmp_path / "first"))  # compiles and imports what later reads would be blamed for

    @hypothesis.settings(
        database=None, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False, **settings
    )
    @hypothesis.given(reader.damaged(content))
    def one(damaged):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        (folder / reader.file).write_bytes(damaged)
        with bounded(len(damaged)), contextlib.suppress(UserError):
            reader.read(folder)

    one()


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_gives_a_value_or_one_error(name, tmp_path, monkeypatch):
    check(name, tmp_path, monkeypatch, max_examples=READERS[name].tries, derandomize=True)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_give_values_or_errors(name, tmp_path, monkeypatch, record_property):
    tries = 50 * READERS[name].tries
    record_property("tries", tries)
    check(name, tmp_path, monkeypatch, max_examples=tries)
