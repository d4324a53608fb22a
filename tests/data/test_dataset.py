"""Prepared data read back; damage is named."""

import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import tokenizer
from memoryllm_jax.data.dataset import Dataset


def test_damaged_data_is_named(copied):
    shard = next(copied.glob("train-*.bin"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"\x01" + whole[101:])
    dataset = Dataset(str(copied))
    with pytest.raises(UserError, match=rf"{shard.name}: checksum differs"):
        dataset.verify()
    shard.write_bytes(whole[:200] + (600).to_bytes(2, "little") + whole[202:])
    with pytest.raises(UserError, match=rf"{shard.name}: token 100: expected an id below 512, found 600"):
        Dataset(str(copied)).train.read(0, 1000)
    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=rf"{shard.name}: expected {len(whole)} bytes, found {len(whole) - 2}"):
        Dataset(str(copied))
    shard.write_bytes(whole)
    other = tokenizer.train_sentencepiece(iter(["Another text that gives another model. " * 99]), 300, 1)
    (copied / "tokenizer.model").write_bytes(other.content)
    with pytest.raises(UserError, match="the tokenizer does not match the data"):
        Dataset(str(copied)).tokenizer()
    with pytest.raises(UserError, match="expected a folder that `prepare` finished"):
        Dataset(str(copied.parent))
