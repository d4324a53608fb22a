"""Edits of a token memory, kept beside the ToL file in a small file, the overlay.

An overlay is a safetensors file with a list of edits. An edit either gives tokens new rows, FFN-M of all layers, or
removes one key of one layer from every token's row: with SwiGLU's FFN = sum_i c_i v_i (MemoryLLM, section 2.3.1), the
row of token t loses c_i(t) v_i. Edits apply in order, each to the result of those before it. The embedding x0 is not
edited.
"""

import dataclasses
import json
import math
import os
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.records import Count, Record
from memoryllm_jax.common.safetensors_header import Header, read_header
from memoryllm_jax.tol import header
from memoryllm_jax.tol.format import TolFile, open_regular, text_checksum
from memoryllm_jax.tol.header import Place

_EXPECTED = "an overlay that `tol edit` wrote"
_METADATA = frozenset(("format", "rows_digest", "edits"))  # what overlays of earlier versions have
_ALIGN = 8  # bytes: safetensors aligns data to the largest element
_DTYPES = {"I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
_ARRAYS = {"ids": "I32", "rows": "F32", "coefficients": "F32", "value": "F32"}  # fields of Edit that are tensors


@dataclasses.dataclass(frozen=True)
class Edit:
    """One entry of an overlay.

    Attributes:
      text: the edit in words, as it was asked for.
      ids: int32 [n], tokens that get new rows; None for a suppressed key, as are the next two.
      rows: float32 [n, layers, D], their new rows.
      mix: for each id, (token id, weight) pairs: its new row is the sum of these tokens' rows from before the edit.
      layer: of a suppressed key; None where tokens get new rows, as are the next two.
      coefficients: float32 [V], the key's coefficient for every token.
      value: float32 [D], the key's value.
    """

    text: str
    ids: np.ndarray | None = None
    rows: np.ndarray | None = None
    mix: list | None = None
    layer: int | None = None
    coefficients: np.ndarray | None = None
    value: np.ndarray | None = None

    @property
    def gives_rows(self) -> bool:
        """Whether this edit gives tokens new rows; if not, it suppresses a key."""
        return self.ids is not None


class Overlay:
    """The edits of one ToL file's rows."""

    def __init__(self, tol: TolFile, edits: list[Edit]):
        self.tol, self.edits = tol, edits

    @classmethod
    def open(cls, path: str, tol: TolFile, missing_ok: bool = False) -> "Overlay":
        """Reads an overlay.

        Args:
          path: of the overlay.
          tol: the file whose rows it edits.
          missing_ok: whether to return an overlay without edits where there is no file.
        Raises: UserError, also if the overlay was made for other rows.
        """
        if missing_ok and not os.path.exists(path):
            return cls(tol, [])
        with os.fdopen(open_regular(path, _EXPECTED), "rb") as file:
            found = read_header(file.fileno(), path, _EXPECTED, header.MOST_BYTES)
            meta = found.metadata
            if meta.get("format") != "memoryllm_overlay" or not meta.keys() >= _METADATA:
                raise UserError(f"{path}: expected {_EXPECTED}, found another safetensors file")
            header.check(found, path, _METADATA)
            arrays = _read_arrays(file, path, found)
        if meta["rows_digest"] != tol.metadata["rows_digest"]:
            raise UserError(
                f"{path}: made for other rows than those of {tol.path}: expected rows_digest "
                f"{tol.metadata['rows_digest'][:12]}..., found {meta['rows_digest'][:12]}..."
            )
        entries = records.parse(list[_Entry], meta["edits"], f"{path}: edits")
        edits = [_edit(entry, k, arrays, tol, path) for k, entry in enumerate(entries)]
        if arrays:
            raise UserError(f"{path}: expected no tensor but those of its edits, found {next(iter(arrays))[:100]!r}")
        _check_suppressed(edits, tol, path)
        return cls(tol, edits)

    def save(self, path: str) -> None:
        """Writes the overlay as docs/tol.md specifies it. Raises: UserError."""
        listed = [{"text": e.text, "mix": e.mix, "layer": e.layer} for e in self.edits]
        places: dict[str, Place] = {}
        arrays, sums, end = [], {}, 0
        for k, edit in enumerate(self.edits):
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
            "rows_digest": self.tol.metadata["rows_digest"],
            "edits": json.dumps(listed),
            "tensor_checksums": json.dumps(sums),
        }
        storage.write_bytes(path, b"".join([header.to_bytes(meta, places, _ALIGN), *arrays]))

    def arrays(self) -> list[dict]:
        """The arrays that `apply` needs on the device, for each edit."""
        out = []
        for edit in self.edits:
            if edit.gives_rows:
                order = np.argsort(edit.ids)  # `apply` finds ids by binary search
                out.append({"ids": edit.ids[order], "rows": edit.rows[order]})
            else:
                out.append({"coefficients": edit.coefficients, "value": edit.value})
        return out

    def apply(self, arrays: list[dict], ids_U, ffn: list) -> list:
        """Applies the edits to rows. For use in jit.

        Args:
          arrays: what the method `arrays` gives. They are arguments, so that they are not compiled into the function.
          ids_U: int32 [U], the token of each row.
          ffn: [U, D] of every layer; None where the layer is dropped.
        Returns: `ffn` with the edits; a dropped layer that an edit changes is no longer None.
        """
        ffn = list(ffn)
        for edit, a in zip(self.edits, arrays):
            if not edit.gives_rows:
                y_UD = 0.0 if ffn[edit.layer] is None else ffn[edit.layer]
                ffn[edit.layer] = y_UD - a["coefficients"][ids_U][:, None] * a["value"]
                continue
            # Binary search: the place of each token among the edit's sorted ids, if it is one of them.
            at_U = jnp.clip(jnp.searchsorted(a["ids"], ids_U), 0, len(edit.ids) - 1)
            is_edited = (a["ids"][at_U] == ids_U)[:, None]
            for layer, y_UD in enumerate(ffn):
                ffn[layer] = jnp.where(is_edited, a["rows"][at_U, layer], 0.0 if y_UD is None else y_UD)
        return ffn

    def mixed(self, values_V: np.ndarray) -> np.ndarray:
        """Mixes a number for each token in the way that the edits mixed the tokens' rows.

        A row that was mixed from others holds a key's value with the same mix of their coefficients. Suppressing the
        key must take away that much.

        Args:
          values_V: float [V], the numbers for unedited rows, such as a key's coefficients.
        Returns: float [V], the numbers for the edited rows.
        """
        for edit in self.edits:
            if edit.gives_rows:
                new = [sum(weight * values_V[token] for token, weight in mix) for mix in edit.mix]
                values_V = values_V.copy()
                values_V[edit.ids] = new
        return values_V


class _Entry(Record):
    """What an overlay's metadata says about an edit, with the fields of `Edit`."""

    text: str
    mix: list[list[tuple[Count, float]]] | None
    layer: Count | None


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


def _edit(entry: _Entry, k: int, arrays: dict[str, np.ndarray], tol: TolFile, path: str) -> Edit:
    """Edit k of an overlay, whose tensors leave `arrays`. Raises: UserError if it does not fit the ToL file."""
    V, L, D = tol.vocab_size, tol.layout.layers, tol.layout.dim
    n = len(entry.mix or ())
    shapes = {"ids": (n,), "rows": (n, L, D)} if entry.layer is None else {"coefficients": (V,), "value": (D,)}
    stored = {}
    for field, shape in shapes.items():
        name, dtype = f"{k}.{field}", _DTYPES[_ARRAYS[field]]
        array = arrays.pop(name, None)
        if array is None or array.dtype != dtype or array.shape != shape:
            found = "none" if array is None else f"{array.dtype} {array.shape}"
            raise UserError(f"{path}: tensor {name}: expected {dtype} {shape} for {tol.path}, found {found}")
        stored[field] = array
    problem = _misfit(entry, stored, V, L)
    if problem:
        raise UserError(f"{path}: edits[{k}]: {problem}")
    mix = entry.mix if entry.layer is None else None
    return Edit(entry.text, mix=mix, layer=entry.layer, **stored)


def _check_suppressed(edits: list[Edit], tol: TolFile, path: str) -> None:
    """Refuses edits that take a key away from rows that hold nothing of its layer.

    An overlay of the full file fits a compressed one too, which may have dropped the layer. Raises: UserError.
    """
    has_new_row = np.zeros(tol.vocab_size, bool)  # of all layers, also of dropped ones
    for k, edit in enumerate(edits):
        if edit.gives_rows:
            has_new_row[edit.ids] = True
            continue
        lost = np.nonzero((edit.coefficients != 0) & ~has_new_row & ~tol.holds(edit.layer))[0]
        if len(lost):
            raise UserError(
                f"{path}: edits[{k}]: expected coefficients of 0 where rows of {tol.path} drop layer {edit.layer}, "
                f"found {edit.coefficients[lost[0]]:.3g} for token #{lost[0]}; make the edits for this file again"
            )


def _misfit(entry: _Entry, stored: dict[str, np.ndarray], V: int, L: int) -> str:
    """What is wrong with the tokens and layers of an edit; "" if nothing is."""
    if entry.layer is not None:
        return f"expected a layer below {L}, found {entry.layer}" if entry.layer >= L else ""
    ids = stored["ids"]
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
