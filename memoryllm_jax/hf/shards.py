"""The safetensors files of a model (file shards): which tensors each holds, and how they are read and written."""

import os
import typing

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_DTYPE_OF_CODE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # codes in the files' headers


class Stored(typing.NamedTuple):
    """A tensor in the safetensors files of a folder."""

    file: str  # name in the folder
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]


def read_headers(folder: str) -> dict[str, Stored]:
    """{name: Stored} of all tensors in a model's folder, read from the files' headers alone.

    Raises: UserError for a missing or damaged file, or a tensor of another dtype than DTYPES.
    """
    out = {}
    for file in _files(folder):
        path = os.path.join(folder, file)
        try:
            with safetensors.safe_open(path, framework="flax") as opened:
                for name in opened.keys():  # noqa: SIM118, as it is no dict
                    # A slice, because it knows dtype and shape without reading the values.
                    header = opened.get_slice(name)
                    code = header.get_dtype()
                    if code not in _DTYPE_OF_CODE:
                        expected = ", ".join(_DTYPE_OF_CODE)
                        raise UserError(f"{path}: tensor {name}: expected a dtype among {expected}, found {code}")
                    out[name] = Stored(file, _DTYPE_OF_CODE[code], tuple(header.get_shape()))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: expected a safetensors file, found a damaged one or none: {error}") from error
    return out


def _files(folder):
    """Names of a model's safetensors files: those in the index, else the single file. Raises: UserError."""
    index = os.path.join(folder, INDEX)
    if os.path.exists(index):
        weight_map = storage.read_json(index, "an index of safetensors files").get("weight_map", {})
        return sorted(set(weight_map.values()))
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return ["model.safetensors"]
    raise UserError(f"{folder}: expected model.safetensors or {INDEX}, found neither")


def plan(sizes: dict[str, int], file_bytes: int) -> dict[str, list[str]]:
    """Assigns tensors to files. As in transformers, a file takes tensors in order until the next one does not fit.

    Args:
      sizes: bytes of each tensor, by name.
      file_bytes: largest sum of the sizes in a file; a tensor that is larger has a file of its own.
    Returns: {file name: names of its tensors}.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    # A single file has neither number nor index: transformers looks for it under this name first.
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": group for i, group in enumerate(groups, 1)}


def convert(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """A contiguous copy of a tensor in another dtype.

    Args:
      name: the tensor's name, for the error message.
      tensor: its values.
      dtype: a key of DTYPES.
    Raises: ArgumentError if float16 cannot hold a value.
    """
    with np.errstate(over="ignore"):  # no warning: an overflow is an error below
        out = np.array(tensor, DTYPES[dtype], order="C")
    # bfloat16 has the exponents of float32, so that only float16 is too narrow for ordinary weights.
    if dtype == "float16" and not np.isfinite(out).all():
        raise ArgumentError(
            "dtype", f"expected bfloat16 or float32, as values of tensor {name} exceed 65504, found float16"
        )
    return out


def write(path: str, tensors: dict[str, np.ndarray]) -> None:
    """Writes contiguous tensors into one file. Raises: UserError."""
    # "x": a file that is already there is an error, and never overwritten.
    with open(path, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode  # the mode that the umask gives a new file
    try:
        # transformers refuses a file whose metadata names no format, and reads "pt" whatever wrote it.
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    os.chmod(path, mode)  # safetensors replaces the file with one that only its owner can read


def write_index(folder: str, files: dict[str, list[str]], total_bytes: int) -> None:
    """Writes the index in which a reader of several files looks up the file of each tensor.

    Args:
      folder: the files' folder.
      files: {file name: names of its tensors}, as `plan` returns it.
      total_bytes: size of all tensors together.
    Raises: UserError.
    """
    weight_map = {name: file for file, names in files.items() for name in names}
    tree = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    storage.write_json(os.path.join(folder, INDEX), tree)
