"""Held-out scores: each target as `perplexity` scores it, its document, and the bytes of that document."""

import shutil

import numpy as np
import pytest
from lab import CONTEXT, read_all

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.experiments import heldout
from memoryllm_jax.inference.engine import Contribution
from memoryllm_jax.model import memories
from memoryllm_jax.model.token_memory import TokenRows


@pytest.fixture(scope="module")
def data(lab):
    return Dataset(lab.data_path)


@pytest.fixture
def run(lab, tmp_path):
    """A folder with the checkpoint of a trained model, in which a test may write."""
    return str(shutil.copytree(lab.workdir("memory"), tmp_path / "run"))


def test_targets_are_scored_as_perplexity_scores_them(lab, data, run):
    mean = heldout.score(run)
    text = heldout.open_text(data, CONTEXT)
    nats_N = heldout.read(run, text)
    windows = perplexity.Windows(CONTEXT, CONTEXT)
    with lab.model("memory") as model:
        stream = perplexity.prepared_text(lab.data_path, "validation", model.tokenizer, windows)
        expected = perplexity.perplexity(model, stream, windows)
    assert nats_N.shape == text.targets.shape == (expected["tokens"],)
    assert nats_N.mean() == pytest.approx(mean, rel=1e-6) and mean == pytest.approx(expected["loss"], rel=1e-6)
    for part in expected["by_context"]:
        chosen_N = (part["from"] <= text.position_N + 1) & (text.position_N + 1 <= part["to"])
        assert nats_N[chosen_N].mean() == pytest.approx(part["loss"], rel=1e-5)


class _OthersRows:
    """The rows of other tokens, beside the embeddings of their own."""

    def __init__(self, live, permutation_V):
        self._live, self._permutation_V = live, permutation_V

    def fetch(self, ids_U):
        x0_1UD, _ = self._live.fetch(ids_U)
        return TokenRows(x0_1UD, self._live.fetch(self._permutation_V[ids_U])[1])


def test_permuted_rows_are_those_of_other_tokens(lab, data, run):
    heldout.score(run)
    text = heldout.open_text(data, CONTEXT)
    permuted_N = heldout.read(run, text, permuted=True)
    with lab.model("memory") as model:
        rows = _OthersRows(model.rows, memories._permutation(model.config.vocab_size))
        expected_N = heldout._nats(model.changed(rows, Contribution()), text)
    np.testing.assert_allclose(permuted_N, expected_N, rtol=1e-5, atol=1e-5)
    assert permuted_N.mean() > heldout.read(run, text).mean()
    kept = f"{run}/kept.npz"
    assert (heldout.kept(kept, run, text) == heldout.read(run, text)).all()
    assert (heldout.kept(kept, "no workdir", text) == heldout.read(run, text)).all()  # read, and not computed again


def test_another_text_or_a_damaged_file_is_refused(data, run):
    text = heldout.open_text(data, CONTEXT)
    with pytest.raises(UserError, match=r"heldout\.npz: expected a run whose last step was scored"):
        heldout.read(run, text)
    np.savez(f"{run}/heldout.npz", nats=np.zeros(len(text.document_N), "f"), digest=np.array(text.digest))
    with pytest.raises(UserError, match=r"heldout\.npz: expected scores of the text .*, found those of"):
        heldout.read(run, heldout.open_text(data, CONTEXT + 1))
    with open(f"{run}/heldout.npz", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"heldout\.npz: expected scores of held-out text, found a damaged file"):
        heldout.read(run, text)


def test_targets_are_added_up_by_document(data):
    text = heldout.open_text(data, CONTEXT)
    documents, ids = [], read_all(data, "validation").tolist()
    for i in ids[:-1]:
        if i == data.bos_id:
            documents.append(0)
        documents[-1] += 1  # the target after i
    assert text.by_document(np.ones(len(text.document_N))).tolist() == documents
    assert len(documents) == data.validation.documents
    assert text.bytes_D.sum() == pytest.approx(data.validation.bytes)
    first = data.tokenizer().decode(ids[1 : ids.index(data.eos_id)])
    assert text.bytes_D[0] == pytest.approx(len(first.encode()), rel=0.01)
