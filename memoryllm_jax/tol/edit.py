"""Edits of a token memory, kept beside the ToL file in a small overlay: rows of named tokens, and suppressed keys.

An overlay is a safetensors file with a list of edits. An edit either gives rows to tokens, FFN-M's of all layers, or
takes one key of one layer out of every token's row: with SwiGLU's FFN = sum_i c_i v_i (paper, section 2.3.1), the row
of token t loses c_i(t) v_i. Edits apply in order, each to what the ones before it left; the embedding x0 stays.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model.transformer import Norm, swiglu_coefficients
from memoryllm_jax.tol import build, codec
from memoryllm_jax.tol.build import RowDecoder
from memoryllm_jax.tol.format import TolFile, checksum
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.verify import CHUNK

OPERATIONS = ("swap", "replace", "blend", "zero", "suppress")


@dataclasses.dataclass(frozen=True)
class Edit:
    """One entry of an overlay.

    Attributes:
      text: what a person asked for.
      ids, rows: token ids [n] and their new rows float32 [n, layers, D]; None for a suppressed key.
      mix: what the new rows are made of: for each id, (token id, weight) pairs of rows as they were before the edit.
      layer, coefficients, value: of a suppressed key: float32 [V] and [D]; else None.
    """

    text: str
    ids: np.ndarray | None = None
    rows: np.ndarray | None = None
    mix: list | None = None
    layer: int | None = None
    coefficients: np.ndarray | None = None
    value: np.ndarray | None = None


class Overlay:
    """The edits of one ToL file's rows. Raises: UserError if the overlay was made for other rows."""

    def __init__(self, tol: TolFile, edits: list[Edit]):
        self.tol, self.edits = tol, edits

    @classmethod
    def open(cls, path: str, tol: TolFile, missing_ok: bool = False) -> "Overlay":
        if missing_ok and not os.path.exists(path):
            return cls(tol, [])
        try:
            with safetensors.safe_open(path, "numpy") as file:
                meta = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if meta.get("format") != "memoryllm_overlay":
                raise ValueError("its metadata is not that of one")
            if meta["rows_digest"] != tol.metadata["rows_digest"]:
                raise UserError(
                    f"{path}: made for other rows than those of {tol.path}: "
                    f"{meta['rows_digest'][:12]}, found {tol.metadata['rows_digest'][:12]}"
                )
            edits = [_edit(entry, k, arrays, tol) for k, entry in enumerate(json.loads(meta["edits"]))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: expected an overlay that `tol edit` wrote: {error}") from error
        return cls(tol, edits)

    def save(self, path: str) -> None:
        listed = [{"text": e.text, "mix": e.mix, "layer": e.layer} for e in self.edits]
        meta = {"format": "memoryllm_overlay", "rows_digest": self.tol.metadata["rows_digest"]}
        meta["edits"] = json.dumps(listed)
        tensors = {
            f"{k}.{name}": np.ascontiguousarray(array)
            for k, edit in enumerate(self.edits)
            for name in ("ids", "rows", "coefficients", "value")
            if (array := getattr(edit, name)) is not None
        }
        storage.write_bytes(path, safetensors.numpy.save(tensors, meta))

    def arrays(self) -> list[dict]:
        """What `apply` needs on the device."""
        out = []
        for edit in self.edits:
            if edit.ids is None:
                out.append({"coefficients": edit.coefficients, "value": edit.value})
            else:
                order = np.argsort(edit.ids)
                out.append({"ids": edit.ids[order], "rows": edit.rows[order]})
        return out

    def apply(self, arrays: list[dict], ids_U, ffn: list) -> list:
        """Rows [U, D] of every layer (None where dropped) with the edits. For use in jit."""
        ffn = list(ffn)
        for edit, a in zip(self.edits, arrays):
            if edit.ids is None:
                y = 0.0 if ffn[edit.layer] is None else ffn[edit.layer]
                ffn[edit.layer] = y - a["coefficients"][ids_U][:, None] * a["value"]
                continue
            at = jnp.clip(jnp.searchsorted(a["ids"], ids_U), 0, len(edit.ids) - 1)
            hit = (a["ids"][at] == ids_U)[:, None]
            for layer, y in enumerate(ffn):
                ffn[layer] = jnp.where(hit, a["rows"][at, layer], 0.0 if y is None else y)
        return ffn

    def mixed(self, values_V: np.ndarray) -> np.ndarray:
        """A number that each token's row holds linearly -> what the rows that edits gave hold of it."""
        for edit in self.edits:
            if edit.ids is not None:
                new = [sum(weight * values_V[source] for source, weight in mix) for mix in edit.mix]
                values_V = values_V.copy()
                values_V[edit.ids] = new
        return values_V


class Editor:
    """Makes edits of one ToL file.

    Args:
      workdir: of the model, which suppressing keys needs for its weights.
    """

    def __init__(self, tol: TolFile, overlay: Overlay, workdir: str = ""):
        self.tol, self.overlay, self.workdir = tol, overlay, workdir
        self.tokenizer = tol.tokenizer()

    def token(self, text: str) -> int:
        """The id of `#ID` or of a text that is one token. Raises: UserError."""
        label = f"token {text if text.startswith('#') else repr(text)}"
        return self.tokenizer.token(text, label, self.tol.vocab_size)

    def rows(self, ids: list[int]) -> np.ndarray:
        """float32 [n, layers, D] of tokens, with the overlay's edits so far."""
        return read_rows(self.tol, np.array(ids, np.int32), self.overlay)

    def add(self, operation: str, spec: str) -> None:
        """Adds an edit: swap=A,B  replace=A,B (A gets B's rows)  blend=A,B,SHARE  zero=A  suppress=LAYER:KEY."""
        if operation == "suppress":
            return self._suppress(spec)
        fields = _fields(operation, spec, {"swap": 2, "replace": 2, "blend": 3, "zero": 1}[operation])
        share = _share(fields.pop()) if operation == "blend" else None
        ids = [self.token(field) for field in fields]
        if len(set(ids)) < len(ids):
            raise UserError(f"--{operation}={spec}: expected two different tokens, found the same twice")
        a, b = ids[0], ids[-1]
        mix = {
            "swap": {a: [(b, 1.0)], b: [(a, 1.0)]},
            "replace": {a: [(b, 1.0)]},
            "blend": {a: [(a, 1 - (share or 0)), (b, share)]},
            "zero": {a: []},
        }[operation]
        row_of = dict(zip(ids, self.rows(ids)))
        nothing = np.zeros_like(row_of[a])
        rows = np.stack([sum((weight * row_of[token] for token, weight in m), nothing) for m in mix.values()])
        names = " ".join(f"#{i} {self.tokenizer.decode([i])!r}" for i in ids)
        text = f"{operation} {names}" + (f" {share:g}" if operation == "blend" else "")
        self.overlay.edits.append(Edit(text, np.array(list(mix), np.int32), rows, list(mix.values())))

    def _suppress(self, spec):
        layer, _, key = spec.partition(":")
        if not (layer.isdecimal() and key.isdecimal()):
            raise UserError(f"--suppress={spec}: expected LAYER:KEY, two numbers")
        if not self.workdir:
            raise UserError("--suppress: a key's coefficients come from the weights: give --workdir")
        layer, key = int(layer), int(key)
        trained = TrainedModel(self.workdir, int(self.tol.metadata["step"]), self.tol.metadata["dtype"])
        c = trained.config
        self.tol.check_model(c, trained.tokenizer.digest, None)
        if layer >= c.layers or key >= c.memory_dim:
            raise UserError(f"--suppress={spec}: expected a layer below {c.layers} and a key below {c.memory_dim}")
        if layer not in self.tol.layout.kept_layers():
            raise UserError(
                f"--suppress={spec}: expected a layer that {self.tol.path} holds, found one that it dropped"
            )
        coefficients, value = key_of(trained, layer, key, self.tol.metadata["rows_digest"])
        text = f"suppress layer {layer} key {key}"
        if any(edit.text == text for edit in self.overlay.edits):
            raise UserError(f"--suppress={spec}: this key is suppressed already")
        coefficients = self.overlay.mixed(coefficients)
        self.overlay.edits.append(Edit(text, layer=layer, coefficients=coefficients, value=value))

    def undo(self, count: int) -> list[str]:
        """Takes back the last edits. Returns: what they were. Raises: UserError if there are fewer."""
        edits = self.overlay.edits
        if not 1 <= count <= len(edits):
            raise UserError(f"--undo={count}: expected from 1 to {len(edits)}, the number of edits")
        gone = [edit.text for edit in edits[-count:]]
        del edits[-count:]
        return gone


def read_rows(tol: TolFile, ids: np.ndarray, overlay: Overlay | None = None) -> np.ndarray:
    """float32 [n, layers, D] of distinct tokens, decoded, with the edits of an overlay; dropped layers are zero."""
    reader = RowReader(tol)
    raw, tier = reader.read(ids)
    reader.close()
    vectors = RowDecoder(tol)(tol.layout.view(raw), tier)
    ffn = [vectors.get(f"ffn.{layer}") for layer in range(tol.layout.layers)]
    if overlay is not None:
        ffn = overlay.apply(overlay.arrays(), jnp.asarray(ids), ffn)
    zeros = np.zeros((len(ids), tol.layout.dim), np.float32)
    return np.stack([zeros if y is None else np.asarray(y, np.float32) for y in ffn], 1)


def key_of(trained: TrainedModel, layer: int, key: int, rows_digest: str) -> tuple[np.ndarray, np.ndarray]:
    """(c_key(t) of every token t [V], v_key [D]) of FFN-M of a layer, float32. Raises: UserError for other weights."""

    params, digest = trained.load(lambda name: trained.is_memory(name) or name == "embedding")
    if digest != rows_digest:
        raise UserError(
            f"--workdir={trained.workdir}: other weights at step {trained.step} than the rows were made from"
        )
    p, c = params["memory"][layer], trained.config

    @jax.jit
    def coefficients(x0_UD):
        q = Norm(c).apply({"params": p["norm"]}, x0_UD).astype(jnp.float32)
        gate, up = (p["ffn"][name][:, key].astype(jnp.float32) for name in ("gate", "up"))
        return swiglu_coefficients(q, gate, up)

    with jax.set_mesh(trained.mesh):
        step, table = 8192, params["embedding"]
        parts = [np.asarray(coefficients(table[i : i + step])) for i in range(0, len(table), step)]
    return np.concatenate(parts), np.asarray(p["ffn"]["down"][key], np.float32)


def _edit(entry: dict, k: int, arrays: dict, tol: TolFile) -> Edit:
    """Edit k of a file. Raises: ValueError, KeyError or TypeError for one that is not whole."""
    names = ("ids", "rows", "coefficients", "value")
    edit = Edit(entry["text"], mix=entry["mix"], layer=entry["layer"], **{n: arrays.get(f"{k}.{n}") for n in names})
    V, L, D = tol.vocab_size, tol.layout.layers, tol.layout.dim
    if edit.layer is None:
        whole = edit.rows.shape == (len(edit.ids), L, D) and len(edit.mix) == len(edit.ids) > 0
        whole = whole and edit.ids.min() >= 0 and edit.ids.max() < V
    else:
        whole = edit.coefficients.shape == (V,) and edit.value.shape == (D,) and 0 <= edit.layer < L
    if not whole:
        raise ValueError(f"edit {k + 1} does not fit {tol.path}")
    return edit


def _fields(operation, spec, count):
    """Comma-separated names; a doubled comma is a comma."""
    fields = [f.replace("\0", ",") for f in spec.replace(",,", "\0").split(",")]
    if len(fields) != count or not all(fields):
        expected = "a token" if count == 1 else f"{count} values with commas between them"
        raise UserError(f"--{operation}={spec}: expected {expected}, found {sum(map(bool, fields))}")
    return fields


def _share(text) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--blend: expected a share from 0 to 1, found {text!r}")
    return share


def apply(tol: TolFile, overlay: Overlay, mesh, output: str) -> str:
    """Writes a copy of the file with the edits in its rows; what no edit touches stays byte by byte.

    Returns: one line on it. Raises: UserError.
    """
    if os.path.exists(output) and os.path.samefile(output, tol.path):
        raise UserError(f"--output={output}: expected another file than the one that is edited")
    source = build.FileSource(tol, mesh, overlay)
    texts = "".join(entry.text for entry in overlay.edits)
    old, new = (tol.metadata["rows_digest"], hashlib.sha256((tol.metadata["rows_digest"] + texts).encode()).hexdigest())
    part = f"{output}.part"
    try:
        shutil.copyfile(tol.path, part)
        with open(part, "r+b") as file:
            header = os.pread(file.fileno(), tol.tensors["rows.0"].start, 0)
            os.pwrite(file.fileno(), header.replace(old.encode(), new.encode()), 0)
            _write_edited(tol, overlay, source, file.fileno())
            os.fsync(file.fileno())
        os.replace(part, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        if os.path.exists(part):
            os.remove(part)
    return f"{output}: {len(overlay.edits)} edits in a copy of {tol.path}"


def _write_edited(tol, overlay, source, fd):
    """Encodes the parts that edits change, token by token, into the rows of a copy."""
    layout, bases = tol.layout, {name: jnp.asarray(tol.basis(name)) for name in tol.layout.rotated}
    changed: dict[int, set[str]] = {}  # token: parts
    for entry in overlay.edits:
        ids = np.nonzero(entry.coefficients)[0] if entry.ids is None else entry.ids
        names = {f"ffn.{layer}" for layer in range(layout.layers)} if entry.ids is not None else {f"ffn.{entry.layer}"}
        for token in ids.tolist():
            changed.setdefault(token, set()).update(names)
    tokens = np.array(sorted(changed, key=lambda token: tol.row_of_token[token]), np.int32)
    reader = RowReader(tol)
    encoders = [jax.jit(functools.partial(codec.encode, tier.parts)) for tier in layout.tiers]
    for start in range(0, len(tokens), CHUNK):
        ids = tokens[start : start + CHUNK]
        raw, tier_U = reader.read(ids)
        vectors = source.vectors(np.pad(ids, (0, CHUNK - len(ids)), mode="edge"))
        encoded = [np.asarray(encode(vectors, bases)) if t.parts else None for encode, t in zip(encoders, layout.tiers)]
        for i, (token, tier) in enumerate(zip(ids.tolist(), tier_U)):
            offset, stride = 0, layout.tiers[tier].stride
            for part in layout.tiers[tier].parts:
                if part.name in changed[token]:
                    raw[i, offset : offset + part.bytes] = encoded[tier][i, offset : offset + part.bytes]
                offset += part.bytes
            row = int(tol.row_of_token[token])
            os.pwrite(fd, raw[i, :stride].tobytes(), int(tol.start_of_row[row]))
            os.pwrite(fd, checksum(raw[i, :stride]).to_bytes(8, "little"), tol.tensors["checksums"].start + 8 * row)
    reader.close()
