"""Edits of a token memory, kept in a small file, the overlay.

An edit either gives tokens new rows, FFN-M of all layers or of some, or removes one key of one layer from every token's
row: with SwiGLU's FFN = sum_i c_i v_i (MemoryLLM, section 2.3.1), the row of token t loses c_i(t) v_i. Edits apply in
order, each to the result of those before it. The embedding x0 is not edited.
"""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.tol import overlay_file
from memoryllm_jax.tol.memory import Memory
from memoryllm_jax.tol.overlay_file import Edit

_HIGH = np.uint32(0xFFFFF000)  # of the bits of a float32: all but the lower 12 of the significand


class LayerEdits(NamedTuple):
    """What an overlay's edits come to in one layer.

    First every row loses the suppressed keys; then the rows of some tokens are replaced. What suppressed keys took away
    from a new row is in it already.

    Attributes:
      ids_n: int32, tokens whose row in this layer is replaced, rising.
      rows_nD: float32, their rows.
      coefficients_KV: float32, the coefficients of the K suppressed keys for every token, in the order of the edits.
      values_KD: float32, the values of these keys.
    """

    ids_n: np.ndarray
    rows_nD: np.ndarray
    coefficients_KV: np.ndarray
    values_KD: np.ndarray


class Overlay:
    """The edits of a memory.

    Args:
      memory: what they edit.
      edits: in the order in which they apply.
    Attributes:
      memory: as given.
    """

    def __init__(self, memory: Memory, edits=()):
        self.memory = memory
        self._edits = tuple(edits)
        self._path, self._made_for = "", None  # of an overlay that was read from a file
        self._layers: list[LayerEdits | None] | None = None

    @classmethod
    def open(cls, path: str, memory: Memory, missing_ok: bool = False, is_read: bool = True) -> "Overlay":
        """Reads an overlay.

        Args:
          path: of the overlay.
          memory: what it edits.
          missing_ok: whether to return an overlay without edits where there is no file.
          is_read: whether the memory knows its digest; if not, the caller calls `check_rows` once it does.
        Raises: UserError, also if the overlay was made for other rows.
        """
        # A URL cannot be read, so that the second edit would lose the first: reading it says that.
        if missing_ok and not (os.path.exists(path) or storage.is_url(path)):
            return cls(memory)
        edits, made_for = overlay_file.read(path, memory, memory.rows_digest if is_read else None)
        overlay = cls(memory, edits)
        overlay._path, overlay._made_for = path, made_for
        return overlay

    def check_rows(self) -> None:
        """Refuses an overlay whose file was made for other rows than the memory's. Raises: UserError."""
        if self._made_for is not None:
            overlay_file.check_digest(self._path, self.memory, self._made_for)

    def to_bytes(self) -> bytes:
        """The overlay's file, as docs/tol.md specifies it."""
        return overlay_file.to_bytes(self.memory.rows_digest, self._edits)

    def save(self, path: str) -> None:
        """Writes the overlay to a file. Raises: UserError."""
        storage.write_bytes(path, self.to_bytes())

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits, in the order in which they apply."""
        return self._edits

    def add(self, edit: Edit) -> None:
        """Adds an edit after the others."""
        self._edits, self._layers = (*self._edits, edit), None

    def take_back(self, count: int) -> tuple[Edit, ...]:
        """Removes the last `count` edits, at least one. Returns: these edits."""
        gone = self._edits[-count:]
        self._edits, self._layers = self._edits[:-count], None
        return gone

    def layers(self) -> list[LayerEdits | None]:
        """What the edits come to, by layer; None for layers that no edit changes. Computed once."""
        if self._layers is None:
            self._layers = [self._layer(layer) for layer in range(self.memory.layers)]
        return self._layers

    def _layer(self, layer):
        rows: dict[int, np.ndarray] = {}  # new rows by token
        keys = []
        for edit in self._edits:
            new = edit.rows_of(layer)
            if new is not None:
                rows.update(zip(edit.ids.tolist(), new))
            elif edit.layer == layer:
                keys.append(edit)
                if rows:
                    ids = list(rows)
                    rows = dict(
                        zip(ids, without_key(np.stack(list(rows.values())), edit.coefficients[ids], edit.value))
                    )
        if not rows and not keys:
            return None
        V, D = self.memory.vocab_size, self.memory.dim
        ids = sorted(rows)  # as `edited` expects them
        return LayerEdits(
            np.array(ids, np.int32),
            np.array([rows[token] for token in ids], np.float32).reshape(-1, D),
            np.array([edit.coefficients for edit in keys], np.float32).reshape(-1, V),
            np.array([edit.value for edit in keys], np.float32).reshape(-1, D),
        )

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The edited rows of n token ids, float32 [n, L, D]."""
        # Not from `layers`, which takes time for all rows that the edits give: an editor asks anew after each edit.
        ids = np.asarray(ids, np.int32)
        rows_nLD = self.memory.rows(ids)
        for edit in self._edits:
            if edit.gives_rows:
                layers = slice(None) if edit.layers is None else list(edit.layers)
                new = dict(zip(edit.ids.tolist(), edit.rows))
                for i, token in enumerate(ids.tolist()):
                    if token in new:
                        rows_nLD[i, layers] = new[token]
            else:
                y_nD = rows_nLD[:, edit.layer]
                rows_nLD[:, edit.layer] = without_key(y_nD, edit.coefficients[ids], edit.value)
        return rows_nLD

    def mixed(self, values_V: np.ndarray, layer: int) -> np.ndarray:
        """Mixes a number for each token in the way that the edits mixed the tokens' rows of a layer.

        A row that was mixed from others holds a key's value with the same mix of their coefficients. Suppressing the
        key must take away that much.

        Args:
          values_V: float [V], the numbers for unedited rows, such as a key's coefficients.
        Returns: float [V], the numbers for the edited rows.
        """
        for edit in self._edits:
            if edit.rows_of(layer) is not None:
                new = [sum(weight * values_V[token] for token, weight in mix) for mix in edit.mix]
                values_V = values_V.copy()
                values_V[edit.ids] = new
        return values_V


def edited(layer: LayerEdits, ids_U, y_UD):
    """Applies the edits of a layer to rows. For use in jit.

    Args:
      ids_U: int32 [U], the token of each row.
      y_UD: the rows; None where they lack the layer.
    """
    y_UD = 0.0 if y_UD is None else y_UD
    for coefficients_V, value_D in zip(layer.coefficients_KV, layer.values_KD):
        y_UD = without_key(y_UD, coefficients_V[ids_U], value_D)
    if not len(layer.ids_n):
        return y_UD
    # Compared with all of them: a binary search would be a loop in every layer, and edits name few tokens.
    at_U = jnp.searchsorted(layer.ids_n, ids_U, method="compare_all").clip(max=len(layer.ids_n) - 1)
    is_replaced = (layer.ids_n[at_U] == ids_U)[:, None]
    return jnp.where(is_replaced, layer.rows_nD[at_U], y_UD)


def without_key(y_UD, coefficients_U, value_D):
    """Rows without what a key added to them, with the same bits on the host and inside any jitted function.

    A compiler may fuse a multiplication and a subtraction into one operation, which rounds once, and whether it does
    depends on the code around them. So the product is subtracted in parts that float32 holds exactly: fused or not,
    each subtraction rounds once.

    Args:
      coefficients_U: float32, the key's coefficients for the rows' tokens.
      value_D: float32, the key's value; or one for each row.
    """
    for c_U in _halves(coefficients_U):
        for v_D in _halves(value_D):
            y_UD = y_UD - c_U[:, None] * v_D
    return y_UD


def _halves(x):
    """Two numbers of 12 significant bits each, whose sum is x."""
    if isinstance(x, np.ndarray):
        high = (x.view(np.uint32) & _HIGH).view(np.float32)
    else:
        high = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & _HIGH, jnp.float32)
    return high, x - high
