"""The held-out text: the document of each target, and the bytes of that document."""

import numpy as np
import pytest
from lab import CONTEXT, read_all

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import heldout


@pytest.fixture(scope="module")
def data(lab):
    return Dataset(lab.data_path)


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
