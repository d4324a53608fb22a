"""Held-out scores: sums of what `perplexity` gives each target."""

import shutil

import numpy as np
import pytest
from lab import CONTEXT

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.experiments import heldout, scoring, splits
from memoryllm_jax.inference.engine import Contribution
from memoryllm_jax.model import memories
from memoryllm_jax.model.token_memory import TokenRows

ROUNDED = 1 / 16  # nats: the most that rounding changes a sum by


@pytest.fixture(scope="module")
def text(lab):
    return heldout.open_text(Dataset(lab.data_path), CONTEXT)


@pytest.fixture
def run(lab, tmp_path):
    """A folder with the checkpoint of a trained model, in which a test may write."""
    return str(shutil.copytree(lab.workdir("memory"), tmp_path / "run"))


class _OthersRows:
    """The rows of other tokens, beside the embeddings of their own."""

    def __init__(self, live, permutation_V):
        self._live, self._permutation_V = live, permutation_V

    def fetch(self, ids_U):
        x0_1UD, _ = self._live.fetch(ids_U)
        return TokenRows(x0_1UD, self._live.fetch(self._permutation_V[ids_U])[1])


def test_scores_are_sums_of_what_perplexity_gives(lab, text, run):
    mean = scoring.score(run)
    scores = scoring.read(run, text)
    windows = perplexity.Windows(CONTEXT, CONTEXT)
    with lab.model("memory") as model:
        stream = perplexity.prepared_text(lab.data_path, "validation", model.tokenizer, windows)
        expected = perplexity.perplexity(model, stream, windows)
        nats_N = scoring._nats(model, text)
    assert text.targets.shape == (expected["tokens"],) and mean == pytest.approx(expected["loss"], rel=1e-6)
    for part in expected["by_context"]:
        chosen_N = (part["from"] <= text.position_N + 1) & (text.position_N + 1 <= part["to"])
        assert nats_N[chosen_N].mean() == pytest.approx(part["loss"], rel=1e-5)
    sums = scoring.sums(nats_N, text, splits.of_text(text, Dataset(lab.data_path)))
    assert scores.keys() == sums.keys() == {scoring.ALL, "input", "target", "position", "bigram"}
    for name, values in sums.items():
        np.testing.assert_allclose(scores[name], values, rtol=0, atol=ROUNDED + 1e-3)


def test_permuted_rows_are_those_of_other_tokens(lab, text, run):
    scoring.score(run)
    permuted = scoring.read(run, text, permuted=True)[scoring.ALL]
    with lab.model("memory") as model:
        rows = _OthersRows(model.rows, memories._permutation(model.config.vocab_size))
        expected_N = scoring._nats(model.changed(rows, Contribution()), text)
    np.testing.assert_allclose(permuted[0], text.by_document(expected_N), rtol=0, atol=ROUNDED + 1e-2)
    own = scoring.read(run, text)[scoring.ALL]
    assert permuted.sum() > own.sum()
    kept = f"{run}/kept.npz"
    assert (scoring.kept(kept, run, text) == own[0]).all()
    assert (scoring.kept(kept, "no workdir", text) == own[0]).all()  # read, and not computed again


def test_another_text_or_a_damaged_file_is_refused(lab, text, run):
    with pytest.raises(UserError, match=r"heldout\.npz: expected a run whose last step was scored"):
        scoring.read(run, text)
    np.savez(f"{run}/heldout.npz", digest=text.digest, all=np.zeros((1, 3), "f"))
    with pytest.raises(UserError, match=r"heldout\.npz: expected scores of the text .*, found those of"):
        scoring.read(run, heldout.open_text(Dataset(lab.data_path), CONTEXT + 1))
    with open(f"{run}/heldout.npz", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"heldout\.npz: expected scores of held-out text, found a damaged file"):
        scoring.read(run, text)
