"""Where documents begin in windows and batches, and the share of attention's pairs inside them."""

import itertools
import types

import numpy as np
import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import document_starts
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.training.batches import TrainBatches

BOS, EOS = 1, 2


def dataset(bos, eos):
    return types.SimpleNamespace(bos_id=bos, eos_id=eos)


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
    found = document_starts.starts(ids, document_starts.first_id(dataset(bos, eos), "DATA"))
    np.testing.assert_array_equal(found, [expected, np.zeros(7)])
    pairs = sum(t - start + 1 for t, start in enumerate(expected)) + 7 * 8 / 2
    assert document_starts.attention_share(found) == pytest.approx(pairs / (7 * 8))
    pieces = document_starts.split(np.append(ids[0], BOS), document_starts.first_id(dataset(bos, eos), "DATA"))
    bounds = [*sorted(set(expected)), 7]  # the last id is a target only
    assert [piece.tolist() for piece in pieces] == [
        [*ids[0].tolist(), BOS][a : b + 1] for a, b in itertools.pairwise(bounds)
    ]


def test_without_a_token_between_documents_the_mask_is_refused():
    with pytest.raises(
        UserError, match=r"config.data.document_mask: expected a tokenizer with bos or eos.* found neither in DATA"
    ):
        document_starts.first_id(dataset(None, None), "DATA")


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
                start_BT, document_starts.starts(shard.ids_U[shard.index_AN].reshape(-1, config.seq_len), data.bos_id)
            )
            shares.append(document_starts.attention_share(start_BT))
    assert 0 < np.mean(shares) < 1 == TrainBatches(make_config("memory"), data, 1, [0]).attention_share()
    assert batches.attention_share() == pytest.approx(np.mean(shares))
