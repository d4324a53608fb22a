"""Building files: the same bytes on any number of devices, and after a kill."""

import contextlib
import json
import os

import jax
import numpy as np
import pytest
import xxhash
from lab import opened
from tol_files import (
    CHUNK,
    VOCAB,
    Reader,
    Source,
    content,
    file_rows,
    more,
    relative,
    rows_of,
    small,
    uniform,
)

from memoryllm_jax import config
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model import sharding
from memoryllm_jax.tol import build, compress, verify
from memoryllm_jax.tol.sources import LiveSource
from memoryllm_jax.tol.writer import TolWriter


@pytest.mark.parametrize("name", ["memory", "flex-3", "tied"])
def test_rows_are_the_live_memory_of_every_token(lab, name):
    expected, (params, m) = lab.memory(name), lab.params(name)
    with opened(lab.tol(name)) as tol:
        rows = file_rows(tol)
        assert tol.layout.codec() == "float32" and tol.layout.has_x0 == (name != "tied")
        assert set(rows) == {f"ffn.{layer}" for layer in range(m.layers)} | ({"x0"} if name != "tied" else set())
        for layer, y in enumerate(expected):
            assert relative(rows[f"ffn.{layer}"], y, axis=1).max() < 1e-6
    if name != "tied":
        np.testing.assert_array_equal(rows["x0"], params["embedding"])


def test_rows_of_16_bits_are_the_nearest(lab):
    with opened(lab.tol("flex-3")) as tol, opened(lab.tol("flex-3", bits="16")) as half:
        exact, rounded = file_rows(tol), file_rows(half)
    for part, rows in rounded.items():
        # Half a unit in the last place of bfloat16, and what the order of float32 sums may add.
        bound = 2.0**-8 * np.abs(exact[part]) + 1e-6 * np.abs(exact[part]).max()
        error = np.abs(rows.astype(np.float32) - exact[part])
        assert (error <= bound).all()
        assert (error > 2.0**-10 * np.abs(exact[part])).any()


@pytest.mark.parametrize("layout", [uniform(32), small()])
def test_eight_devices_write_the_same_file(tokenizer, tmp_path, layout):
    extra = more() if layout.rotated else {"order": np.arange(VOCAB), "chunk_rows": CHUNK}
    for devices in (1, 8):
        source = Source(tokenizer, devices)
        for name in layout.rotated:  # sums of integers are exact, in whatever order a device adds them
            source.table[name] = np.round(source.table[name])
            extra["bases"][name] = np.sign(extra["bases"][name])
        build.build(source, layout, str(tmp_path / f"{devices}"), **extra)
    assert content(tmp_path / "1") == content(tmp_path / "8")
    assert xxhash.xxh3_64_intdigest(Reader(tmp_path / "8").raw(0)[-1]) in Reader(tmp_path / "8").tensor("checksums")


def test_killed_build_goes_on(tokenizer, tmp_path):
    path, source = str(tmp_path / "whole.safetensors"), Source(tokenizer)
    build.build(source, small(), path, **more())
    whole, work = content(path), source.calls
    assert work == 5  # 110 and 190 rows in chunks of 64
    os.remove(path)
    path = str(tmp_path / "killed.safetensors")
    with pytest.raises(KeyboardInterrupt):
        build.build(Source(tokenizer, stop=3), small(), path, **more())
    assert sorted(os.listdir(tmp_path)) == ["killed.safetensors.part", "killed.safetensors.part.progress"]
    assert os.path.getsize(f"{path}.part") == len(whole)
    note = content(f"{path}.part.progress")
    done = json.loads(note)["chunks"]
    assert done == 2  # the third was computed, and not yet written
    source = Source(tokenizer)
    build.build(source, small(), path, **more())
    assert source.calls == work - done
    # A kill may also come between the last two steps: the file has its name, and the note of progress is there.
    (tmp_path / "killed.safetensors.part.progress").write_bytes(note)
    assert "is there already" in build.build(source, small(), path, **more())
    assert os.listdir(tmp_path) == ["killed.safetensors"] and content(path) == whole


def test_killed_build_of_another_layout_is_no_start(tokenizer, tmp_path):
    path, order = str(tmp_path / "other.safetensors"), np.arange(VOCAB)
    with pytest.raises(KeyboardInterrupt):
        build.build(Source(tokenizer, stop=3), uniform(16), path, order, chunk_rows=CHUNK)
    source = Source(tokenizer)
    build.build(source, uniform(32), path, order, chunk_rows=CHUNK)
    assert source.calls == -(-VOCAB // CHUNK) and os.listdir(tmp_path) == ["other.safetensors"]
    for name, rows in Reader(path).vectors().items():
        np.testing.assert_array_equal(rows, source.table[name])


@pytest.mark.parametrize(
    "name, there, found",
    [
        ("part", b"a download", "part: expected an unfinished ToL file, which is overwritten; found another file"),
        ("part.progress", b"[1]", "progress: expected object, found array"),
        ("part.progress", b'{"plan": "", "chunks": -1}', "progress: chunks: expected int >= 0, found -1"),
    ],
)
def test_files_of_other_kinds_under_the_partial_names_stay(tokenizer, tmp_path, name, there, found):
    path = tmp_path / f"t.{name}"
    path.write_bytes(there)
    with pytest.raises(UserError, match=found):
        build.build(Source(tokenizer), uniform(16), str(tmp_path / "t"), np.arange(VOCAB))
    assert path.read_bytes() == there


def test_progress_past_the_end_finishes_nothing(tokenizer, tmp_path):
    path = str(tmp_path / "t")
    with pytest.raises(KeyboardInterrupt):
        build.build(Source(tokenizer, stop=1), uniform(16), path, np.arange(VOCAB), chunk_rows=CHUNK)
    progress = json.loads(content(f"{path}.part.progress"))
    with open(f"{path}.part.progress", "w") as file:
        json.dump(progress | {"chunks": 6}, file)
    with pytest.raises(UserError, match="progress: chunks: expected at most 5, found 6"):
        build.build(Source(tokenizer), uniform(16), path, np.arange(VOCAB), chunk_rows=CHUNK)
    assert not os.path.exists(path)


@contextlib.contextmanager
def killed_after(monkeypatch, chunks):
    record = TolWriter.record

    def recorded(self, count):
        record(self, count)
        if count == chunks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TolWriter, "record", recorded)
        yield


def test_killed_precompute_goes_on(lab, tmp_path, monkeypatch, capfd):
    choices = compress.Options(bits="8", rank="0.5", data=lab.data_path)

    def precompute(name):
        compress.precompute(lab.workdir("flex-3"), str(tmp_path / name), choices, chunk_rows=16)

    precompute("whole")
    with killed_after(monkeypatch, 2):
        precompute("killed")
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.part").exists()
    capfd.readouterr()
    precompute("killed")
    assert "going on from chunk 2 of 4" in capfd.readouterr().out
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["killed", "whole"]


def source_on(lab, devices):
    mesh = sharding.make_mesh(config.MeshConfig(1, -1, 1), jax.devices()[:devices])
    return LiveSource(TrainedModel(lab.workdir("flex-3"), mesh=mesh))


def check_rows(lab, path):
    with opened(path) as tol:
        assert verify.damaged_tokens(tol) == []
        assert relative(rows_of(tol), lab.memory("flex-3").swapaxes(0, 1)) < 1e-6


def test_killed_on_two_devices_is_finished_by_eight(lab, tmp_path, monkeypatch):
    out = str(tmp_path / "t.safetensors")
    with killed_after(monkeypatch, 2):
        compress.write(source_on(lab, 2), compress.Options(), out, chunk_rows=16)
    compress.write(source_on(lab, 8), compress.Options(), out, chunk_rows=16)
    check_rows(lab, out)


def test_killed_with_other_counts_gives_each_token_its_row(lab, tmp_path, monkeypatch):
    source, out, counts = source_on(lab, 1), str(tmp_path / "t.safetensors"), np.arange(512)
    layout = compress.uniform(source, compress.Options())
    with killed_after(monkeypatch, 2):
        build.build(source, layout, out, np.arange(512)[::-1], counts, chunk_rows=16)
    build.build(source, layout, out, np.arange(512), 511 - counts, chunk_rows=16)
    check_rows(lab, out)


def test_several_processes_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="expected one process, which uses all of its devices, found 2"):
        build.build(Source(tokenizer), uniform(16), str(tmp_path / "t"), np.arange(VOCAB))
    assert os.listdir(tmp_path) == []


def test_run_that_lost_the_race_to_another_says_so(tokenizer, tmp_path, monkeypatch):
    """The other run has finished the file, and renamed it, after this one opened it under its partial name."""
    out, lock = str(tmp_path / "t.safetensors"), storage.lock_byte

    def lock_when_finished(fd, path, number):
        os.replace(path, out)
        lock(fd, path, number)

    monkeypatch.setattr(storage, "lock_byte", lock_when_finished)
    with pytest.raises(UserError, match="another run has just finished it; run the same line again"):
        build.build(Source(tokenizer), uniform(16), out, np.arange(VOCAB))
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_disk_without_room_is_refused(tokenizer, tmp_path, monkeypatch):
    out, real = str(tmp_path / "t.safetensors"), os.statvfs

    class Full:
        f_bavail, f_frsize = 40, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full if str(path).startswith(out) else real(path))
    with pytest.raises(UserError, match=r"needs 4\d\d,\d\d\d bytes, found room for 163,840 on its disk"):
        build.build(Source(tokenizer), uniform(16), out, np.arange(VOCAB))
    assert os.listdir(tmp_path) == []
