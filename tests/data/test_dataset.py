"""Opening prepared data: what is damaged or missing is named."""

import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import tokenizer
from memoryllm_jax.data.dataset import Dataset


@pytest.fixture
def shard(copied):
    """A file shard of the copied data."""
    return next(copied.glob("train-*.bin"))


def test_verify_finds_a_changed_byte(copied, shard):
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"\x01" + whole[101:])
    dataset = Dataset(str(copied))
    with pytest.raises(UserError, match=rf"{shard.name}: checksum differs"):
        dataset.verify()


def test_an_id_outside_the_vocabulary_is_refused(copied, shard):
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + (600).to_bytes(2, "little") + whole[202:])
    with pytest.raises(UserError, match=rf"{shard.name}: token 100: expected an id below 512, found 600"):
        Dataset(str(copied)).train.read(0, 1000)


def test_a_file_shard_of_another_size_is_refused(copied, shard):
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=rf"{shard.name}: expected {len(whole)} bytes, found {len(whole) - 2}"):
        Dataset(str(copied))


def test_another_tokenizer_beside_the_file_shards_is_refused(copied):
    other = tokenizer.train_sentencepiece(iter(["Another text that gives another model. " * 99]), 300, 1)
    (copied / "tokenizer.model").write_bytes(other.content)
    with pytest.raises(UserError, match="the tokenizer does not match the data"):
        Dataset(str(copied)).tokenizer()


def test_a_folder_without_prepared_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder that `prepare` finished"):
        Dataset(str(tmp_path))


@pytest.mark.parametrize(
    "tree, message",
    [
        ('{"vocab_size": 512}', r"dataset.json: expected a field 'tokenizer', found none$"),
        ("[1]", r"dataset.json: expected the fields that `prepare` writes: list indices"),
    ],
)
def test_a_dataset_json_without_the_fields_is_refused(tmp_path, tree, message):
    (tmp_path / "dataset.json").write_text(tree)
    with pytest.raises(UserError, match=message):
        Dataset(str(tmp_path))
