"""Headers of safetensors files, checked before anything that they describe is allocated or read.

The format: 8 bytes with the length of the header, little-endian; the header, a JSON object that names for each tensor
its dtype, shape and place; the tensors' bytes, without gaps between them. The library safetensors reads tensors; this
reads where they lie, for files that are read by position, and for errors that name the tensor.
"""

import math
import os
from typing import Annotated, NamedTuple

import msgspec

from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.records import Count

MAX_HEADER = 100_000_000  # bytes: readers of safetensors accept no more
# Bits of an element, for each dtype of the format. F4 and the F6 take less than a byte.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
_MOST_AXES = 16


class _Entry(records.Record):
    """A tensor as the header describes it."""

    dtype: str
    shape: Annotated[list[Count], msgspec.Meta(max_length=_MOST_AXES)]
    data_offsets: tuple[Count, Count]

    def __post_init__(self):
        if self.dtype not in _BITS:
            raise ValueError(f"expected a dtype of safetensors, found {self.dtype[:20]!r}")
        start, end = self.data_offsets
        # Python's integers do not overflow, whatever the shape.
        wanted = math.prod(self.shape) * _BITS[self.dtype]
        if (end - start) * 8 != wanted:
            raise ValueError(
                f"expected data_offsets of {wanted / 8:g} bytes, as dtype and shape say, found {start} to {end}"
            )


class Tensor(NamedTuple):
    """Where a tensor lies in the file.

    Attributes:
      dtype: its name in safetensors, such as "BF16".
      shape: number of elements along each axis.
      start, end: the first byte and the one after the last, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """The header of a file.

    Attributes:
      text: the JSON as it stands in the file.
      metadata: {key: text} under `__metadata__`.
      tensors: {name: Tensor} in the order of their places.
      data_start: the first byte of the tensors' data, counted from the start of the file.
      size: bytes of the file.
    """

    text: bytes
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    data_start: int
    size: int


def read_header(fd: int, path: str, expected: str = "a safetensors file", most: int = MAX_HEADER) -> Header:
    """Reads and checks the header of an open file.

    Args:
      fd: descriptor of the file, open for reading; its position does not matter and is kept.
      path, expected: the file and what it should be, for error messages.
      most: bytes that the header may have. The objects that JSON becomes take many times its size.
    Raises: UserError if the header is damaged, or its tensors do not fill the file exactly.
    """
    try:
        size = os.fstat(fd).st_size
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if size < 8 or not 0 < length <= size - 8:
            raise UserError(f"{path}: expected {expected}, found a header of {length} bytes in a file of {size}")
        if length > most:
            raise UserError(f"{path}: expected {expected} with a header of at most {most} bytes, found {length}")
        text = os.pread(fd, length, 8)
    except OSError as error:
        raise UserError(f"{path}: expected {expected}: {error.strerror}") from error
    raw = records.parse(dict[str, msgspec.Raw], text, path, expected)
    metadata = records.parse(dict[str, str], bytes(raw.pop("__metadata__", b"{}")), f"{path}: __metadata__")
    start = 8 + length
    entries = {
        name: records.parse(_Entry, bytes(entry), f"{path}: tensor {name[:100]}", expected)
        for name, entry in raw.items()
    }
    tensors = _placed(entries, start, path)
    end = max((tensor.end for tensor in tensors.values()), default=start)
    if end != size:
        raise UserError(f"{path}: expected {end} bytes, found {size}; it is truncated or damaged")
    return Header(text, metadata, tensors, start, size)


def _placed(entries: dict[str, _Entry], data_start: int, path: str) -> dict[str, Tensor]:
    """The tensors in the order of their places. Raises: UserError for a gap or an overlap."""
    tensors: dict[str, Tensor] = {}
    at = 0
    # Empty tensors come first among those that begin at the same byte.
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        if start != at:
            raise UserError(f"{path}: tensor {name[:100]}: expected its data to begin at byte {at}, found {start}")
        tensors[name] = Tensor(entry.dtype, tuple(entry.shape), data_start + start, data_start + end)
        at = end
    return tensors
