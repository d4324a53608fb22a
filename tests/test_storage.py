"""Data and workdirs behind URLs: the same batches, runs and messages as on a disk."""

import json
import os
import socket
import threading

import fsspec
import jax
import numpy as np
import pytest

from memoryllm_jax import data, files, prepare, saved, train
from memoryllm_jax.cli import UserError


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
    far, near = data.Dataset(in_memory), data.Dataset(data_path)
    far.verify()
    assert far.digest == near.digest and far.tokenizer().digest == near.tokenizer().digest
    for kind in (data.TrainBatches, data.ValidationBatches):
        ours, expected = (kind(config, dataset, 2, [0, 1]) for dataset in (far, near))
        assert ours.sizes() == expected.sizes()
        assert_same_batches(ours, expected)


def test_a_read_that_spans_shards(corpus, data_path, tmp_path):
    """One shard for each of three files; ranges that cross both borders, from the disk and from a URL."""
    lines = open(corpus).read().splitlines(keepends=True)
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text("".join(lines[i * 5 : i * 5 + 5]))
    spec = f"sentencepiece:{data_path}/tokenizer.model"
    prepare.prepare(f"{tmp_path}/*.jsonl", spec, f"{tmp_path}/out", validation_fraction=0.05, workers=1)
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path}/out/", "/three/", recursive=True)
    shards = [np.fromfile(p, "<u2") for p in sorted((tmp_path / "out").glob("train-*.bin"))]
    stream, border = np.concatenate(shards), len(shards[0])
    assert len(shards) == 3
    starts, count = [0, border - 5, border, len(stream) - 7], len(shards[1]) + 20
    for path in (f"{tmp_path}/out", "memory://three"):
        tokens = data.Dataset(path).train
        for start, ids in zip(starts, tokens.read_each(starts, count)):
            np.testing.assert_array_equal(ids, stream[start : start + count])
    fs.rm("/three", recursive=True)


def test_what_is_wrong_behind_a_url_is_named(in_memory, monkeypatch):
    fs = files.filesystem(in_memory)[0]
    dataset = data.Dataset(in_memory)
    monkeypatch.setattr(fs, "cat_file", lambda *a, **k: (_ for _ in ()).throw(ConnectionResetError("reset by peer")))
    with pytest.raises(UserError, match=r"^memory://data/train-00000.bin: cannot be read: reset by peer$"):
        dataset.train.read(0, 10)
    monkeypatch.undo()
    whole = fs.cat_file("/data/train-00000.bin")
    fs.pipe_file("/data/train-00000.bin", whole[:100] + b"\x01" + whole[101:])
    with pytest.raises(UserError, match=r"^memory://data/train-00000.bin: checksum differs"):
        dataset.verify()
    fs.pipe_file("/data/train-00000.bin", whole[:-2])
    with pytest.raises(UserError, match=rf"train-00000.bin: expected {len(whole)} bytes, found {len(whole) - 2}$"):
        data.Dataset(in_memory)
    with pytest.raises(UserError, match=r"^memory://none/dataset.json: expected a folder that `prepare` finished: no"):
        data.Dataset("memory://none")
    missing = ImportError("Please install gcsfs to access Google Storage")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *a, **k: (_ for _ in ()).throw(missing))
    with pytest.raises(
        UserError, match=r"^gs://b/dataset.json: Please install gcsfs .*: pip install 'memoryllm_jax\[gcs\]'$"
    ):
        data.Dataset("gs://b")


def test_urls_that_do_not_fit_are_refused(make_config, data_path, corpus):
    with pytest.raises(UserError, match=r"--workdir=s3://b/w: expected a folder on a disk or gs://BUCKET/FOLDER"):
        train.train(make_config(), "s3://b/w")
    with pytest.raises(UserError, match=r"config.data.path: embedded is prepared in the workdir, .* on a disk"):
        train.train(make_config(**{"data.path": "embedded"}), "gs://b/w")
    with pytest.raises(UserError, match=r"--output=gs://b/data: expected a folder on a disk"):
        prepare.prepare(corpus, f"sentencepiece:{data_path}/tokenizer.model", "gs://b/data")


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket of an emulator in this process."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read on import; it asks a service
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    server = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Clients keep several connections open; the emulator's store takes one request at a time.
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


def test_a_run_on_object_storage(make_config, data_path, bucket, monkeypatch):
    """Data and workdir on gs://: stopped, gone on with and so taken over, read back; nothing else there is touched."""
    fs, workdir, devices = files.filesystem(bucket)[0], f"{bucket}/run", jax.devices()[:1]
    fs.put(f"{data_path}/", f"{bucket}/data/", recursive=True)
    fs.pipe_file(f"{workdir}/own/notes", b"ours")
    fs.pipe_file(f"{workdir}/9/state", b"of a save that was cut off")
    small = {"data.path": f"{bucket}/data", "checkpoint.every": 2, "checkpoint.keep": 2, "log.tensorboard": True}
    config = make_config("memory", steps=5, **small, **{"model.layers": 1, "model.dim": 8, "model.heads": 2})
    with monkeypatch.context() as patch:
        patch.setattr(train.StopSignal, "requested", lambda self, done: done == 3)
        assert train.train(config, workdir, devices) == train.STOPPED
    claim = files.Claim(workdir)
    assert train.train(config, workdir, devices) == 0
    with pytest.raises(UserError, match=rf"another run has taken over \(process {os.getpid()} on .* so this one ends"):
        claim.check()
    records = [json.loads(line) for line in fs.cat_file(f"{workdir}/metrics.jsonl").splitlines()]
    assert [(r["step"], r["kind"]) for r in records] == [(i, "train") for i in range(1, 6)] + [(5, "validation")]
    result = files.read_json(f"{workdir}/result.json", "a result")
    assert result["validation"]["loss"] == records[-1]["loss"]
    names = {os.path.basename(path) for path in fs.ls(workdir, detail=False)}
    assert names == {".lock", "4", "5", "metrics.jsonl", "own", "result.json", "tensorboard"}
    assert len(files.sizes(f"{workdir}/tensorboard")) == 2
    model = saved.SavedModel(workdir)
    assert model.step == 5 and model.load(lambda name: True)[0]["head"].shape == (512, 8)
    with pytest.raises(UserError, match=f"{workdir}: expected a checkpoint of step 3, found 4, 5"):
        saved.SavedModel(workdir, 3)
