"""Whole ToL files against their checksums, against each other, and with edits applied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.reader import RowReader

CHUNK = 512  # tokens compared at a time


def damaged(tol: TolFile) -> list[int]:
    """Tokens whose rows do not match their checksums."""
    found: list[int] = []

    def note(ids):
        found.extend(ids.tolist())
        return [np.empty(0, np.uint8)] * len(ids)

    reader = RowReader(tol, repair=note)
    tokens = tol.token_of_row()
    progress = Progress("verify", tol.vocab_size, "row")
    for start in range(0, tol.vocab_size, CHUNK):
        reader.read(tokens[start : start + CHUNK])
        progress.update(min(start + CHUNK, tol.vocab_size))
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
    progress = Progress("compare", first.vocab_size, "row")
    for start in range(0, first.vocab_size, CHUNK):
        ids = np.minimum(np.arange(start, start + CHUNK, dtype=np.int32), first.vocab_size - 1)
        pieces.append(jax.device_get(norms(first.vectors(ids), second.vectors(ids))))
        progress.update(min(start + CHUNK, first.vocab_size))
    progress.close()

    def joined(k):
        names = sorted(pieces[0], key=lambda n: -1 if n == "x0" else int(n[4:]))
        return {n: np.concatenate([p[n][k] for p in pieces])[: first.vocab_size] for n in names}

    return Comparison(joined(0), joined(1))
