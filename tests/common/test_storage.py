"""Data and workdirs behind URLs: the same batches, runs and messages as on a disk."""

import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import DESCRIPTION

from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.description import steps
from memoryllm_jax.checkpoint.reader import Reader
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.shards import prepare
from memoryllm_jax.training import batches, loop, metrics


def test_a_file_or_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"first")
    with pytest.raises(RuntimeError), storage.replaced(str(path)) as part:
        pathlib.Path(part).write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]
    with storage.replaced(str(tmp_path / "folder")) as part:
        os.mkdir(part)
        pathlib.Path(part, "inside").touch()
    assert os.listdir(tmp_path / "folder") == ["inside"]
    with pytest.raises(UserError, match="file/below: cannot be written: Not a directory"):
        storage.write_bytes(str(path / "below"), b"")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_name_in_a_file_stays_in_its_folder(tmp_path):
    folder, beside = tmp_path / "folder", tmp_path / "beside"
    (folder / "sub").mkdir(parents=True)
    beside.mkdir()
    (folder / "inner").symlink_to("sub")
    (folder / "outer").symlink_to(beside)
    for name in ("a", "sub/a", "inner/a", "..a"):
        assert storage.inside(str(folder), name, "index") == str(folder / name)
    assert storage.inside(str(folder), "outer/a", "index", (str(beside),)) == str(folder / "outer/a")
    for name in ("", ".", "../a", "sub/../../a", "/etc/a", "gs://a", "a\0", "..\\a", "outer/a", "a//b"):
        with pytest.raises(UserError, match=r"index: expected .*found"):
            storage.inside(str(folder), name, "index")


@pytest.mark.parametrize(
    "number, message",
    [
        (errno.EWOULDBLOCK, r"in use by another run \(process 1 on host\)$"),
        (
            errno.ENOLCK,
            r"cannot be locked against a second run, as the file system refuses locks \(No locks available\);",
        ),
        (errno.EOPNOTSUPP, r"cannot be locked .* \(Operation not supported\); choose a folder elsewhere, or mount"),
    ],
)
def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch, number, message):
    (tmp_path / ".lock").write_text("process 1 on host")
    monkeypatch.setattr(fcntl, "flock", raises(OSError(number, os.strerror(number))))
    monkeypatch.setattr(fcntl, "lockf", fcntl.flock)
    with pytest.raises(UserError, match=f"^{tmp_path}: {message}"):
        storage.lock_folder(str(tmp_path))
    with pytest.raises(UserError, match=r"^file: (in use|cannot be locked)"):
        storage.lock_byte(0, "file", 0)


def test_a_folder_with_nothing_but_its_lock_is_removed(tmp_path):
    for name, files in (("empty", []), ("used", ["metrics.jsonl"])):
        lock = storage.lock_folder(str(tmp_path / name))
        for file in files:
            (tmp_path / name / file).touch()
        storage.release_lock(lock, str(tmp_path / name))
    assert os.listdir(tmp_path) == ["used"]
    storage.lock_folder(str(tmp_path / "used")).close()  # it is free again


@pytest.fixture
def in_memory(data_path):
    """A copy of the prepared data behind a memory:// URL."""
    fs = fsspec.filesystem("memory")
    fs.put(f"{data_path}/", "/data/", recursive=True)
    yield "memory://data"
    fs.rm("/data", recursive=True)


def assert_same_batches(ours, expected):
    for step in range(len(expected)):
        for shard, arrays in expected[step].items():
            for a, b in zip(ours[step][shard], arrays):
                np.testing.assert_array_equal(a, b)


def test_batches_from_a_url_are_those_from_the_disk(make_config, data_path, in_memory):
    config = make_config("memory", steps=6, **{"eval.batches": 0})
    far, near = Dataset(in_memory), Dataset(data_path)
    far.verify()
    assert far.digest == near.digest and far.tokenizer().digest == near.tokenizer().digest
    for kind in (batches.TrainBatches, batches.ValidationBatches):
        ours, expected = (kind(config, dataset, 2, [0, 1]) for dataset in (far, near))
        assert ours.sizes() == expected.sizes()
        assert_same_batches(ours, expected)


def test_a_read_that_spans_shards(corpus, data_path, tmp_path):
    """Three file shards; ranges that cross one or both of their borders, from the disk and from a URL."""
    lines = open(corpus).read().splitlines(keepends=True)
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text("".join(lines[i * 5 : i * 5 + 5]))
    spec = f"sentencepiece:{data_path}/tokenizer.model"
    prepare(f"{tmp_path}/*.jsonl", spec, f"{tmp_path}/out", validation_fraction=0.05, workers=1)
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/out/", "/three/", recursive=True)
    shards = [np.fromfile(p, "<u2") for p in sorted((tmp_path / "out").glob("train-*.bin"))]
    stream, border = np.concatenate(shards), len(shards[0])
    assert len(shards) == 3
    starts, count = [0, border - 5, border, len(stream) - 7], len(shards[1]) + 20
    for path in (f"{tmp_path}/out", "memory://three"):
        tokens = Dataset(path).train
        for start, ids in zip(starts, tokens.read_each(starts, count)):
            np.testing.assert_array_equal(ids, stream[start : start + count])
    fs.rm("/three", recursive=True)


def raises(error):
    """A function that raises the error, whatever its arguments are."""

    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_failed_read_names_the_url(in_memory, monkeypatch):
    dataset = Dataset(in_memory)
    monkeypatch.setattr(storage.filesystem(in_memory)[0], "cat_file", raises(ConnectionResetError("reset by peer")))
    with pytest.raises(UserError, match=r"^memory://data/train-00000.bin: cannot be read: reset by peer$"):
        dataset.train.read(0, 10)


def test_damaged_files_behind_a_url_are_named(in_memory):
    fs = storage.filesystem(in_memory)[0]
    dataset = Dataset(in_memory)
    whole = fs.cat_file("/data/train-00000.bin")
    fs.pipe_file("/data/train-00000.bin", whole[:100] + b"\x01" + whole[101:])
    with pytest.raises(UserError, match=r"^memory://data/train-00000.bin: checksum differs"):
        dataset.verify()
    fs.pipe_file("/data/train-00000.bin", whole[:-2])
    with pytest.raises(UserError, match=rf"train-00000.bin: expected {len(whole)} bytes, found {len(whole) - 2}$"):
        Dataset(in_memory)


def test_a_url_without_data_is_named():
    with pytest.raises(UserError, match=r"^memory://none/dataset.json: expected a folder that `prepare` finished: no"):
        Dataset("memory://none")


def test_the_extra_that_a_url_needs_is_named(monkeypatch):
    missing = ImportError("Please install gcsfs to access Google Storage")
    monkeypatch.setattr(fsspec.core, "url_to_fs", raises(missing))
    with pytest.raises(
        UserError, match=r"^gs://b/dataset.json: Please install gcsfs .*: pip install 'memoryllm_jax\[gcs\]'$"
    ):
        Dataset("gs://b")


def test_urls_are_refused_where_a_disk_is_needed(make_config):
    with pytest.raises(UserError, match=r"workdir: expected a folder on a disk or gs://BUCKET/FOLDER, found s3://b/w"):
        loop.train(make_config(), "s3://b/w")
    with pytest.raises(UserError, match=r"config.data.path: embedded .*: expected a workdir on a disk, found gs://b/w"):
        loop.train(make_config(**{"data.path": "embedded"}), "gs://b/w")


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket of an emulator that runs in this process."""
    # gcsfs reads this when it is imported; with it, gcsfs would ask a service that the emulator lacks.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    server = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Clients keep several connections open, which needs threads; but its store handles one request at a time.
    monkeypatch.setattr(server.server, "HTTPServer", server.server.ThreadingHTTPServer)
    monkeypatch.setattr(server.RequestHandler, "protocol_version", "HTTP/1.1")
    lock, handle = threading.Lock(), server.Router.handle

    def one_at_a_time(self, method):
        with lock:
            handle(self, method)

    monkeypatch.setattr(server.Router, "handle", one_at_a_time)
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "any")
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    running.start()
    yield "gs://bucket"
    running.stop()


def test_data_checkpoints_and_records_on_object_storage(make_config, corpus, data_path, bucket):
    fs, workdir = storage.filesystem(bucket)[0], f"{bucket}/run"
    spec = f"sentencepiece:{data_path}/tokenizer.model"
    prepare(corpus, spec, f"{bucket}/data", validation_fraction=0.05, workers=1)
    assert storage.names(f"{bucket}/data") == set(os.listdir(data_path))
    config = make_config("memory", **{"log.tensorboard": True})
    ours, expected = (batches.TrainBatches(config, Dataset(p), 2, [0, 1]) for p in (f"{bucket}/data", data_path))
    assert_same_batches(ours, expected)

    # An interrupted save is removed; a folder that is no checkpoint stays.
    fs.pipe_file(f"{workdir}/9/state", b"half")
    fs.pipe_file(f"{workdir}/own/notes", b"ours")
    state = {"params": {"a": jnp.arange(6.0)}, "step": jnp.int32(3)}
    checkpoints, writer = store.Checkpoints(workdir, keep=1), metrics.Writer(config, DESCRIPTION, workdir, 0, True)
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": 1 / step})
        if step > 1:
            writer.sync()
            checkpoints.save(step, state, DESCRIPTION)
    checkpoints.close()
    for step in (3, 4):
        writer.write(step, "validation", {"loss": 0.5})
    writer.close()

    # A run resumes from step 3, and then another run does, which takes the folder over.
    later = store.Checkpoints(workdir)
    assert later.steps() == steps(workdir) == [3] and later.description(3).data == DESCRIPTION.data
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(np.testing.assert_array_equal, later.restore(3, shapes), state)
    path, shape = jax.tree_util.tree_leaves_with_path(shapes["params"])[0]
    np.testing.assert_array_equal(Reader(workdir).leaf(3, path, shape), state["params"]["a"])
    np.testing.assert_array_equal(Reader(workdir).leaf_on_host(3, path), state["params"]["a"])
    time.sleep(1)  # TensorBoard names its files after the time in seconds
    first, second = (metrics.Writer(config, DESCRIPTION, workdir, 3, True) for _ in range(2))
    second.write(4, "train", {"loss": 0.25})
    with pytest.raises(UserError, match=rf"another run has taken over \(process {os.getpid()} on .* so this one ends"):
        first.sync()
    first.close()
    second.close()
    records = [json.loads(line) for line in fs.cat_file(f"{workdir}/metrics.jsonl").splitlines()]
    assert [(r["step"], r["kind"]) for r in records] == [(i, "train") for i in range(1, 5)]
    names = {os.path.basename(path) for path in fs.ls(workdir, detail=False)}
    assert names == {".lock", "3", "metrics.jsonl", "own", "tensorboard"}
    assert len(storage.files(f"{workdir}/tensorboard")) == 2
