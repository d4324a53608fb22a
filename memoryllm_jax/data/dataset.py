"""Prepared data: folders with file shards of tokens that `prepare` wrote, and dataset.json, which describes them.

No JAX.
"""

import collections
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.records import Count, Record, Size
from memoryllm_jax.data import mixture
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.stream import Tokens
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.data.verification import FileShard, Sha256, Verification

FORMAT = 1  # version of dataset.json and the file shards
SPLITS = ("train", "validation")
Split = Annotated[str, Option("split of the prepared data", choices=SPLITS)]


TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class ShardRecord(Record):
    """A file shard, as dataset.json describes it.

    file: its name in the folder.
    documents, tokens, bytes: numbers of documents, of tokens, and of bytes of their text.
    sha256: checksum of the file.
    """

    file: str
    documents: Count
    tokens: Count
    bytes: Count
    sha256: Sha256


class SplitRecord(Record):
    """A split: its file shards in the order of the stream, and the sums over them."""

    documents: Count
    tokens: Count
    bytes: Count
    shards: tuple[ShardRecord, ...]

    def __post_init__(self):
        for field in ("documents", "tokens", "bytes"):
            total, found = sum(getattr(shard, field) for shard in self.shards), getattr(self, field)
            if found != total:
                raise ValueError(f"expected {total} {field}, the sum over the file shards, found {found}")


class SplitRecords(Record):
    """Both splits."""

    train: SplitRecord
    validation: SplitRecord


class TokenizerRecord(Record):
    """The tokenizer that made the data.

    kind: how `tokenizer.load` reads the file.
    file: its name in the folder.
    digest: SHA-256 of the file.
    bos_id, eos_id: ids before and after each document; None if there are none.
    special_tokens_in_text: as of `tokenizer.load`; None in data of version 0.1.0.
    """

    kind: Literal["sentencepiece", "llama3", "hf"]
    file: str
    digest: Sha256
    bos_id: TokenId | None
    eos_id: TokenId | None
    special_tokens_in_text: tokenizer_lib.SpecialTokens | None = None


class DatasetRecord(Record):
    """The contents of dataset.json.

    format: FORMAT.
    vocab_size: number of token ids.
    dtype: type of the token ids in the file shards, which are little-endian.
    skipped_records: {cause: number of records without text that `prepare` skipped}.
    """

    format: Count
    tokenizer: TokenizerRecord
    vocab_size: Size
    dtype: Literal["uint16", "uint32"]
    splits: SplitRecords
    skipped_records: dict[str, Count] = msgspec.field(default_factory=dict)

    def __post_init__(self):
        for name in ("bos_id", "eos_id"):
            token = getattr(self.tokenizer, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"expected a {name} below the vocab_size {self.vocab_size}, found {token}")
        files = collections.Counter(shard.file for shard in self.all_shards())
        for file, count in files.items():
            if count > 1:
                raise ValueError(f"expected each file shard once, found {file!r} {count} times")

    def all_shards(self) -> tuple[ShardRecord, ...]:
        """The file shards of both splits."""
        return self.splits.train.shards + self.splits.validation.shards


class _Version(Record):
    """The version alone, as the other fields depend on it."""

    format: Count


def read_record(folder: str) -> DatasetRecord:
    """Reads dataset.json of a folder or URL, whose files must lie in the folder. Raises: UserError."""
    path, expected = os.path.join(folder, "dataset.json"), "a folder that `prepare` finished"
    content = storage.read_bytes(path, expected)
    version = records.parse(_Version, content, path, expected).format
    if version != FORMAT:
        raise UserError(f"{path}: format: expected {FORMAT}, found {version}; prepare the data again")
    record = records.parse(DatasetRecord, content, path, expected)
    storage.inside(folder, record.tokenizer.file, f"{path}: tokenizer.file")
    for shard in record.all_shards():
        storage.inside(folder, shard.file, f"{path}: a file shard")
    return record


def load_tokenizer(folder: str, expected: TokenizerRecord) -> Tokenizer:
    """The tokenizer in a folder of prepared data. Raises: UserError if it has another checksum than recorded."""
    path = storage.inside(folder, expected.file, f"{folder}: the tokenizer's file")
    # Before the tokenizer library reads the file: it may refuse a damaged one with a message of its own.
    found = storage.sha256(path)
    if found != expected.digest:
        raise UserError(
            f"{path}: the tokenizer does not match the data: "
            f"expected SHA-256 {expected.digest[:12]}..., found {found[:12]}..."
        )
    special = expected.special_tokens_in_text or tokenizer_lib.default_special_tokens(expected.kind)
    model = tokenizer_lib.load(f"{expected.kind}:{path}", special)
    if model.kind == "hf":
        # `prepare` may have read bos and eos from a tokenizer_config.json, which is not beside the file shards.
        model.name_special(expected.bos_id, [] if expected.eos_id is None else [expected.eos_id])
    return model


class _Folder:
    """One folder that `prepare` wrote, or a copy of it behind a URL.

    Attributes:
      record: the contents of dataset.json.
      digest: SHA-256 over the checksums of the tokenizer and of all file shards.
      shards: {split: its file shards}.
    Raises: UserError if files are missing or have another size than recorded.
    """

    def __init__(self, path: str):
        self.path, self.record = path, read_record(path)
        checksums = [shard.sha256 for shard in self.record.all_shards()]
        self.digest = _digest([self.record.tokenizer.digest, *checksums])
        dtype = np.dtype(self.record.dtype).newbyteorder("<")
        fs, root = storage.filesystem(path)
        files = storage.files(path)
        self.shards: dict[str, list[FileShard]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            for shard in self.split(split).shards:
                where = os.path.join(path, shard.file)
                found, expected = files.get(shard.file), shard.tokens * dtype.itemsize
                if found is None or found.size != expected:
                    raise UserError(f"{where}: expected {expected} bytes, found {found.size if found else 'no file'}")
                name = os.path.join(root, shard.file)
                opened = FileShard(where, fs, name, dtype, shard.tokens, shard.sha256, found.version)
                self.shards[split].append(opened)

    def split(self, name: str) -> SplitRecord:
        """The record of a split."""
        return getattr(self.record.splits, name)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data. Raises: UserError if the file has another checksum than recorded."""
        model, size = load_tokenizer(self.path, self.record.tokenizer), self.record.vocab_size
        if model.vocab_size != size:
            where = os.path.join(self.path, "dataset.json")
            raise UserError(f"{where}: vocab_size: expected the tokenizer's {model.vocab_size}, found {size}")
        return model


class Span(NamedTuple):
    """What a source has of a split.

    start: position of its first token in the split's stream.
    tokens, bytes: numbers of its tokens, and of bytes of their text.
    """

    start: int
    tokens: int
    bytes: int


class Source(NamedTuple):
    """What batches are drawn from: a folder of a mixture, or else all of the data.

    name: tells the sources of a mixture apart (`mixture.short_names`).
    share: of the sequences that come from it.
    train, validation: where it lies in the splits.
    """

    name: str
    share: Fraction
    train: Span
    validation: Span


class Dataset:
    """Folders that `prepare` wrote, or copies of them behind URLs that fsspec reads, as one stream for each split.

    Args:
      path: a folder or URL, or several, separated by commas, with weights for a mixture (`mixture.parts_of`). Their
        order is that of the stream, which does not depend on the weights.
      workdir: folder or URL in which to remember which file shards were verified; "": nowhere.
    Attributes:
      path: as given.
      vocab_size: number of token ids.
      bos_id, eos_id: ids before and after each document; None if there are none.
      train, validation: the splits as `Tokens`.
      shares: of the folders in a mixture, which add up to 1; () without weights.
      sources: the folders of a mixture; without weights, one source that is all of the data.
      digest: of one folder, the SHA-256 over the checksums of the tokenizer and of all file shards; of several, that
        over their digests. Checkpoints name the data by it, and a mixture by its shares too.
    Raises: UserError if files are missing, have another size than recorded, or come from another version, or if the
      folders were made with different tokenizers.
    """

    def __init__(self, path: str, workdir: str = ""):
        self.path = path
        parts = mixture.parts_of(path)
        self._folders = [_Folder(part.path) for part in parts]
        first, *others = self._folders
        for other in others:
            _check_same_tokenizer(first, other)
        self.vocab_size = first.record.vocab_size
        self.bos_id, self.eos_id = first.record.tokenizer.bos_id, first.record.tokenizer.eos_id
        self.shares = mixture.shares_of(parts)
        digests = [folder.digest for folder in self._folders]
        self.digest = first.digest if not others else _digest(digests)
        self._verification = Verification(workdir)
        self.train, self.validation = (self._stream(split) for split in SPLITS)
        self.sources = self._sources()

    def _stream(self, split: str) -> Tokens:
        parts = [folder.split(split) for folder in self._folders]
        return Tokens(
            [shard for folder in self._folders for shard in folder.shards[split]],
            documents=sum(part.documents for part in parts),
            text_bytes=sum(part.bytes for part in parts),
            vocab_size=self.vocab_size,
            verification=self._verification,
        )

    def _sources(self) -> tuple[Source, ...]:
        if not self.shares:
            whole = (Span(0, stream.tokens, stream.bytes) for stream in (self.train, self.validation))
            return (Source(self.path, Fraction(1), *whole),)
        spans = []
        for split in SPLITS:
            records = [folder.split(split) for folder in self._folders]
            starts = itertools.accumulate((record.tokens for record in records), initial=0)
            spans.append([Span(start, record.tokens, record.bytes) for start, record in zip(starts, records)])
        names = mixture.short_names([folder.path for folder in self._folders])
        return tuple(map(Source, names, self.shares, *spans))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data. Raises: UserError if the file has another checksum than recorded."""
        return self._folders[0].tokenizer()

    def verify(
        self, part: int = 0, parts: int = 1, show: bool = True, stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Compares all file shards with their checksums, but for those that the workdir remembers as verified.

        Args:
          part, parts: the share to check: every `parts`-th file shard, from index `part` on. Each host takes one share.
          show, stopped: as of `Verification.check`.
        Returns: whether all are verified; False if the reading was stopped.
        Raises: UserError that names the file shard.
        """
        return self._verification.check(self._all_shards()[part::parts], show, stopped)

    def remember_verified(self) -> None:
        """Writes into the workdir that all file shards are verified; call it when all shares have been."""
        self._verification.remember(self._all_shards())

    def _all_shards(self) -> tuple[FileShard, ...]:
        return self.train.shards + self.validation.shards


def _check_same_tokenizer(first: _Folder, other: _Folder) -> None:
    """Raises: UserError if two folders were not made with the same tokenizer."""
    if other.record.tokenizer.digest != first.record.tokenizer.digest:
        raise UserError(f"{other.path}: expected data of the same tokenizer as in {first.path}, found another one's")
    # A tokenizer_config.json, which is not in the tokenizer's digest, may have named other special tokens.
    for field in ("kind", "bos_id", "eos_id"):
        expected, found = getattr(first.record.tokenizer, field), getattr(other.record.tokenizer, field)
        if found != expected:
            where = os.path.join(other.path, "dataset.json")
            raise UserError(f"{where}: tokenizer.{field}: expected {expected!r} as in {first.path}, found {found!r}")
    if other.record.vocab_size != first.record.vocab_size:
        expected, found = first.record.vocab_size, other.record.vocab_size
        where = os.path.join(other.path, "dataset.json")
        raise UserError(f"{where}: vocab_size: expected {expected} as in {first.path}, found {found}")


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_for(path: str, tokenizer_digest: str, workdir: str = "") -> Dataset:
    """Opens prepared data for a model.

    Args:
      tokenizer_digest: SHA-256 of the model's tokenizer.
      path, workdir: as of `Dataset`.
    Raises: UserError if the data was made with another tokenizer.
    """
    dataset = Dataset(path, workdir)
    digest = dataset.tokenizer().digest
    if digest != tokenizer_digest:
        raise ArgumentError(
            "data", f"{path}: made with another tokenizer: expected {tokenizer_digest[:12]}, found {digest[:12]}"
        )
    return dataset
