"""The safetensors files of a model (file shards): which tensors each holds, and how they are read and written."""

import math
import os
import typing

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from memoryllm_jax.common import records, safetensors_header, storage
from memoryllm_jax.common.errors import ArgumentError, UserError

SINGLE = "model.safetensors"  # the name of the only file of a model
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
    start: int  # its first byte in the file


class _Index(records.Record):
    """An index of safetensors files."""

    weight_map: dict[str, str]  # {tensor name: name of its file}


def path_in(folder: str, name: str, what: str = "") -> str:
    """The path of a file in a model's folder, for reading.

    The folder may be a snapshot in Hugging Face's cache, models--OWNER--NAME/snapshots/REVISION, whose files are
    symbolic links into models--OWNER--NAME/blobs. Other links that leave the folder are refused.

    Args:
      folder: the model's folder.
      name: the file's name.
      what: the file, and the place in it, that holds the name, for error messages; "": import knows the name itself.
    Raises: UserError if the path leaves the folder, or something else than a file is there.
    """
    real = os.path.realpath(folder)
    repository = os.path.dirname(os.path.dirname(real))
    is_snapshot = os.path.basename(os.path.dirname(real)) == "snapshots"
    is_cached = is_snapshot and os.path.basename(repository).startswith("models--")
    blobs = (os.path.join(repository, "blobs"),) if is_cached else ()
    path = storage.inside(folder, name, what or os.path.join(folder, name), blobs)
    # Reading a pipe would wait for ever. A link to nothing must not look like a file that the model lacks.
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: expected a file, found a folder, pipe, device or broken link")
    return path


def read_headers(folder: str) -> dict[str, Stored]:
    """{name: Stored} of all tensors in a model's folder, read from the files' headers alone.

    As in transformers, model.safetensors comes before an index. An index says which file holds each tensor; files that
    it does not name are not read.

    Raises: UserError for a missing or damaged file, an index that does not fit its files, or a tensor of another dtype
      than DTYPES.
    """
    if os.path.exists(os.path.join(folder, SINGLE)):
        return _headers_of(folder, SINGLE, path_in(folder, SINGLE))
    index = path_in(folder, INDEX)
    if not os.path.exists(index):
        raise UserError(f"{folder}: expected {SINGLE} or {INDEX}, found neither")
    weight_map = records.read(_Index, index, "an index of safetensors files").weight_map
    where = f"{index}: weight_map"
    out = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in _headers_of(folder, file, path_in(folder, file, where)).items():
            # A tensor may stand in several files, so that the index has to say which one counts.
            if name not in weight_map:
                raise UserError(f"{where}: expected the file of tensor {name[:100]}, which {file} holds, found none")
            if weight_map[name] == file:
                out[name] = tensor
    for name, file in weight_map.items():
        if name not in out:
            raise UserError(f"{where}: expected a tensor {name[:100]} in {file}, found none there")
    return out


def has_unread_index(folder: str) -> bool:
    """Whether a folder has an index that does not count, as model.safetensors stands beside it."""
    return all(os.path.exists(os.path.join(folder, name)) for name in (SINGLE, INDEX))


def _headers_of(folder, file, path):
    """{name: Stored} of one file. Raises: UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: expected a safetensors file, found none")
    with storage.user_errors(path, "a safetensors file"), open(path, "rb") as opened:
        header = safetensors_header.read_header(opened.fileno(), path)
    out = {}
    for name, tensor in header.tensors.items():
        if tensor.dtype not in _DTYPE_OF_CODE:
            expected = ", ".join(_DTYPE_OF_CODE)
            raise UserError(f"{path}: tensor {name[:100]}: expected a dtype among {expected}, found {tensor.dtype}")
        out[name] = Stored(file, _DTYPE_OF_CODE[tensor.dtype], tensor.shape, tensor.start)
    return out


def read(folder: str, stored: Stored) -> np.ndarray:
    """The values of one tensor in its stored dtype. Raises: UserError."""
    path = os.path.join(folder, stored.file)
    dtype = DTYPES[stored.dtype]
    length = math.prod(stored.shape) * dtype.itemsize
    with storage.user_errors(path, "a safetensors file"):
        data = np.fromfile(path, np.uint8, length, offset=stored.start)
    if len(data) != length:
        raise UserError(f"{path}: expected {length} bytes from byte {stored.start}, found {len(data)}")
    return data.view(dtype).reshape(stored.shape)


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
        return {SINGLE: groups[0]}
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
