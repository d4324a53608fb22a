"""Headers of ToL files and overlays: safetensors headers that hold a checksum of themselves (docs/tol.md)."""

import json
import re
from typing import NamedTuple

import xxhash

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.safetensors_header import Header

KEY = "header_checksum"
MOST_BYTES = 16 << 20  # a header of all that the layout may hold in practice has less than a megabyte
_DIGITS = "[0-9a-f]{16}"
_ZEROS = "0" * 16


class Place(NamedTuple):
    """A tensor of a file that is to be written.

    Attributes:
      dtype: its name in safetensors, such as "BF16".
      shape: number of elements along each axis.
      start, end: the first byte and the one after the last, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def to_bytes(metadata: dict[str, str], tensors: dict[str, Place], align: int) -> bytes:
    """The first bytes of a file: the header's length and the header, with its checksum.

    Args:
      metadata: {key: text}; a checksum in it is replaced.
      tensors: {name: Place}, without gaps between them.
      align: the data begins at a multiple of this number of bytes.
    """
    tree: dict = {"__metadata__": metadata | {KEY: _ZEROS}}
    for name, t in tensors.items():
        tree[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.end]}
    text = json.dumps(tree).encode()
    text += b" " * (-(8 + len(text)) % align)  # JSON may end in spaces
    # No value looks like this field: quotes within a text are escaped.
    sealed = text.replace(_field(_ZEROS), _field(xxhash.xxh3_64_hexdigest(text)), 1)
    return len(sealed).to_bytes(8, "little") + sealed


def _field(digits: str) -> bytes:
    return f'"{KEY}": "{digits}"'.encode()


def check(header: Header, path: str, earlier: frozenset[str]) -> None:
    """Checks a header against its checksum.

    Args:
      header: of the file.
      path: of the file, for error messages.
      earlier: the metadata keys of files of earlier versions, which have no checksum. They have no other keys, so that
        no damage to the checksum's key makes a file look like one of these.
    Raises: UserError.
    """
    found = header.metadata.get(KEY)
    if found is None:
        unknown = sorted(header.metadata.keys() - earlier)
        if unknown:
            raise UserError(f"{path}: expected metadata {KEY}, found none beside {unknown[0][:100]!r}")
        return
    if not re.fullmatch(_DIGITS, found):
        raise UserError(f"{path}: {KEY}: expected 16 hexadecimal digits, found {found[:100]!r}")
    expected = xxhash.xxh3_64_hexdigest(header.text.replace(found.encode(), _ZEROS.encode()))
    if found != expected:
        raise UserError(f"{path}: {KEY}: expected {expected}, found {found}; the header is damaged")
