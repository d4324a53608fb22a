"""Held-out scores of trained models, which all comparisons of a protocol are made from.

A score is the nats of a model summed over the targets of each document, of all targets and of each group of `splits`.
Documents are the units that `intervals` resamples. So the scores of a run are small enough to be kept as a record of
it, when its model is gone.
"""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Sequence

import numpy as np

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.common import compile_cache, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.experiments import heldout, splits
from memoryllm_jax.experiments.heldout import HeldOutText
from memoryllm_jax.experiments.splits import Split
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.tol import serving

FILE = "heldout.npz"  # in a run's folder
PERMUTED_FILE = "heldout_permuted.npz"
ALL = "all"  # the name of the sums over all targets, beside those of splits
_UNIT = 1 / 8  # nats: files have whole numbers of it, which are packed into half the bytes of floats
Scores = dict[str, np.ndarray]  # {name of a split, or ALL: nats by group and document, [groups, D]}


def sums(values_N: np.ndarray, text: HeldOutText, groups: Sequence[Split]) -> Scores:
    """Adds up values of the targets by document, and by group and document of each split."""
    by_split = {split.name: split.by_document(values_N, text) for split in groups}
    return {ALL: text.by_document(values_N)[None]} | by_split


def score(workdir: str) -> float:
    """Scores the newest checkpoint of a run on all held-out targets and writes WORKDIR/heldout.npz.

    A model whose rows are its own is scored again with each token reading the row of another one, as with
    `model.rows=permuted`, into WORKDIR/heldout_permuted.npz: what that costs is what the rows say of their tokens.
    These scores have no groups.

    Returns: the mean loss in nats a token. Raises: UserError.
    """
    with contextlib.closing(serving.open_engine(workdir)) as engine:
        data = run_data.open_data(engine.trained, run_data.find_own(engine.trained))
        text = heldout.open_text(data, engine.context)
        groups = splits.of_text(text, data)
        if can_permute(engine.config):
            config = dataclasses.replace(engine.config, rows="permuted")
            permuted = engine.changed(LiveRows(config, engine.rows.arrays, engine.trained.mesh), Contribution())
            _write(os.path.join(workdir, PERMUTED_FILE), text, sums(_nats(permuted, text), text, ()))
        nats_N = _nats(engine, text)
    # The last, as its presence says that all is scored
    _write(os.path.join(workdir, FILE), text, sums(nats_N, text, groups))
    return float(nats_N.mean(dtype=np.float64))


def can_permute(config: ModelConfig) -> bool:
    """Whether a trained model is scored with permuted rows too."""
    return config.row_dim > 0 and config.rows == "own"


def kept(path: str, workdir: str, text: HeldOutText) -> np.ndarray:
    """Nats of each document of a held-out text, [D], by the newest checkpoint of a run.

    Args:
      path: file that keeps them: they are computed only if it is not there.
      text: of any data of the run's tokenizer, in windows of the run's context.
    Raises: UserError.
    """
    if not storage.exists(path):
        with contextlib.closing(serving.open_engine(workdir)) as engine:
            _write(path, text, sums(_nats(engine, text), text, ()))
    return _read(path, text)[ALL][0]


def _nats(engine: Engine, text: HeldOutText) -> np.ndarray:
    """Nats of every target, float32 [N]."""
    windows = perplexity.Windows(engine.context, engine.context, first_id=perplexity.first_id(engine))
    pieces = [text.ids[span.start : span.stop] for span in windows.spans(len(text.ids))]
    nats_N = np.concatenate([-found.log_probs_T for found in perplexity.score_windows(engine, pieces, windows)])
    return nats_N.astype(np.float32)


def _write(path: str, text: HeldOutText, scores: Scores) -> None:
    whole = {name: np.round(values / _UNIT).astype(np.uint32) for name, values in scores.items()}
    buffer = io.BytesIO()
    np.savez(buffer, digest=np.array(text.digest), **whole)
    storage.write_bytes(path, buffer.getvalue())


def is_scored(workdir: str) -> bool:
    """Whether `score` has written its file."""
    return storage.exists(os.path.join(workdir, FILE))


def read(workdir: str, text: HeldOutText, permuted: bool = False) -> Scores:
    """The scores of a run, to an eighth of a nat.

    Args:
      text: the text that the run was scored on.
      permuted: those with permuted rows, of a run that `can_permute`.
    Raises: UserError if the file is missing or damaged, or the run was scored on another text.
    """
    return _read(os.path.join(workdir, PERMUTED_FILE if permuted else FILE), text)


def _read(path: str, text: HeldOutText) -> Scores:
    content = storage.read_bytes(path, "a run whose last step was scored")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            digest = str(file["digest"])
            scores = {name: file[name] * _UNIT for name in file.files if name != "digest"}
    except Exception as error:  # NumPy raises several kinds for a damaged file
        raise UserError(f"{path}: expected scores of held-out text, found a damaged file: {error}") from error
    if digest != text.digest:
        raise UserError(
            f"{path}: expected scores of the text {text.digest[:12]}, found those of {digest[:12]}; score the run again"
        )
    return scores


if __name__ == "__main__":  # the runner scores each run in a process of its own
    compile_cache.use()
    print(f"held-out loss {score(sys.argv[1]):.4f} nats a token")
