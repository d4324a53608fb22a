"""safetensors files: which tensors each holds, their mode, and missing ones."""

import json
import os

import numpy as np
import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.hf import shards


def test_a_file_takes_tensors_until_the_next_does_not_fit():
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 20}
    assert shards.plan(sizes, 10) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c", "d"],
        "model-00003-of-00003.safetensors": ["e"],  # larger than file_bytes, and so alone
    }
    assert shards.plan(sizes, 100) == {"model.safetensors": list("abcde")}


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "other").write_text("")
    shards.write(str(tmp_path / "model.safetensors"), {"a": np.ones((2, 3), np.float32)})
    assert os.stat(tmp_path / "model.safetensors").st_mode == os.stat(tmp_path / "other").st_mode


def test_headers_say_where_a_tensor_is_and_its_type(tmp_path):
    shards.write(str(tmp_path / "model.safetensors"), {"a": np.ones((2, 3), np.float32)})
    start = os.path.getsize(tmp_path / "model.safetensors") - 24  # the tensor's bytes come last
    stored = shards.read_headers(str(tmp_path))
    assert stored == {"a": shards.Stored("model.safetensors", "float32", (2, 3), start)}
    np.testing.assert_array_equal(shards.read(str(tmp_path), stored["a"]), np.ones((2, 3), np.float32), strict=True)


def write_two_files(folder):
    """Writes "a" into both of two files, "b" into the second. Returns: the names of the files."""
    names = ["one.safetensors", "two.safetensors"]
    shards.write(f"{folder}/{names[0]}", {"a": np.zeros(2, np.float32)})
    shards.write(f"{folder}/{names[1]}", {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
    return names


def write_map(folder, weight_map):
    (folder / shards.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_says_which_of_two_files_holds_a_tensor(tmp_path):
    one, two = write_two_files(tmp_path)
    (tmp_path / "three.safetensors").write_text("not listed, so never read")
    for file, value in ((one, 0), (two, 1)):
        write_map(tmp_path, {"a": file, "b": two})
        stored = shards.read_headers(str(tmp_path))
        assert (stored["a"].file, stored["b"].file) == (file, two)
        assert shards.read(str(tmp_path), stored["a"]).tolist() == [value, value]


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path):
    write_map(tmp_path, {"a": "older.safetensors"})
    assert not shards.has_unread_index(str(tmp_path))
    shards.write(str(tmp_path / "model.safetensors"), {"a": np.ones(2, np.float32)})
    assert shards.read_headers(str(tmp_path))["a"].file == "model.safetensors"
    assert shards.has_unread_index(str(tmp_path))


@pytest.mark.parametrize(
    "weight_map, problem",
    [
        ({"a": None}, r"weight_map\[...\]: expected str, found null"),
        ([], "weight_map: expected object, found array"),
        (
            {"a": "two.safetensors"},
            "weight_map: expected the file of tensor b, which two.safetensors holds, found none",
        ),
        ({"c": "one.safetensors", "a": "one.safetensors"}, "weight_map: expected a tensor c in one.safetensors, found"),
        ({"a": "missing.safetensors"}, "missing.safetensors: expected a safetensors file, found none"),
        ({"a": "../one.safetensors"}, "weight_map: expected the name of a file in .*, found '../one.safetensors'"),
        ({"a": "/etc/passwd"}, "weight_map: expected the name of a file in .*, found '/etc/passwd'"),
        ({"a": "link"}, "weight_map: expected a file in .*, found 'link', a symbolic link to"),
    ],
)
def test_an_index_that_does_not_fit_its_folder_is_refused(tmp_path, weight_map, problem):
    (tmp_path / "model").mkdir()
    write_two_files(tmp_path)
    write_two_files(tmp_path / "model")
    (tmp_path / "model/link").symlink_to(tmp_path / "one.safetensors")
    write_map(tmp_path / "model", weight_map)
    with pytest.raises(UserError, match=problem):
        shards.read_headers(str(tmp_path / "model"))


def test_files_of_the_hugging_face_cache_are_links_to_its_blobs(tmp_path):
    """The layout of huggingface_hub: snapshots/REVISION/NAME is a link to ../../blobs/HASH."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    shards.write(str(repository / "blobs/ab12"), {"a": np.ones(2, np.float32)})
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab12")
    (tmp_path / "short").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "short"):
        assert list(shards.read_headers(str(folder))) == ["a"]
    shards.write(str(tmp_path / "elsewhere"), {"a": np.ones(2, np.float32)})
    for name, target in (("blob", "../../blobs/cd34"), ("other", "../../../elsewhere")):
        (snapshot / name).symlink_to(target)
    (repository / "blobs/cd34").symlink_to(tmp_path / "elsewhere")
    for name in ("blob", "other"):
        with pytest.raises(
            UserError, match=f"{name}: expected a file in .*, found '{name}', a symbolic link to .*elsewhere"
        ):
            shards.path_in(str(snapshot), name)
