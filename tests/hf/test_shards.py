"""safetensors files: which tensors each holds, their mode, and missing ones."""

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
    assert shards.read_headers(str(tmp_path)) == {"a": shards.Stored("model.safetensors", "float32", (2, 3))}


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    shards.write_index(str(tmp_path), {"model-00001-of-00002.safetensors": ["a"]}, 4)
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors: expected a safetensors file, found a dam"):
        shards.read_headers(str(tmp_path))
