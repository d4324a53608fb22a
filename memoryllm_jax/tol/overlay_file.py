"""The file of an overlay: a list of edits and their arrays, as docs/tol.md specifies it."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.records import Count, Record
from memoryllm_jax.common.safetensors_header import Header, read_header
from memoryllm_jax.tol import header
from memoryllm_jax.tol.format import open_regular, text_checksum
from memoryllm_jax.tol.header import Place
from memoryllm_jax.tol.memory import Memory

_EXPECTED = "an overlay that `tol edit` wrote"
_METADATA = frozenset(("format", "rows_digest", "edits"))  # what overlays of earlier versions have
_ALIGN = 8  # bytes: safetensors aligns data to the largest element
_DTYPES = {"I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
_ARRAYS = {"ids": "I32", "rows": "F32", "coefficients": "F32", "value": "F32"}  # fields of Edit that are tensors


@dataclasses.dataclass(frozen=True)
class Edit:
    """One entry of an overlay: new rows of tokens in some layers, or one suppressed key of one layer.

    Attributes:
      text: the edit in words. It determines the edit: the digest of an edited ToL file is made of the texts.
      ids: int32 [n], tokens that get new rows; None for a suppressed key, as are the next three.
      rows: float32 [n, k, D], their new rows in the k layers.
      mix: for each id, (token id, weight) pairs: what its new row holds of these tokens' rows from before the edit. A
        row may hold something else too, which belongs to no key: a learned row is that of its own token, with weight
        1, and a change.
      layers: the k layers of `rows`, rising; None for all.
      layer: of a suppressed key; None where tokens get new rows, as are the next two.
      coefficients: float32 [V], the key's coefficient for every token.
      value: float32 [D], the key's value.
    """

    text: str
    ids: np.ndarray | None = None
    rows: np.ndarray | None = None
    mix: list | None = None
    layers: tuple[int, ...] | None = None
    layer: int | None = None
    coefficients: np.ndarray | None = None
    value: np.ndarray | None = None

    @property
    def gives_rows(self) -> bool:
        """Whether this edit gives tokens new rows; if not, it suppresses a key."""
        return self.ids is not None

    def rows_of(self, layer: int) -> np.ndarray | None:
        """The new rows of a layer, float32 [n, D]; None if the edit gives none in this layer."""
        if not self.gives_rows:
            return None
        if self.layers is None:
            return self.rows[:, layer]
        return self.rows[:, self.layers.index(layer)] if layer in self.layers else None


def to_bytes(rows_digest: str, edits: Sequence[Edit]) -> bytes:
    """The file of an overlay.

    Args:
      rows_digest: of the rows that the edits were made for.
      edits: in their order.
    """
    places: dict[str, Place] = {}
    arrays, sums, end = [], {}, 0
    for k, edit in enumerate(edits):
        for field, dtype in _ARRAYS.items():
            value = getattr(edit, field)
            if value is None:
                continue
            array = np.ascontiguousarray(value, _DTYPES[dtype])
            name, start, end = f"{k}.{field}", end, end + array.nbytes
            places[name] = Place(dtype, array.shape, start, end)
            sums[name] = text_checksum(array)
            arrays.append(array.tobytes())
    meta = {
        "format": "memoryllm_overlay",
        "rows_digest": rows_digest,
        "edits": json.dumps([_listed(edit) for edit in edits]),
        "tensor_checksums": json.dumps(sums),
    }
    return b"".join([header.to_bytes(meta, places, _ALIGN), *arrays])


def _listed(edit: Edit) -> dict:
    entry = {"text": edit.text, "mix": edit.mix, "layer": edit.layer}
    # Only where it says something, so that other overlays are those of earlier versions.
    return entry if edit.layers is None else entry | {"layers": edit.layers}


def read(path: str, memory: Memory, rows_digest: str | None) -> tuple[list[Edit], str]:
    """Reads an overlay.

    Args:
      memory: what is to be edited.
      rows_digest: of its rows; None where that is not known yet, so that it is not compared.
    Returns: (the edits, the digest of the rows that the overlay was made for).
    Raises: UserError, also if the overlay does not fit the memory.
    """
    with os.fdopen(open_regular(path, _EXPECTED), "rb") as file:
        found = read_header(file.fileno(), path, _EXPECTED, header.MOST_BYTES)
        meta = found.metadata
        if meta.get("format") != "memoryllm_overlay" or not meta.keys() >= _METADATA:
            raise UserError(f"{path}: expected {_EXPECTED}, found another safetensors file")
        header.check(found, path, _METADATA)
        arrays = _read_arrays(file, path, found)
    if rows_digest is not None:
        check_digest(path, memory, meta["rows_digest"])
    entries = records.parse(list[_Entry], meta["edits"], f"{path}: edits")
    edits = [_edit(entry, k, arrays, memory, path) for k, entry in enumerate(entries)]
    if arrays:
        raise UserError(f"{path}: expected no tensor but those of its edits, found {next(iter(arrays))[:100]!r}")
    _check_suppressed(edits, memory, path)
    return edits, meta["rows_digest"]


def check_digest(path: str, memory: Memory, made_for: str) -> None:
    """Refuses an overlay that was made for other rows than the memory's. Raises: UserError."""
    if made_for != memory.rows_digest:
        raise UserError(
            f"{path}: made for other rows than those of {memory.name}: expected rows_digest "
            f"{memory.rows_digest[:12]}..., found {made_for[:12]}..."
        )


class _Entry(Record):
    """What an overlay's metadata says about an edit, with the fields of `Edit`."""

    text: str
    mix: list[list[tuple[Count, float]]] | None
    layer: Count | None
    layers: list[Count] | None = None


def _read_arrays(file: BinaryIO, path: str, found: Header) -> dict[str, np.ndarray]:
    """{name: array} of all tensors, after their checksums were verified. Raises: UserError."""
    sums = None
    if header.KEY in found.metadata:  # overlays of earlier versions have no checksums
        text = found.metadata.get("tensor_checksums", "{}")
        sums = records.parse(dict[str, str], text, f"{path}: tensor_checksums")
    arrays = {}
    for name, tensor in found.tensors.items():
        where = f"{path}: tensor {name[:100]}"
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{where}: expected I32 or F32, found {tensor.dtype}")
        file.seek(tensor.start)
        raw = file.read(tensor.end - tensor.start)
        if len(raw) < tensor.end - tensor.start:
            raise UserError(f"{where}: expected {tensor.end - tensor.start} bytes, found {len(raw)}")
        array = np.frombuffer(raw, _DTYPES[tensor.dtype]).reshape(tensor.shape)
        if sums is not None and sums.get(name) != text_checksum(array):
            raise UserError(f"{where}: its checksum differs; the file is damaged")
        arrays[name] = array
    return arrays


def _edit(entry: _Entry, k: int, arrays: dict[str, np.ndarray], memory: Memory, path: str) -> Edit:
    """Edit k of an overlay, whose tensors leave `arrays`. Raises: UserError if it does not fit the memory."""
    V, L, D = memory.vocab_size, memory.layers, memory.dim
    gives_rows = entry.layer is None
    problem = _misfit_of_layers(entry, L)
    if problem:
        raise UserError(f"{path}: edits[{k}]: {problem}")
    if gives_rows:
        n = len(entry.mix or ())
        shapes = {"ids": (n,), "rows": (n, L if entry.layers is None else len(entry.layers), D)}
    else:
        shapes = {"coefficients": (V,), "value": (D,)}
    stored = {}
    for field, shape in shapes.items():
        name, dtype = f"{k}.{field}", _DTYPES[_ARRAYS[field]]
        array = arrays.pop(name, None)
        if array is None or array.dtype != dtype or array.shape != shape:
            found = "none" if array is None else f"{array.dtype} {array.shape}"
            raise UserError(f"{path}: tensor {name}: expected {dtype} {shape} for {memory.name}, found {found}")
        if dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: tensor {name}: expected finite numbers, found others")
        stored[field] = array
    problem = _misfit_of_rows(entry, stored["ids"], V) if gives_rows else ""
    if problem:
        raise UserError(f"{path}: edits[{k}]: {problem}")
    layers = None if entry.layers is None else tuple(entry.layers)
    return Edit(entry.text, mix=entry.mix if gives_rows else None, layers=layers, layer=entry.layer, **stored)


def _misfit_of_layers(entry: _Entry, L: int) -> str:
    """What is wrong with the layers of an edit; "" if nothing is."""
    if entry.layer is not None:
        if entry.layers is not None:
            return "expected a layer or a list of layers, found both"
        return f"expected a layer below {L}, found {entry.layer}" if entry.layer >= L else ""
    layers = entry.layers
    if layers is not None and (not layers or sorted(set(layers)) != layers or layers[-1] >= L):
        return f"expected rising layers below {L}, found {str(layers)[:60]}"
    return ""


def _misfit_of_rows(entry: _Entry, ids: np.ndarray, V: int) -> str:
    """What is wrong with the tokens of an edit that gives rows; "" if nothing is."""
    if not len(ids):
        return "expected a mix of rows or a layer, found neither"
    if len(np.unique(ids)) < len(ids) or ids.min() < 0 or ids.max() >= V:
        return f"expected distinct ids from 0 to {V - 1}"
    longest = max(map(len, entry.mix))
    if longest > V:
        return f"expected rows that are mixed from at most {V} tokens, found {longest}"
    for token, weight in (pair for pairs in entry.mix for pair in pairs):
        if token >= V or not math.isfinite(weight):
            return f"expected a mix of tokens below {V} with finite weights, found {token} with {weight}"
    return ""


def _check_suppressed(edits: list[Edit], memory: Memory, path: str) -> None:
    """Refuses edits that take a key away from rows that hold nothing of its layer.

    An overlay of the full file fits a compressed one too, which may have dropped the layer. Raises: UserError.
    """
    for k, edit in enumerate(edits):
        if edit.gives_rows:
            continue
        has_row_V = memory.holds(edit.layer)
        for earlier in edits[:k]:
            if earlier.rows_of(edit.layer) is not None:
                has_row_V[earlier.ids] = True  # a new row has the layer, also where the memory drops it
        lost = np.nonzero((edit.coefficients != 0) & ~has_row_V)[0]
        if len(lost):
            raise UserError(
                f"{path}: edits[{k}]: expected coefficients of 0 where rows of {memory.name} drop layer {edit.layer}, "
                f"found {edit.coefficients[lost[0]]:.3g} for token #{lost[0]}; make the edits for this file again"
            )
