"""File shards are compared with their checksums once, for as long as they do not change."""

import json
import os

import pytest

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import verification
from memoryllm_jax.data.dataset import Dataset


@pytest.fixture
def read(monkeypatch):
    """The names of the files whose checksums have been computed; `clear` it between two steps."""
    names = []
    plain = storage.sha256

    def watched(path, *step):
        names.append(os.path.basename(path))
        return plain(path, *step)

    monkeypatch.setattr(storage, "sha256", watched)
    return names


def flip(path, keep_time=False):
    """Changes a byte of a file, and with `keep_time` nothing that a listing shows."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_time else 1)))


def test_what_is_verified_is_remembered_until_a_file_changes(copied, tmp_path, read):
    workdir = tmp_path / "w"
    workdir.mkdir()
    both = ["train-00000.bin", "validation-00000.bin"]
    for part in (0, 1):  # two hosts, of which one remembers
        dataset = Dataset(str(copied), str(workdir))
        dataset.verify(part, 2)
    assert sorted(read) == both and os.listdir(workdir) == []
    dataset.remember_verified()
    assert os.listdir(workdir) == [verification.FILE]
    read.clear()
    Dataset(str(copied), str(workdir)).verify()
    assert read == []
    other = verification.Verification(str(tmp_path / "other"))
    other.remember_from([str(workdir), str(tmp_path / "none")])
    assert (tmp_path / "other" / verification.FILE).read_text() == (workdir / verification.FILE).read_text()
    flip(copied / both[0], keep_time=True)
    Dataset(str(copied), str(workdir)).verify()  # which only reading the file could find
    flip(copied / both[0])
    Dataset(str(copied), str(workdir)).verify()
    assert read == both[:1]  # flipped twice, it is whole again
    flip(copied / both[0])
    with pytest.raises(UserError, match=r"train-00000.bin: checksum differs: expected \w{12}..., found \w{12}...$"):
        Dataset(str(copied), str(workdir)).verify()


def test_verification_that_is_stopped_is_made_again(copied, tmp_path, read):
    dataset = Dataset(str(copied), str(tmp_path))
    assert not dataset.verify(stopped=lambda: True)
    read.clear()
    assert dataset.verify() and len(read) == 2


def test_only_the_file_shards_of_the_ranges_are_verified(copied, tmp_path, read):
    flip(copied / "train-00000.bin")
    dataset = Dataset(str(copied), str(tmp_path))
    for _ in range(2):
        dataset.validation.verify([0, 9], 5)
    assert read == ["validation-00000.bin"]
    read.clear()
    Dataset(str(copied), str(tmp_path)).validation.verify([0], 1)
    assert read == []
    with pytest.raises(UserError, match=r"train-00000.bin: checksum differs"):
        dataset.train.verify([0], 1)


def test_other_data_at_the_same_place_is_verified(copied, tmp_path, read):
    """Prepared again, a file shard may have the size and the time that are remembered, but another checksum."""
    Dataset(str(copied), str(tmp_path)).validation.verify([0], 1)
    flip(copied / "validation-00000.bin", keep_time=True)
    tree = json.loads((copied / "dataset.json").read_text())
    tree["splits"]["validation"]["shards"][0]["sha256"] = storage.sha256(str(copied / "validation-00000.bin"))
    (copied / "dataset.json").write_text(json.dumps(tree))
    read.clear()
    Dataset(str(copied), str(tmp_path)).validation.verify([0], 1)
    assert read == ["validation-00000.bin"]


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "files": {"a": 1}}', '{"format": 2, "files": {}}'])
def test_a_damaged_memory_is_as_good_as_none(copied, tmp_path, read, capsys, content):
    (tmp_path / verification.FILE).write_text(content)
    for _ in range(2):
        Dataset(str(copied), str(tmp_path)).validation.verify([0], 1)
    assert read == ["validation-00000.bin"]
    assert f"{tmp_path}/{verification.FILE}: " in capsys.readouterr().out


def test_a_workdir_that_cannot_be_written_to_is_no_error(copied, tmp_path, read, capsys):
    """As root may write anywhere, the workdir is a file here."""
    (tmp_path / "w").touch()
    for _ in range(2):
        Dataset(str(copied), str(tmp_path / "w")).validation.verify([0], 1)
    assert len(read) == 2
    assert "cannot be written: Not a directory; the data will be verified again next time" in capsys.readouterr().out


def test_behind_a_url_a_version_is_remembered_only_if_the_storage_names_one():
    assert storage._version({"size": 5, "etag": "abc"}) == "5 abc"
    assert storage._version({"size": 5, "ETag": '"d"'}) == '5 "d"'
    assert storage._version({"size": 5}) == ""
