"""Nats of every held-out target of a trained model, which all comparisons of a protocol are made from.

All runs of a vocabulary are scored on the same targets, in the same windows, so that differences between them can be
taken target by target. The sums over a document are the units that `intervals` resamples.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import sys
from typing import NamedTuple

import numpy as np

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.common import compile_cache, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.data import document_starts
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.tol import serving

FILE = "heldout.npz"  # in a run's folder
PERMUTED_FILE = "heldout_permuted.npz"


class HeldOutText(NamedTuple):
    """The held-out text of one vocabulary, cut into windows. Its N targets are all its tokens but the first.

    Attributes:
      ids: token ids, int32 [N + 1]; target n is ids[n + 1], and the token before it, ids[n], is its input.
      document_N: number of the document that each target is in, from 0.
      position_N: number of tokens before each target's input in its window.
      bytes_D: bytes of text of each document.
      digest: SHA-256 of ids and context, by which files of scores name the text.
    """

    ids: np.ndarray
    document_N: np.ndarray
    position_N: np.ndarray
    bytes_D: np.ndarray
    digest: str

    @property
    def inputs(self) -> np.ndarray:
        """Ids that the targets are predicted after, int32 [N]."""
        return self.ids[:-1]

    @property
    def targets(self) -> np.ndarray:
        """Ids of the targets, int32 [N]."""
        return self.ids[1:]

    def by_document(self, values_N: np.ndarray) -> np.ndarray:
        """Sums over the targets of each document, float64 [D]."""
        return np.bincount(self.document_N, values_N, len(self.bytes_D))


def open_text(data: Dataset, context: int) -> HeldOutText:
    """Reads the whole validation split of prepared data.

    Args:
      context: tokens that are predicted in a window.
    Raises: UserError if the data is damaged, or its documents do not show where they begin.
    """
    stream = data.validation
    stream.verify([0], stream.tokens)
    ids = stream.read(0, stream.tokens)
    # A target belongs to the document of its input: the last one of a document is the id that ends it.
    begins = ids[:-1] == document_starts.first_id(data, data.path, "data")
    document_N = np.cumsum(begins, dtype=np.int64)
    document_N -= document_N[0]
    digest = hashlib.sha256(ids.astype("<i4").tobytes() + context.to_bytes(8, "little")).hexdigest()
    return HeldOutText(ids, document_N, np.arange(len(ids) - 1) % context, _bytes(ids, document_N, data), digest)


def _bytes(ids: np.ndarray, document_N: np.ndarray, data: Dataset) -> np.ndarray:
    """Bytes of text of each document, which add up to those of the split, float64 [D]."""
    tokenizer = data.tokenizer()
    special = [i for i in (data.bos_id, data.eos_id) if i is not None]
    documents = np.split(ids[1:], np.flatnonzero(np.diff(document_N)) + 1)
    sizes_D = [len(tokenizer.decode(piece[~np.isin(piece, special)]).encode()) for piece in documents]
    # The text was decoded from tokens of a tokenizer that may normalise, for example white space. The sizes of the
    # documents as they were given are known in sum, so that bits per byte do not depend on the tokenizer.
    return np.array(sizes_D) * (data.validation.bytes / max(sum(sizes_D), 1))


def score(workdir: str) -> float:
    """Scores the newest checkpoint of a run on all held-out targets and writes WORKDIR/heldout.npz.

    A model whose rows are its own is scored again with each token reading the row of another one, as with
    `model.rows=permuted`, into WORKDIR/heldout_permuted.npz: what that costs is what the rows say of their tokens.

    Returns: the mean loss in nats a token. Raises: UserError.
    """
    with contextlib.closing(serving.open_engine(workdir)) as engine:
        text = _text(engine)
        if can_permute(engine.config):
            config = dataclasses.replace(engine.config, rows="permuted")
            permuted = engine.changed(LiveRows(config, engine.rows.arrays, engine.trained.mesh), Contribution())
            _write(os.path.join(workdir, PERMUTED_FILE), text, _nats(permuted, text))
        nats_N = _nats(engine, text)
    _write(os.path.join(workdir, FILE), text, nats_N)  # the last, as its presence says that all is scored
    return float(nats_N.mean(dtype=np.float64))


def can_permute(config: ModelConfig) -> bool:
    """Whether a trained model is scored with permuted rows too."""
    return config.row_dim > 0 and config.rows == "own"


def kept(path: str, workdir: str, text: HeldOutText) -> np.ndarray:
    """Nats of every target of a held-out text, float32 [N], by the newest checkpoint of a run.

    Args:
      path: file that keeps them: they are computed only if it is not there.
      text: of any data of the run's tokenizer, in windows of the run's context.
    Raises: UserError.
    """
    if not storage.exists(path):
        with contextlib.closing(serving.open_engine(workdir)) as engine:
            _write(path, text, _nats(engine, text))
    return _read(path, text)


def _text(engine: Engine) -> HeldOutText:
    return open_text(run_data.open_data(engine.trained, run_data.find_own(engine.trained)), engine.context)


def _nats(engine: Engine, text: HeldOutText) -> np.ndarray:
    windows = perplexity.Windows(engine.context, engine.context, first_id=perplexity.first_id(engine))
    pieces = [text.ids[span.start : span.stop] for span in windows.spans(len(text.ids))]
    nats_N = np.concatenate([-found.log_probs_T for found in perplexity.score_windows(engine, pieces, windows)])
    return nats_N.astype(np.float32)


def _write(path: str, text: HeldOutText, nats_N: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, nats=nats_N, digest=np.array(text.digest))
    storage.write_bytes(path, buffer.getvalue())


def is_scored(workdir: str) -> bool:
    """Whether `score` has written its file."""
    return storage.exists(os.path.join(workdir, FILE))


def read(workdir: str, text: HeldOutText, permuted: bool = False) -> np.ndarray:
    """Nats of every held-out target of a run, float32 [N].

    Args:
      text: the text that the run was scored on.
      permuted: those with permuted rows, of a run that `can_permute`.
    Raises: UserError if the file is missing or damaged, or the run was scored on another text.
    """
    return _read(os.path.join(workdir, PERMUTED_FILE if permuted else FILE), text)


def _read(path: str, text: HeldOutText) -> np.ndarray:
    content = storage.read_bytes(path, "a run whose last step was scored")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            nats_N, digest = file["nats"], str(file["digest"])
    except Exception as error:  # NumPy raises several kinds for a damaged file
        raise UserError(f"{path}: expected scores of held-out text, found a damaged file: {error}") from error
    if digest != text.digest or nats_N.shape != text.document_N.shape:
        raise UserError(
            f"{path}: expected scores of the text {text.digest[:12]}, found those of {digest[:12]}; score the run again"
        )
    return nats_N


if __name__ == "__main__":  # the runner scores each run in a process of its own
    compile_cache.use()
    print(f"held-out loss {score(sys.argv[1]):.4f} nats a token")
