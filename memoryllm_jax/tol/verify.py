"""Checks whole ToL files against their checksums and the weights, and compares two files."""

import contextlib
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.tol.edited_rows import EditedSource
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.memory import FileMemory
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.sources import FileSource, LiveSource, Source

_CHUNK_ROWS = 512  # rows that are read and compared at a time
_CHUNK_BYTES = 64 << 20  # bytes that the rows read at a time take, at most
_TINY = 1e-30  # the least norm to divide by: no difference over a norm of zero is zero, not NaN


def check_file(tol: TolFile) -> None:
    """Reads every row and every other tensor. Raises: UserError that names the damaged tokens or tensor."""
    tol.verify()
    tol.tokenizer()
    damaged = damaged_tokens(tol)
    if damaged:
        named = ", ".join(f"#{token}" for token in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        raise UserError(f"{tol.path}: the checksums of {len(damaged)} of {tol.vocab_size} rows differ: tokens {named}")


def damaged_tokens(tol: TolFile) -> list[int]:
    """Ids of the tokens whose rows do not match their checksums."""
    found: list[int] = []

    # The reader asks for repairs of damaged rows. Empty rows leave its buffer, which nobody uses, as it is.
    def note(ids):
        found.extend(ids.tolist())
        return [np.empty(0, np.uint8)] * len(ids)

    reader = RowReader(tol, repair=note)
    progress = Progress("verify", tol.vocab_size, "row")
    size = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // max(tol.layout.stride, 1)))
    for chunk in vocabulary.chunks(tol.token_of_row(), size):
        reader.read(chunk.real_ids)
        progress.update(chunk.stop)
    progress.close()
    reader.close()
    return found


def compare_with_weights(tol: TolFile, workdir: str) -> "Comparison":
    """Compares a file's rows with the output of the checkpoint's FFN-M.

    Args:
      workdir: folder with the model's checkpoints.
    Raises: UserError if the file was made from other weights.
    """
    with contextlib.closing(TrainedModel(workdir, tol.step, tol.metadata["dtype"])) as trained:
        live = LiveSource(trained)
        tol.check_model(trained.config, trained.tokenizer.digest, live.identity.decoder_digest)
        if live.identity.rows_digest != tol.metadata["rows_digest"]:
            raise UserError(f"{tol.path}: made from other weights than {workdir} has, or edited")
        with contextlib.closing(FileSource(tol)) as source:
            return compare(live, source)


def compare_files(tol: TolFile, other: TolFile, overlay_path: str = "") -> "Comparison":
    """Compares the rows of two files.

    Args:
      tol: the first file.
      other: the second file.
      overlay_path: path of an overlay of `tol`, whose edits are applied to the second file's rows; or "".
    Raises: UserError if the two files do not fit each other.
    """
    overlay = Overlay.open(overlay_path, FileMemory(tol)) if overlay_path else None
    if other.vocab_size != tol.vocab_size or other.layout.layers != tol.layout.layers:
        raise UserError(f"{other.path}: expected the vocabulary and layers of {tol.path}")
    with contextlib.closing(FileSource(tol)) as first, contextlib.closing(FileSource(other)) as second:
        return compare(first, EditedSource(second, overlay) if overlay else second)


class Change(NamedTuple):
    """How the two rows of a token differ.

    Attributes:
      token: the token's id.
      share: norm of the difference over norm of the first row.
      part: name of the part with the largest difference.
    """

    token: int
    share: float
    part: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How the rows of two sources differ.

    Attributes:
      difference: {part name: float32 [V]}, L2 norm of the difference for each token.
      norm: {part name: float32 [V]}, L2 norm of the first source's row for each token.
    """

    difference: dict[str, np.ndarray]
    norm: dict[str, np.ndarray]

    @property
    def by_part(self) -> dict[str, float]:
        """{part name: norm of the difference over norm of the first source's rows, all tokens together}."""
        return {
            name: float(np.linalg.norm(difference_V) / max(np.linalg.norm(self.norm[name]), _TINY))
            for name, difference_V in self.difference.items()
        }

    @property
    def changed(self) -> int:
        """Number of tokens whose rows differ."""
        return int((_over_parts(self.difference) > 0).sum())

    def most(self, count: int) -> list[Change]:
        """The `count` tokens whose rows differ most, or fewer where fewer differ, in falling order of their share."""
        difference_V = _over_parts(self.difference)
        share_V = difference_V / np.maximum(_over_parts(self.norm), _TINY)
        names = list(self.difference)
        worst_V = np.stack([self.difference[name] for name in names]).argmax(0)
        top = [token for token in np.argsort(-share_V, kind="stable")[:count] if difference_V[token] > 0]
        return [Change(int(token), float(share_V[token]), names[worst_V[token]]) for token in top]


def describe(result: Comparison, tol: TolFile, top: int) -> list[str]:
    """The comparison as lines of text: how much each part differs, and the `top` tokens that differ most."""
    lines = [f"{result.changed:,} of {tol.vocab_size:,} tokens differ; norm of the difference over norm, by part:"]
    lines.append("  " + "  ".join(f"{name} {error:.3g}" for name, error in result.by_part.items()))
    tokenizer = tol.tokenizer()
    for token, share, part in result.most(top):
        lines.append(f"  #{token} {tokenizer.decode([token])!r}: {share:.3g}, most in {part}")
    return lines


def _over_parts(norms: dict[str, np.ndarray]) -> np.ndarray:
    """L2 norms [V] of whole rows, from those of their parts."""
    return np.sqrt(sum(np.square(norm_V) for norm_V in norms.values()))


def compare(first: Source, second: Source) -> Comparison:
    """Compares two sources row by row. Raises: UserError if their rows are of different kinds."""
    if first.has_x0 != second.has_x0 or first.dim != second.dim:
        raise UserError("expected rows of one width, both with or both without the embedding, found different ones")
    names = (["x0"] if first.has_x0 else []) + [f"ffn.{layer}" for layer in range(first.layers)]

    @jax.jit
    def norms(a, b):
        difference, size = {}, {}
        for name in names:
            first_UD = a[name].astype(jnp.float32)
            second_UD = b[name].astype(jnp.float32)
            difference[name] = jnp.linalg.norm(first_UD - second_UD, axis=1)
            size[name] = jnp.linalg.norm(first_UD, axis=1)
        return difference, size

    differences, sizes = [], []
    progress = Progress("compare", first.vocab_size, "row")
    for chunk in vocabulary.chunks(np.arange(first.vocab_size), _CHUNK_ROWS):
        difference, size = jax.device_get(norms(first.vectors(chunk.ids), second.vectors(chunk.ids)))
        differences.append(difference)
        sizes.append(size)
        progress.update(chunk.stop)
    progress.close()

    def joined(pieces):
        # The last chunk repeats its last token, which is cut off.
        return {name: np.concatenate([piece[name] for piece in pieces])[: first.vocab_size] for name in names}

    return Comparison(joined(differences), joined(sizes))
