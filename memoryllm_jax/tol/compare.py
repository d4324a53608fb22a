"""Whole ToL files against their checksums, against each other, and with edits applied."""

import dataclasses
import functools
import hashlib
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax import cli
from memoryllm_jax.cli import UserError
from memoryllm_jax.tol import build, codec
from memoryllm_jax.tol.edit import Overlay
from memoryllm_jax.tol.format import TolFile, checksum
from memoryllm_jax.tol.read import RowReader

_CHUNK = 512  # tokens compared at a time


def damaged(tol: TolFile) -> list[int]:
    """Tokens whose rows do not match their checksums."""
    found: list[int] = []

    def note(ids):
        found.extend(ids.tolist())
        return [np.empty(0, np.uint8)] * len(ids)

    reader = RowReader(tol, repair=note)
    tokens = tol.token_of_row()
    progress = cli.Progress("verify", tol.vocab_size, "row")
    for start in range(0, tol.vocab_size, _CHUNK):
        reader.read(tokens[start : start + _CHUNK])
        progress.update(min(start + _CHUNK, tol.vocab_size))
    progress.close()
    reader.close()
    return found


@dataclasses.dataclass(frozen=True)
class Comparison:
    """difference, norm: {part name: [V]} L2 norms of two files' difference, and of the first."""

    difference: dict[str, np.ndarray]
    norm: dict[str, np.ndarray]

    @property
    def by_part(self) -> dict[str, float]:
        """Difference over norm of each part, over all tokens."""
        return {
            k: float(np.linalg.norm(d) / max(np.linalg.norm(self.norm[k]), 1e-30)) for k, d in self.difference.items()
        }

    def _all(self, arrays):
        return np.sqrt(sum(np.square(a) for a in arrays.values()))

    @property
    def changed(self) -> int:
        return int((self._all(self.difference) > 0).sum())

    def most(self, count: int) -> list[tuple[int, float, str]]:
        """(token, difference over norm, part that differs most) of the tokens that differ most."""
        total = self._all(self.difference)
        share = total / np.maximum(self._all(self.norm), 1e-30)
        names = list(self.difference)
        top = [t for t in np.argsort(-share, kind="stable")[:count] if total[t] > 0]
        worst = np.stack([self.difference[n] for n in names]).argmax(0)
        return [(int(t), float(share[t]), names[worst[t]]) for t in top]


def compare(first, second) -> Comparison:
    """Row by row; the sources are those of tol/build.py."""
    if first.has_x0 != second.has_x0 or first.dim != second.dim:
        raise UserError("the two hold rows of different kinds: other widths, or the embedding in one only")

    @jax.jit
    def norms(a, b):
        names = sorted(a, key=lambda n: -1 if n == "x0" else int(n[4:]))
        f32 = lambda x: x.astype(jnp.float32)  # noqa: E731
        return {n: (jnp.linalg.norm(f32(a[n]) - f32(b[n]), axis=1), jnp.linalg.norm(f32(a[n]), axis=1)) for n in names}

    pieces = []
    progress = cli.Progress("compare", first.vocab_size, "row")
    for start in range(0, first.vocab_size, _CHUNK):
        ids = np.minimum(np.arange(start, start + _CHUNK, dtype=np.int32), first.vocab_size - 1)
        pieces.append(jax.device_get(norms(first.vectors(ids), second.vectors(ids))))
        progress.update(min(start + _CHUNK, first.vocab_size))
    progress.close()

    def joined(k):
        names = sorted(pieces[0], key=lambda n: -1 if n == "x0" else int(n[4:]))
        return {n: np.concatenate([p[n][k] for p in pieces])[: first.vocab_size] for n in names}

    return Comparison(joined(0), joined(1))


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
    for start in range(0, len(tokens), _CHUNK):
        ids = tokens[start : start + _CHUNK]
        raw, tier_U = reader.read(ids)
        vectors = source.vectors(np.pad(ids, (0, _CHUNK - len(ids)), mode="edge"))
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
