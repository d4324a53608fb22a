"""The safetensors files of a model (file shards): which tensors each holds, reading and writing."""

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
_DTYPE_OF_CODE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # codes of safetensors


class Stored(typing.NamedTuple):
    """Where a tensor lies in a model's folder, and its type there."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: str) -> dict[str, Stored]:
    """The tensors of a model's folder by name. Raises: UserError."""
    out = {}
    for file in _files(folder):
        path = os.path.join(folder, file)
        try:
            with safetensors.safe_open(path, framework="flax") as opened:
                for name in opened.keys():  # noqa: SIM118, as it is no dict
                    header = opened.get_slice(name)
                    out[name] = Stored(file, header.get_dtype(), tuple(header.get_shape()))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: expected a safetensors file, found a damaged one or none: {error}") from error
    for name, (file, code, shape) in out.items():
        if code not in _DTYPE_OF_CODE:
            expected = ", ".join(_DTYPE_OF_CODE)
            raise UserError(f"{folder}/{file}: tensor {name}: expected a dtype among {expected}, found {code}")
        out[name] = Stored(file, _DTYPE_OF_CODE[code], shape)
    return out


def _files(folder):
    index = os.path.join(folder, INDEX)
    if os.path.exists(index):
        weight_map = storage.read_json(index, "an index of safetensors files").get("weight_map", {})
        return sorted(set(weight_map.values()))
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return ["model.safetensors"]
    raise UserError(f"{folder}: expected model.safetensors or {INDEX}, found neither")


def plan(sizes: dict[str, int], file_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors in each file, by the file's name.

    As in transformers, a file takes tensors in their order until the next one does not fit.

    Args:
      sizes: bytes of each tensor, by name.
      file_bytes: largest size of a file's tensors; a single tensor may be larger.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": group for i, group in enumerate(groups, 1)}


def convert(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """A contiguous copy of a tensor in one of DTYPES. Raises: ArgumentError if float16 cannot hold a value."""
    with np.errstate(over="ignore"):  # reported below
        out = np.array(tensor, DTYPES[dtype], order="C")
    if dtype == "float16" and not np.isfinite(out).all():
        raise ArgumentError(
            "dtype", f"expected bfloat16 or float32, as values of tensor {name} exceed 65504, found float16"
        )
    return out


def write(path: str, tensors: dict[str, np.ndarray]) -> None:
    """Writes contiguous tensors into one file. Raises: UserError."""
    with open(path, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode  # read and write for those whom the umask lets
    try:
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    os.chmod(path, mode)  # safetensors replaces the file by one that only its owner can read


def write_index(folder: str, files: dict[str, list[str]], total_bytes: int) -> None:
    """Writes the index of several files, by which a reader finds a tensor's file. Raises: UserError."""
    weight_map = {name: file for file, names in files.items() for name in names}
    tree = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    storage.write_json(os.path.join(folder, INDEX), tree)
