"""Headers of safetensors files, against the library safetensors."""

import json
import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.safetensors_header import read_header


def header_of(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, "file")
    finally:
        os.close(fd)


def write(path, header, data=b"\0" * 24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_tensors_lie_where_the_library_finds_them(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.uint8),
        "empty": np.zeros((0, 4), np.int64),
        "scalar": np.float16(2),
    }
    path = tmp_path / "file"
    path.write_bytes(safetensors.numpy.save({k: np.asarray(v) for k, v in arrays.items()}, {"step": "7"}))
    header = header_of(path)
    assert header.metadata == {"step": "7"}
    data = path.read_bytes()
    for name, array in arrays.items():
        tensor = header.tensors[name]
        found = np.frombuffer(data[tensor.start : tensor.end], np.asarray(array).dtype).reshape(tensor.shape)
        np.testing.assert_array_equal(found, array)


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}


@pytest.mark.parametrize(
    "header, problem",
    [
        (b"[" * 50_000 + b"]" * 50_000, "nested too deeply|found array"),
        ([], "expected object, found array"),
        (entry() | {"__metadata__": {"a": 1}}, "__metadata__: .*expected str, found int"),
        (entry(dtype="F31"), "tensor a: expected a dtype of safetensors, found 'F31'"),
        (entry(shape=[-2, -3]), r"tensor a: shape\[0\]: expected int >= 0, found -2"),
        (entry(shape=[2**40, 2**40]), "tensor a: expected data_offsets of"),
        (entry(shape=None), "tensor a: shape: expected array, found null"),
        (entry(data_offsets=[0, 24.0]), r"tensor a: data_offsets\[1\]: expected int, found float"),
        (entry(data_offsets=[0, 28]), "tensor a: expected data_offsets of 24 bytes"),
        (entry(data_offsets=[4, 28]), "tensor a: expected its data to begin at byte 0, found 4"),
        (entry() | {"b": entry()["a"]}, "tensor b: expected its data to begin at byte 24, found 0"),
        ({}, "expected 10 bytes, found 34; it is truncated or damaged"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, header, problem):
    path = tmp_path / "file"
    write(path, header)
    with pytest.raises(UserError, match=problem):
        header_of(path)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "numpy"):
        pass
