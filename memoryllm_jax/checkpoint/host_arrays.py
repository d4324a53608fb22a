"""Reads arrays of a checkpoint into host memory, each straight to the place where it stays.

Orbax stores each array in chunks, in the format zarr 2 inside an OCDBT database. TensorStore, which Orbax uses too,
decodes the chunks in parallel and writes them into memory that is given to it. Orbax's own restore returns new memory,
from which the layers would have to be copied.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorstore

from memoryllm_jax.common import storage

# JAX on a CPU uses memory that begins at a multiple of this as it is; other memory it copies.
_ALIGNMENT = 64
_INDEX_BYTES = 100 << 20  # most bytes of databases' indices that stay in memory


class Read(NamedTuple):
    """An array that is being read: the memory, which is complete once `done.result()` has returned."""

    array: np.ndarray
    done: tensorstore.WriteFutures


def start(
    context: tensorstore.Context, folder: str, name: str, shape: tuple[int, ...] | None = None, layers: bool = False
) -> Read:
    """Starts to read an array in the background.

    Args:
      context: of `new_context`; none of the folders that it was used for may have changed since.
      folder: absolute path or URL of the checkpoint's arrays.
      name: the array's name in the database, such as params.layers.ffn.gate.
      shape: shape of the result; the stored array is cut or filled with zeros to it. None: the stored shape.
      layers: whether the first axis is that of layers, which will be used one by one.
    Raises: ValueError for an array that is missing or damaged; so does `done.result()`.
    """
    base = f"{folder}/" if storage.is_url(folder) else {"driver": "file", "path": f"{folder}/"}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#index"},
        # A complete checkpoint never changes, so what was read of it needs no second look.
        "recheck_cached_metadata": False,
        "recheck_cached_data": False,
    }
    stored = tensorstore.open(spec, open=True, read=True, context=context).result()
    shape = stored.shape if shape is None else shape
    array = aligned(shape, stored.dtype.numpy_dtype, layers)
    common = tuple(slice(min(sizes)) for sizes in zip(shape, stored.shape, strict=True))
    target = array[(*common, ...)]  # with `...` a view of an array without axes too, not a copy
    if target.shape != array.shape:
        array[...] = 0
    return Read(array, tensorstore.array(target).write(stored[common]))


def new_context() -> tensorstore.Context:
    """A context that keeps the indices of databases, which all arrays of a checkpoint share."""
    return tensorstore.Context({"cache_pool#index": {"total_bytes_limit": _INDEX_BYTES}})


def aligned(shape: tuple[int, ...], dtype, layers: bool = False) -> np.ndarray:
    """An uninitialised array in memory that JAX on a CPU uses without a copy.

    Args:
      layers: whether each array[i] is to be used so, instead of the array as a whole.
    """
    first, rest = (shape[0], shape[1:]) if layers else (1, shape)
    used = math.prod(rest) * np.dtype(dtype).itemsize
    stride = -(-used // _ALIGNMENT) * _ALIGNMENT
    memory = np.empty(first * stride + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    rows = memory[begin : begin + first * stride].reshape(first, stride)[:, :used]
    return rows.view(dtype).reshape(shape)
