"""Prepared data: file shards of tokens that `prepare` wrote, read by position. No JAX.

File shards on a disk are memory-mapped. Behind a URL, each window of tokens is one ranged read, and the reads of one
call run concurrently.
"""

import bisect
import collections
import concurrent.futures
import functools
import hashlib
import json
import os
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.records import Count, Record, Size
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.tokenizer import Tokenizer

FORMAT = 1  # version of dataset.json and the file shards
SPLITS = ("train", "validation")
Split = Annotated[str, Option("split of the prepared data", choices=SPLITS)]
# Memory maps kept open for one split: a corpus may have more file shards than a process may have open files.
_OPEN_SHARDS = 128


Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]  # in hexadecimal
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
    """

    kind: Literal["sentencepiece", "llama3", "hf"]
    file: str
    digest: Sha256
    bos_id: TokenId | None
    eos_id: TokenId | None


class DatasetRecord(Record):
    """The contents of dataset.json.

    format: FORMAT.
    vocab_size: number of token ids.
    dtype: type of the token ids in the file shards, which are little-endian.
    """

    format: Count
    tokenizer: TokenizerRecord
    vocab_size: Size
    dtype: Literal["uint16", "uint32"]
    splits: SplitRecords

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
    model = tokenizer_lib.load(f"{expected.kind}:{path}")
    if model.digest != expected.digest:
        raise UserError(
            f"{path}: the tokenizer does not match the data: "
            f"expected SHA-256 {expected.digest[:12]}..., found {model.digest[:12]}..."
        )
    if model.kind == "hf":
        # `prepare` may have read bos and eos from a tokenizer_config.json, which is not beside the file shards.
        model.name_special(expected.bos_id, [] if expected.eos_id is None else [expected.eos_id])
    return model


class Dataset:
    """A folder that `prepare` wrote, or a copy of it behind a URL that fsspec reads.

    Attributes:
      path: the folder or URL.
      record: the contents of dataset.json.
      vocab_size: number of token ids.
      dtype: little-endian type of the token ids in the file shards, uint16 or uint32.
      train, validation: the splits as `Tokens`.
      digest: SHA-256 over the checksums of the tokenizer and of all file shards. Checkpoints name the data by it.
    Raises: UserError if files are missing, have another size than recorded, or come from another version.
    """

    def __init__(self, path: str):
        self.path = path
        self.record = read_record(path)
        self.vocab_size = self.record.vocab_size
        self.dtype = np.dtype(self.record.dtype).newbyteorder("<")
        checksums = [shard.sha256 for shard in self.record.all_shards()]
        self.digest = hashlib.sha256(json.dumps([self.record.tokenizer.digest, *checksums]).encode()).hexdigest()
        sizes = storage.sizes(path)
        self.train = Tokens(self, self.record.splits.train, sizes)
        self.validation = Tokens(self, self.record.splits.validation, sizes)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data. Raises: UserError if tokenizer.model has another checksum than recorded."""
        model = load_tokenizer(self.path, self.record.tokenizer)
        if model.vocab_size != self.vocab_size:
            where = os.path.join(self.path, "dataset.json")
            raise UserError(
                f"{where}: vocab_size: expected the tokenizer's {model.vocab_size}, found {self.vocab_size}"
            )
        return model

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compares the checksums of file shards with those in dataset.json.

        Args:
          part, parts: the share to check: every `parts`-th file shard, from index `part` on. Each host takes one share.
        Raises: UserError that names the file shard.
        """

        def check(shard: ShardRecord):
            path = os.path.join(self.path, shard.file)
            found = storage.sha256(path)
            if found != shard.sha256:
                raise UserError(f"{path}: checksum differs: expected {shard.sha256[:12]}..., found {found[:12]}...")

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            # list() waits for all and raises the first error.
            list(pool.map(check, self.record.all_shards()[part::parts]))


def open_for(path: str, tokenizer_digest: str) -> Dataset:
    """Opens prepared data for a model.

    Args:
      tokenizer_digest: SHA-256 of the model's tokenizer.
    Raises: UserError if the data was made with another tokenizer.
    """
    dataset = Dataset(path)
    digest = dataset.tokenizer().digest
    if digest != tokenizer_digest:
        raise ArgumentError(
            "data", f"{path}: made with another tokenizer: expected {tokenizer_digest[:12]}, found {digest[:12]}"
        )
    return dataset


class _Piece(NamedTuple):
    """A range of tokens inside one file shard."""

    shard: int
    first: int
    end: int


class Tokens:
    """One split as a stream of token ids over its file shards, read by position.

    Attributes:
      tokens, bytes, documents: numbers of tokens, bytes of text and documents in the split.
      vocab_size: number of token ids.
    """

    def __init__(self, dataset: Dataset, record: SplitRecord, sizes: dict[str, int]):
        self.tokens, self.bytes, self.documents = record.tokens, record.bytes, record.documents
        self.vocab_size, self._dtype = dataset.vocab_size, dataset.dtype
        self._fs, root = storage.filesystem(dataset.path)
        self._paths, self._names, self._starts = [], [], []
        start = 0
        for shard in record.shards:
            path = os.path.join(dataset.path, shard.file)
            expected = shard.tokens * self._dtype.itemsize
            found = sizes.get(shard.file)
            if found != expected:
                raise UserError(f"{path}: expected {expected} bytes, found {'no file' if found is None else found}")
            self._paths.append(path)  # for error messages: as the user wrote it
            self._names.append(os.path.join(root, shard.file))  # for reading: as the file system expects it
            self._starts.append(start)
            start += shard.tokens
        self._map = functools.lru_cache(_OPEN_SHARDS)(self._open_map)

    def _open_map(self, shard: int) -> np.memmap:
        return np.memmap(self._names[shard], self._dtype, "r")

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads one range of tokens.

        Args:
          start: position of the first token in the split.
          count: number of tokens; the range ends earlier where the split does.
        Returns: int32 [count] token ids.
        Raises: UserError if the file cannot be read, or holds an id outside the vocabulary.
        """
        return self.read_each([start], count)[0]

    def read_each(self, starts: list[int], count: int) -> list[np.ndarray]:
        """Reads the range of `count` tokens at each start, as `read` does; behind a URL, all ranges concurrently."""
        pieces_of_ranges = [self._pieces(start, min(start + count, self.tokens)) for start in starts]
        # One call for the pieces of all ranges, as it reads them concurrently.
        fetched = iter(self._fetch([piece for pieces in pieces_of_ranges for piece in pieces]))
        out = []
        for pieces in pieces_of_ranges:
            out.append(np.concatenate([self._checked(piece, next(fetched)) for piece in pieces]))
        return out

    def _pieces(self, start: int, stop: int) -> list[_Piece]:
        """Cuts the range of positions where a file shard ends."""
        out = []
        while start < stop:
            shard = bisect.bisect_right(self._starts, start) - 1
            is_last = shard + 1 == len(self._starts)
            end = stop if is_last else min(stop, self._starts[shard + 1])
            out.append(_Piece(shard, start - self._starts[shard], end - self._starts[shard]))
            start = end
        return out

    def _fetch(self, pieces: list[_Piece]) -> list[np.ndarray]:
        """The stored ids of each piece. Raises: UserError if a read fails or is too short."""
        if storage.is_local(self._fs):
            return [self._map(piece.shard)[piece.first : piece.end] for piece in pieces]
        size = self._dtype.itemsize
        # cat_ranges returns for each range its bytes, or the exception that its read raised.
        fetched = self._fs.cat_ranges(
            [self._names[piece.shard] for piece in pieces],
            [piece.first * size for piece in pieces],
            [piece.end * size for piece in pieces],
        )
        for piece, data in zip(pieces, fetched):
            path = self._paths[piece.shard]
            if isinstance(data, Exception):
                raise UserError(f"{path}: cannot be read: {storage.reason(data)}") from data
            if len(data) != (piece.end - piece.first) * size:
                raise UserError(
                    f"{path}: expected bytes up to {piece.end * size}, found {len(data)} from {piece.first * size}"
                )
        return [np.frombuffer(data, self._dtype) for data in fetched]

    def _checked(self, piece: _Piece, ids: np.ndarray) -> np.ndarray:
        # On the device, an id outside the vocabulary would silently be clamped to the last one.
        if ids.max() >= self.vocab_size:
            at = piece.first + int(ids.argmax())
            raise UserError(
                f"{self._paths[piece.shard]}: token {at}: expected an id below {self.vocab_size}, found {ids.max()}"
            )
        return ids.astype(np.int32)
