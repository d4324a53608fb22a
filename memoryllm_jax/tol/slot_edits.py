"""Overlays in a batch whose sequences each have their own (an `inference.slots.RowEdits`).

All shapes are fixed, so that nothing compiles when a slot gets other edits. New rows and suppressed keys lie in two
pools on the device; equal ones are there once, however many slots have them. A new row is what the edits of its overlay
made of it (`Overlay.layers`). So a slot's rows are those that `EditedRows` gives with its overlay alone.

Shapes: B slots, T tokens with new rows of a slot, K suppressed keys of a slot, R rows and S keys of the pools, U ids, V
vocabulary, L layers, D width.
"""

import collections
import hashlib
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol.memory import Memory
from memoryllm_jax.tol.overlay import Overlay, without_key

# Unless other sizes are asked for: the most of one slot, and what the pool holds for each slot. Overlays are small as a
# rule, and large ones are often the same one.
TOKENS, ROWS_PER_SLOT = 256, 16
KEYS = KEYS_PER_SLOT = 4
_WRITTEN_ROWS = 16  # rows that one call writes to the pool


class PoolFullError(ArgumentError):
    """The edits of other slots leave no room: later there may be some."""


class SlotArrays(NamedTuple):
    """The edits of all slots, on the device.

    Attributes:
      ids_BT: int32, the tokens with new rows of each slot; -1 where there are fewer.
      row_BT: int32, the places of their rows in the pool.
      key_BK: int32, the places of each slot's suppressed keys in the pool; -1 where there are fewer.
      rows_RLD: float32, the pool of rows.
      is_new_RL: bool, the layers in which each of these rows is a new one.
      layer_S: int32, the layer of each key of the pool.
      coefficients_SV, values_SD: float32, the coefficients and the value of each key.
    """

    ids_BT: jax.Array
    row_BT: jax.Array
    key_BK: jax.Array
    rows_RLD: jax.Array
    is_new_RL: jax.Array
    layer_S: jax.Array
    coefficients_SV: jax.Array
    values_SD: jax.Array


class SlotEdits:
    """The edits of each slot's sequence. `place` and `free` are for one thread, `check` for any.

    Args:
      memory: what the overlays edit.
      mesh: devices that the arrays are replicated on: those of the rows that are edited.
      slots: B.
      tokens: T, the most tokens with new rows of an overlay.
      keys: K, the most suppressed keys of an overlay.
      pooled_rows: R, by default B * ROWS_PER_SLOT. `place` refuses what has no room beside the other slots' edits.
      pooled_keys: S, by default B * KEYS_PER_SLOT.
    Attributes:
      bytes: of the arrays on each device.
      arrays: the `SlotArrays`. Take them anew for each call: `place` and `free` donate them.
    """

    def __init__(
        self,
        memory: Memory,
        mesh,
        slots: int,
        tokens: int = TOKENS,
        keys: int = KEYS,
        pooled_rows: int | None = None,
        pooled_keys: int | None = None,
    ):
        self.tokens, self.keys = tokens, keys
        self._rows = _Pool("new rows", slots * ROWS_PER_SLOT if pooled_rows is None else pooled_rows)
        self._keys = _Pool("suppressed keys", slots * KEYS_PER_SLOT if pooled_keys is None else pooled_keys)
        self._held: list[_Held | None] = [None] * slots
        self._prepared: weakref.WeakKeyDictionary[Overlay, _Prepared] = weakref.WeakKeyDictionary()
        V, L, D = memory.vocab_size, memory.layers, memory.dim
        self._shape = L, D
        like = SlotArrays(
            jax.ShapeDtypeStruct((slots, tokens), jnp.int32),
            jax.ShapeDtypeStruct((slots, tokens), jnp.int32),
            jax.ShapeDtypeStruct((slots, keys), jnp.int32),
            jax.ShapeDtypeStruct((self._rows.size, L, D), jnp.float32),
            jax.ShapeDtypeStruct((self._rows.size, L), jnp.bool_),
            jax.ShapeDtypeStruct((self._keys.size,), jnp.int32),
            jax.ShapeDtypeStruct((self._keys.size, V), jnp.float32),
            jax.ShapeDtypeStruct((self._keys.size, D), jnp.float32),
        )
        self.bytes = sum(x.size * x.dtype.itemsize for x in like)
        whole = NamedSharding(mesh, P())
        self.arrays = jax.jit(lambda: _empty(like), out_shardings=whole)()
        # Donated: pools are updated in place instead of copied for every sequence.
        self._set_slot = jax.jit(_set_slot, donate_argnums=0, out_shardings=whole)
        self._set_rows = jax.jit(_set_rows, donate_argnums=0, out_shardings=whole)
        self._set_key = jax.jit(_set_key, donate_argnums=0, out_shardings=whole)
        # Compiled now, so that no sequence waits for it. Places past the end of a pool are not written.
        self._write_slot(0, [], [], [])
        self._write_rows([])
        self._write_key(self._keys.size, _SuppressedKey(b"", np.int32(0), np.zeros(V, "f"), np.zeros(D, "f")))

    def check(self, overlay: Overlay) -> None:
        """Refuses an overlay that no slot has room for, and prepares `place`. Raises: ArgumentError."""
        self._prepare(overlay)

    def place(self, slot: int, overlay: Overlay | None) -> None:
        """Gives a slot the edits of an overlay, or none.

        Raises: ArgumentError for an overlay that no slot has room for, PoolFullError if it has no room beside the other
          slots' edits. The slot then has no edits.
        """
        self.free(slot)
        if overlay is None or not overlay.edits:
            return
        prepared = self._prepare(overlay)
        rows = self._rows.take([row.digest for row in prepared.rows])
        try:
            keys = self._keys.take([key.digest for key in prepared.keys])
        except PoolFullError:
            self._rows.give_back(rows)
            raise
        self._held[slot] = _Held(rows, keys)
        new = [(place, row) for place, row in zip(rows.places, prepared.rows) if place in rows.added]
        for start in range(0, len(new), _WRITTEN_ROWS):
            self._write_rows(new[start : start + _WRITTEN_ROWS])
        for place, key in zip(keys.places, prepared.keys):
            if place in keys.added:
                self._write_key(place, key)
        self._write_slot(slot, [row.token for row in prepared.rows], rows.places, keys.places)

    def free(self, slot: int) -> None:
        """Takes a slot's edits away."""
        held = self._held[slot]
        if held is None:
            return
        self._rows.give_back(held.rows)
        self._keys.give_back(held.keys)
        self._held[slot] = None
        self._write_slot(slot, [], [], [])

    def _write_slot(self, slot, ids, rows, keys):
        padded = _padded(ids, self.tokens, -1), _padded(rows, self.tokens, 0), _padded(keys, self.keys, -1)
        self.arrays = self._set_slot(self.arrays, np.int32(slot), *padded)

    def _write_rows(self, new: list[tuple[int, "_NewRow"]]):
        """Writes at most _WRITTEN_ROWS rows to their places in the pool."""
        rows_nLD = np.zeros((_WRITTEN_ROWS, *self._shape), np.float32)
        is_new_nL = np.zeros((_WRITTEN_ROWS, self._shape[0]), bool)
        for i, (_, row) in enumerate(new):
            rows_nLD[i], is_new_nL[i] = row.row_LD, row.is_new_L
        places_n = _padded([place for place, _ in new], _WRITTEN_ROWS, self._rows.size)
        self.arrays = self._set_rows(self.arrays, places_n, rows_nLD, is_new_nL)

    def _write_key(self, place, key):
        self.arrays = self._set_key(self.arrays, np.int32(place), key.layer, key.coefficients_V, key.value_D)

    def _prepare(self, overlay: Overlay) -> "_Prepared":
        found = self._prepared.get(overlay)
        if found is None or found.edits is not overlay.edits:  # overlays may grow
            found = self._prepared[overlay] = _prepare(overlay)
        for what, count, most in (
            ("tokens with new rows", len(found.rows), min(self.tokens, self._rows.size)),
            ("suppressed keys", len(found.keys), min(self.keys, self._keys.size)),
        ):
            if count > most:
                raise ArgumentError("edits", f"expected at most {most} {what}, found {count}")
        return found

    def apply(self, arrays: SlotArrays, ids_B, rows: TokenRows) -> TokenRows:
        """Edits the rows of one token of each slot. For use in jit.

        Args:
          arrays: `self.arrays`.
          ids_B: int32, the token of each slot.
          rows: their rows.
        """
        return _edit(arrays, arrays.ids_BT, arrays.row_BT, arrays.key_BK, ids_B, rows)

    def apply_to_slot(self, arrays: SlotArrays, slot, ids_U, rows: TokenRows) -> TokenRows:
        """Edits the rows of token ids for one slot. For use in jit.

        Args:
          arrays: `self.arrays`.
          slot: int32 scalar.
          ids_U: int32, the tokens.
          rows: their rows.
        """
        of_slot = [
            jnp.broadcast_to(x[slot], (len(ids_U), x.shape[1])) for x in (arrays.ids_BT, arrays.row_BT, arrays.key_BK)
        ]
        return _edit(arrays, *of_slot, ids_U, rows)


def _edit(arrays: SlotArrays, ids_UT, row_UT, key_UK, ids_U, rows: TokenRows) -> TokenRows:
    """Edits rows of tokens, each with the edits of its own slot.

    Args:
      ids_UT, row_UT, key_UK: what the slot of each token has, as of `SlotArrays`.
    """
    is_own_UT = ids_UT == ids_U[:, None]
    row_U = jnp.take_along_axis(row_UT, jnp.argmax(is_own_UT, 1)[:, None], 1)[:, 0]
    rows_ULD, is_new_UL = arrays.rows_RLD[row_U], arrays.is_new_RL[row_U] & is_own_UT.any(1)[:, None]
    keys = []
    for key_U in jnp.maximum(key_UK, 0).T:
        keys.append((arrays.layer_S[key_U], arrays.coefficients_SV[key_U, ids_U], arrays.values_SD[key_U]))
    ffn = []
    for layer, y_1UD in enumerate(rows.rows_LSUP):
        # A new row may be of a layer that all other rows lack.
        y_UD = jnp.zeros(rows.x0_SUD.shape[1:], jnp.float32) if y_1UD is None else y_1UD[0]
        for k, (layer_U, coefficients_U, value_UD) in enumerate(keys):
            is_suppressed_U = (layer_U == layer) & (key_UK[:, k] >= 0)
            y_UD = jnp.where(is_suppressed_U[:, None], without_key(y_UD, coefficients_U, value_UD), y_UD)
        ffn.append(jnp.where(is_new_UL[:, layer, None], rows_ULD[:, layer], y_UD)[None])
    return rows._replace(rows_LSUP=ffn)


def _empty(like: SlotArrays) -> SlotArrays:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return zeros._replace(ids_BT=zeros.ids_BT - 1, key_BK=zeros.key_BK - 1)


def _set_slot(arrays, slot, ids_T, row_T, key_K):
    return arrays._replace(
        ids_BT=arrays.ids_BT.at[slot].set(ids_T),
        row_BT=arrays.row_BT.at[slot].set(row_T),
        key_BK=arrays.key_BK.at[slot].set(key_K),
    )


def _set_rows(arrays, places_n, rows_nLD, is_new_nL):
    return arrays._replace(
        rows_RLD=arrays.rows_RLD.at[places_n].set(rows_nLD, mode="drop"),
        is_new_RL=arrays.is_new_RL.at[places_n].set(is_new_nL, mode="drop"),
    )


def _set_key(arrays, place, layer, coefficients_V, value_D):
    return arrays._replace(
        layer_S=arrays.layer_S.at[place].set(layer, mode="drop"),
        coefficients_SV=arrays.coefficients_SV.at[place].set(coefficients_V, mode="drop"),
        values_SD=arrays.values_SD.at[place].set(value_D, mode="drop"),
    )


def _padded(values: list[int], size: int, filler: int) -> np.ndarray:
    return np.array(values + [filler] * (size - len(values)), np.int32)


class _NewRow(NamedTuple):
    """The new row of a token. Layers that are not new are zero and not used."""

    digest: bytes
    token: int
    row_LD: np.ndarray
    is_new_L: np.ndarray


class _SuppressedKey(NamedTuple):
    """A key that all rows of a layer lose."""

    digest: bytes
    layer: np.int32
    coefficients_V: np.ndarray
    value_D: np.ndarray


class _Prepared(NamedTuple):
    """An overlay as a slot takes it.

    Attributes:
      edits: the overlay's edits that this was made from.
      rows: the new rows.
      keys: the suppressed keys; those of one layer are in the order of the edits.
    """

    edits: tuple
    rows: list[_NewRow]
    keys: list[_SuppressedKey]


def _prepare(overlay: Overlay) -> _Prepared:
    L, D = overlay.memory.layers, overlay.memory.dim
    edits = overlay.edits
    new: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    keys = []
    for layer, found in enumerate(overlay.layers()):
        if found is None:
            continue
        for token, row_D in zip(found.ids_n.tolist(), found.rows_nD):
            row_LD, is_new_L = new.setdefault(token, (np.zeros((L, D), np.float32), np.zeros(L, bool)))
            row_LD[layer], is_new_L[layer] = row_D, True
        for coefficients_V, value_D in zip(found.coefficients_KV, found.values_KD):
            arrays = np.int32(layer), coefficients_V, value_D
            keys.append(_SuppressedKey(_digest(*arrays), *arrays))
    rows = [_NewRow(_digest(*arrays), token, *arrays) for token, arrays in new.items()]
    return _Prepared(edits, rows, keys)


def _digest(*arrays) -> bytes:
    # Not a checksum: whoever finds another row with the same one would change the edits of others.
    total = hashlib.sha256()
    for array in arrays:
        total.update(array.tobytes())
    return total.digest()


class _Taken(NamedTuple):
    """Entries of a pool: their digests, their places, and which of these places have to be written."""

    digests: list[bytes]
    places: list[int]
    added: set[int]


class _Held(NamedTuple):
    """What a slot holds of the pools."""

    rows: _Taken
    keys: _Taken


class _Pool:
    """Places for entries that several slots may hold at a time.

    An entry that no slot holds stays until its place is needed, as the next sequence may have the same edits.

    Args:
      what: the entries, for error messages.
      size: number of places.
    """

    def __init__(self, what: str, size: int):
        self.what, self.size = what, size
        self._place: dict[bytes, int] = {}
        self._holders: collections.Counter[bytes] = collections.Counter()
        self._unused: collections.OrderedDict[bytes, None] = collections.OrderedDict()  # that which was held last, last
        self._free = list(range(size))

    def take(self, digests: list[bytes]) -> _Taken:
        """Holds these entries, which may repeat. Raises: PoolFullError."""
        wanted = dict.fromkeys(digests)
        missing = [digest for digest in wanted if digest not in self._place]
        room = len(self._free) + sum(digest not in wanted for digest in self._unused)
        if len(missing) > room:
            problem = f"expected at most {room} {self.what} beside those of the other sequences, found {len(missing)}"
            raise PoolFullError("edits", problem)
        for digest in wanted:
            self._unused.pop(digest, None)
            self._holders[digest] += 1
        added = set()
        for digest in missing:
            if not self._free:
                oldest, _ = self._unused.popitem(last=False)
                self._free.append(self._place.pop(oldest))
            self._place[digest] = self._free.pop()
            added.add(self._place[digest])
        return _Taken(digests, [self._place[digest] for digest in digests], added)

    def give_back(self, taken: _Taken) -> None:
        """Ends a hold."""
        for digest in dict.fromkeys(taken.digests):
            self._holders[digest] -= 1
            if not self._holders[digest]:
                del self._holders[digest]
                self._unused[digest] = None
