"""Where documents begin in a batch, and the share of attention's pairs inside them."""

import types

import numpy as np
import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.training import documents
from memoryllm_jax.training.batches import TrainBatches

BOS, EOS = 1, 2


def dataset(bos, eos):
    return types.SimpleNamespace(bos_id=bos, eos_id=eos, path="DATA")


@pytest.mark.parametrize(
    "bos, eos, expected",
    [
        (BOS, EOS, [0, 0, 0, 3, 3, 3, 3]),
        (BOS, None, [0, 0, 0, 3, 3, 3, 3]),
        (None, EOS, [0, 0, 2, 2, 2, 2, 6]),  # the eos stands before a document, as the bos does
    ],
)
def test_documents_begin_with_bos_or_the_eos_before_them(bos, eos, expected):
    """The first document of a sequence has begun before it."""
    ids = np.array([[7, 8, EOS, BOS, 9, 9, EOS], [BOS, 7, 7, 7, 7, 7, 7]])
    found = documents.starts(ids, documents.first_id(dataset(bos, eos)))
    np.testing.assert_array_equal(found, [expected, np.zeros(7)])
    pairs = sum(t - start + 1 for t, start in enumerate(expected)) + 7 * 8 / 2
    assert documents.attention_share(found) == pytest.approx(pairs / (7 * 8))


def test_without_a_token_between_documents_the_mask_is_refused():
    with pytest.raises(UserError, match=r"config.data.document_mask: expected a tokenizer with bos or eos.* in DATA"):
        documents.first_id(dataset(None, None))


def test_batches_know_their_documents(make_config):
    """In their order in each micro-batch; a plan's share is that of the batches."""
    config = make_config("memory", accumulate=2, seq_len=2048, **{"data.document_mask": True})
    data = Dataset(config.data.path)
    batches = TrainBatches(config, data, 2, [0, 1])
    shares = []
    for step in range(config.steps):
        for shard in batches[step].values():
            start_BT = shard.start_AN.reshape(-1, config.seq_len)
            np.testing.assert_array_equal(
                start_BT, documents.starts(shard.ids_U[shard.index_AN].reshape(-1, config.seq_len), data.bos_id)
            )
            shares.append(documents.attention_share(start_BT))
    assert 0 < np.mean(shares) < 1 == TrainBatches(make_config("memory"), data, 1, [0]).attention_share()
    assert batches.attention_share() == pytest.approx(np.mean(shares))
