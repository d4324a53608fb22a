"""Opening prepared data: what is damaged or missing is named."""

import json
from fractions import Fraction

import numpy as np
import pytest
from lab import read_all

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
    other = tokenizer.train_sentencepiece(lambda: ["Another text that gives another model. " * 99], 300, 1)
    (copied / "tokenizer.model").write_bytes(other.content)
    with pytest.raises(UserError, match="the tokenizer does not match the data"):
        Dataset(str(copied)).tokenizer()


def test_a_folder_without_prepared_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder that `prepare` finished"):
        Dataset(str(tmp_path))


def set_field(tree: dict, place: str, value) -> None:
    """Sets the field at a place such as splits.train.tokens; `...` removes it."""
    *path, last = place.split(".")
    for key in path:
        tree = tree[int(key) if key.isdecimal() else key]
    if value is ...:
        del tree[last]
    else:
        tree[last] = value


FIRST = "splits.train.shards.0"


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("tokenizer", ..., "expected a field tokenizer, found none"),
        ("tokenizer", [1], "tokenizer: expected object, found array"),
        ("tokenizer.bos_id", 512, "expected a bos_id below the vocab_size 512, found 512"),
        (
            "tokenizer.file",
            "../tokenizer.model",
            r"tokenizer.file: expected the name of a file in .*, found '\.\./token",
        ),
        ("format", 9, "format: expected 1, found 9; prepare the data again"),
        ("format", None, "format: expected int, found null"),
        ("vocab_size", 0, "vocab_size: expected int >= 1, found 0"),
        ("vocab_size", 512.5, "vocab_size: expected int, found float"),
        ("vocab_size", 600, "vocab_size: expected the tokenizer's 512, found 600"),
        ("dtype", "float64", "dtype: expected a known value, found 'float64'"),
        ("splits.train.tokens", 5, "splits.train: expected [0-9]+ tokens, the sum over the file shards, found 5"),
        (f"{FIRST}.tokens", -1, r"splits.train.shards\[0\].tokens: expected int >= 0, found -1"),
        (f"{FIRST}.tokens", 10**30, r"splits.train.shards\[0\].tokens: expected int <= 9007199254740992, found 10"),
        (f"{FIRST}.sha256", "ab", r"splits.train.shards\[0\].sha256: expected str matching regex .*, found 'ab'"),
        (f"{FIRST}.file", "/etc/passwd", "a file shard: expected the name of a file in .*, found '/etc/passwd'"),
        (
            f"{FIRST}.file",
            "validation-00000.bin",
            "expected each file shard once, found 'validation-00000.bin' 2 times",
        ),
        (f"{FIRST}.file", "link.bin", "a file shard: expected a file in .*, found 'link.bin', a symbolic link to "),
    ],
)
def test_a_dataset_json_that_cannot_be_trusted_is_refused(copied, tmp_path, place, value, message):
    (tmp_path / "outside.bin").touch()
    (copied / "link.bin").symlink_to(tmp_path / "outside.bin")
    tree = json.loads((copied / "dataset.json").read_text())
    set_field(tree, place, value)
    (copied / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"^{copied}/dataset.json: ({message})"):
        Dataset(str(copied)).tokenizer()


@pytest.mark.parametrize("text", ["[1]", '{"format": 1, ', "[" * 100_000, "", "\xff", '{"format": ' + "9" * 5000 + "}"])
def test_a_dataset_json_that_is_no_description_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"^{tmp_path}/dataset.json: .*expected"):
        Dataset(str(tmp_path))


def test_several_folders_are_one_stream_in_their_order(data_path, swapped, tmp_path):
    """With weights too."""
    one, two = Dataset(data_path), Dataset(str(swapped))
    both, reversed_ = Dataset(f"{data_path},{swapped}"), Dataset(f"{swapped},{data_path}")
    mixed, same, other = (Dataset(f"{data_path}:{a},{swapped}:{b}") for a, b in (("0.7", ".3"), ("7e1", "30"), (1, 1)))
    both.verify()
    for split in ("train", "validation"):
        expected = np.concatenate([read_all(one, split), read_all(two, split)])
        np.testing.assert_array_equal(read_all(both, split), expected)
        np.testing.assert_array_equal(read_all(mixed, split), expected)
        for source, alone in zip(mixed.sources, (one, two)):
            start, tokens, text_bytes = getattr(source, split)
            np.testing.assert_array_equal(expected[start : start + tokens], read_all(alone, split))
            assert text_bytes == getattr(alone, split).bytes
        parts = [getattr(dataset, split) for dataset in (one, two)]
        assert getattr(both, split).bytes == sum(part.bytes for part in parts)
        assert getattr(both, split).documents == sum(part.documents for part in parts)
    assert len({data.digest for data in (one, two, both, reversed_)}) == 4
    assert mixed.digest == both.digest
    assert mixed.shares == same.shares == (Fraction(7, 10), Fraction(3, 10)) and other.shares == (Fraction(1, 2),) * 2
    assert [source.name for source in mixed.sources] == ["prepared", "small"]
    assert both.tokenizer().digest == one.tokenizer().digest

    # The name of a single folder may have a comma.
    (tmp_path / "with, comma").symlink_to(data_path)
    assert Dataset(f"{tmp_path}/with, comma").digest == one.digest


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("tokenizer.digest", "0" * 64, "^COPY: expected data of the same tokenizer as in DATA, found another one's$"),
        ("tokenizer.eos_id", None, "^COPY/dataset.json: tokenizer.eos_id: expected 2 as in DATA, found None$"),
        ("vocab_size", 513, "^COPY/dataset.json: vocab_size: expected 512 as in DATA, found 513$"),
    ],
)
def test_folders_of_different_tokenizers_are_refused(data_path, copied, place, value, message):
    tree = json.loads((copied / "dataset.json").read_text())
    set_field(tree, place, value)
    (copied / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message.replace("COPY", str(copied)).replace("DATA", data_path)):
        Dataset(f"{data_path},{copied}")
