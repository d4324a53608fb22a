"""Edits of a token memory, kept beside the ToL file in a small file, the overlay.

An overlay is a safetensors file with a list of edits. An edit either gives tokens new rows, FFN-M of all layers, or
removes one key of one layer from every token's row: with SwiGLU's FFN = sum_i c_i v_i (MemoryLLM, section 2.3.1), the
row of token t loses c_i(t) v_i. Edits apply in order, each to the result of those before it. The embedding x0 is not
edited.
"""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol.format import TolFile

_ARRAYS = ("ids", "rows", "coefficients", "value")  # fields of Edit that are tensors of the file


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
        try:
            with safetensors.safe_open(path, "numpy") as file:
                meta = file.metadata() or {}
                # The opened file is no dict: it can be iterated only by its keys().
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if meta.get("format") != "memoryllm_overlay":
                raise ValueError("its metadata is not that of one")
            if meta["rows_digest"] != tol.metadata["rows_digest"]:
                raise UserError(
                    f"{path}: made for other rows than those of {tol.path}: "
                    f"{meta['rows_digest'][:12]}, found {tol.metadata['rows_digest'][:12]}"
                )
            edits = [_parse_edit(entry, k, arrays, tol) for k, entry in enumerate(json.loads(meta["edits"]))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: expected an overlay that `tol edit` wrote: {error}") from error
        return cls(tol, edits)

    def save(self, path: str) -> None:
        """Writes the overlay as docs/tol.md specifies it. Raises: UserError."""
        listed = [{"text": e.text, "mix": e.mix, "layer": e.layer} for e in self.edits]
        meta = {"format": "memoryllm_overlay", "rows_digest": self.tol.metadata["rows_digest"]}
        meta["edits"] = json.dumps(listed)
        tensors = {}
        for k, edit in enumerate(self.edits):
            for name in _ARRAYS:
                array = getattr(edit, name)
                if array is not None:
                    tensors[f"{k}.{name}"] = np.ascontiguousarray(array)
        storage.write_bytes(path, safetensors.numpy.save(tensors, meta))

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


def _parse_edit(entry: dict, k: int, arrays: dict, tol: TolFile) -> Edit:
    """Edit k of an overlay. Raises: ValueError, KeyError, TypeError or AttributeError for one that is damaged."""
    stored = {name: arrays.get(f"{k}.{name}") for name in _ARRAYS}
    edit = Edit(entry["text"], mix=entry["mix"], layer=entry["layer"], **stored)
    V, L, D = tol.vocab_size, tol.layout.layers, tol.layout.dim
    if edit.layer is None:
        fits = (
            edit.rows.shape == (len(edit.ids), L, D)
            and len(edit.mix) == len(edit.ids) > 0
            and edit.ids.min() >= 0
            and edit.ids.max() < V
        )
    else:
        fits = edit.coefficients.shape == (V,) and edit.value.shape == (D,) and 0 <= edit.layer < L
    if not fits:
        raise ValueError(f"edit {k + 1} does not fit {tol.path}")
    return edit
