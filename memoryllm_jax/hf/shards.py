"""safetensors files of a model: which tensors each holds, their headers, and tensors written one at a time."""

import dataclasses
import json
import math
import os
import struct

import ml_dtypes
import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ALIGN = 8


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file. tensors: (name, dtype as safetensors names it) in the order of their bytes."""

    file: str
    tensors: tuple[tuple[str, str], ...]
    metadata: dict[str, str] | None


def plan(sizes: dict[str, int], dtype: str, shard_bytes: int) -> tuple[Shard, ...]:
    """Files of at most `shard_bytes`, or of one larger tensor. sizes: elements by tensor name, in the order to keep.

    As in transformers, a file takes tensors until the next one does not fit; within it they are sorted by name.
    """
    width = DTYPES[dtype].itemsize
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size * width > shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size * width
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    return tuple(
        Shard(file, tuple((name, dtype) for name in sorted(group)), {"format": "pt"})
        for file, group in zip(names, groups)
    )


def read(folder: str) -> tuple[Shard, ...]:
    """The files of a model that somebody wrote. Raises: UserError."""
    index = os.path.join(folder, INDEX)
    if os.path.exists(index):
        weight_map = storage.read_json(index, "an index of safetensors files").get("weight_map", {})
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"] if os.path.exists(os.path.join(folder, "model.safetensors")) else []
    if not names:
        raise UserError(f"{folder}: expected model.safetensors or {INDEX}, found neither")
    return tuple(Shard(name, *_header(os.path.join(folder, name))) for name in names)


def _header(path):
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        end = max((entry["data_offsets"][1] for _, entry in entries), default=0)
        if 8 + length + end != size:
            raise ValueError(f"expected {8 + length + end} bytes, found {size}")
        tensors = tuple((name, entry["dtype"]) for name, entry in entries)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path}: cannot be read as a safetensors file: {error}") from error
    for name, dtype in tensors:
        if dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name}: expected a dtype among {', '.join(DTYPES)}, found {dtype}")
    return tensors, metadata


class Writer:
    """Files of their whole size from the start, into which tensors are written in any order.

    Args:
      shapes: of every tensor.
    """

    def __init__(self, folder: str, shards: tuple[Shard, ...], shapes: dict[str, tuple[int, ...]]):
        self._folder, self._shards = folder, shards
        self._places: dict[str, tuple[int, int, str]] = {}
        self._fds = []
        self.total_bytes = 0
        for shard in shards:
            header: dict = {} if shard.metadata is None else {"__metadata__": shard.metadata}
            offset = 0
            for name, dtype in shard.tensors:
                end = offset + math.prod(shapes[name]) * DTYPES[dtype].itemsize
                header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [offset, end]}
                offset = end
            raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            raw += b" " * (-len(raw) % _ALIGN)
            fd = os.open(os.path.join(folder, shard.file), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._fds.append(fd)
            os.posix_fallocate(fd, 0, 8 + len(raw) + offset)
            os.pwrite(fd, struct.pack("<Q", len(raw)) + raw, 0)
            for name, dtype in shard.tensors:
                self._places[name] = fd, 8 + len(raw) + header[name]["data_offsets"][0], dtype
            self.total_bytes += offset

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Rows from number `start` on, in the dtype of the layout. Raises: UserError if a value has no place in it."""
        fd, offset, dtype = self._places[name]
        with np.errstate(over="ignore"):  # told of below
            values = rows.astype(DTYPES[dtype], order="C", copy=False)
        offset += start * values.nbytes // max(len(values), 1)
        if dtype == "F16" and not np.isfinite(values).all():
            raise UserError(f"--dtype=float16: tensor {name}: has values beyond 65504; use bfloat16 or float32")
        view = memoryview(values.reshape(-1).view(np.uint8))
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)

    def finish(self) -> None:
        """Writes the index where there are several files."""
        self.close()
        if len(self._shards) > 1:
            weight_map = {name: shard.file for shard in self._shards for name, _ in shard.tensors}
            tree = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            storage.write_json(os.path.join(self._folder, INDEX), tree)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
