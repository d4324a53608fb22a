"""Prepared data: file shards of tokens that `prepare` wrote, read by position. No JAX.

File shards on a disk are memory-mapped. Behind a URL, each window of tokens is one ranged read, and the reads of one
call run concurrently.
"""

import bisect
import concurrent.futures
import functools
import hashlib
import json
import os
from typing import Annotated, NamedTuple

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.tokenizer import Tokenizer

FORMAT = 1  # version of dataset.json and the file shards
SPLITS = ("train", "validation")
Split = Annotated[str, Option("split of the prepared data", choices=SPLITS)]
# Memory maps kept open for one split: a corpus may have more file shards than a process may have open files.
_OPEN_SHARDS = 128


class Dataset:
    """A folder that `prepare` wrote, or a copy of it behind a URL that fsspec reads.

    Attributes:
      path: the folder or URL.
      vocab_size: number of token ids.
      dtype: little-endian type of the token ids in the file shards, uint16 or uint32.
      splits: {split: its record in dataset.json}.
      train, validation: the splits as `Tokens`.
      digest: SHA-256 over the checksums of the tokenizer and of all file shards. Checkpoints name the data by it.
    Raises: UserError if files are missing, have another size than recorded, or come from another version.
    """

    def __init__(self, path: str):
        self.path = path
        tree = storage.read_json(os.path.join(path, "dataset.json"), "a folder that `prepare` finished")
        try:
            self.vocab_size: int = tree["vocab_size"]
            self._tokenizer = tree["tokenizer"]
            self.dtype = np.dtype(tree["dtype"]).newbyteorder("<")
            self.splits = {split: tree["splits"][split] for split in SPLITS}
            checksums = [shard["sha256"] for record in self.splits.values() for shard in record["shards"]]
            version = tree["format"]
        except KeyError as error:
            raise UserError(f"{path}/dataset.json: expected a field {error}, found none") from error
        except TypeError as error:
            raise UserError(f"{path}/dataset.json: expected the fields that `prepare` writes: {error}") from error
        if version != FORMAT:
            raise UserError(f"{path}/dataset.json: expected format {FORMAT}, found {version}; prepare the data again")
        self.digest = hashlib.sha256(json.dumps([self._tokenizer["digest"], *checksums]).encode()).hexdigest()
        sizes = storage.sizes(path)
        self.train = Tokens(self, "train", sizes)
        self.validation = Tokens(self, "validation", sizes)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data. Raises: UserError if tokenizer.model has another checksum than recorded."""
        path = os.path.join(self.path, self._tokenizer["file"])
        model = tokenizer_lib.load(f"{self._tokenizer['kind']}:{path}")
        if model.digest != self._tokenizer["digest"]:
            raise UserError(
                f"{path}: the tokenizer does not match the data: "
                f"expected SHA-256 {self._tokenizer['digest'][:12]}..., found {model.digest[:12]}..."
            )
        if model.kind == "hf":
            # `prepare` may have read bos and eos from a tokenizer_config.json, which is not beside the file shards.
            bos_id, eos_id = self._tokenizer["bos_id"], self._tokenizer["eos_id"]
            model.name_special(bos_id, [] if eos_id is None else [eos_id])
        return model

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compares the checksums of file shards with those in dataset.json.

        Args:
          part, parts: the share to check: every `parts`-th file shard, from index `part` on. Each host takes one share.
        Raises: UserError that names the file shard.
        """
        shards = [shard for record in self.splits.values() for shard in record["shards"]]

        def check(shard):
            path = os.path.join(self.path, shard["file"])
            found = storage.sha256(path)
            if found != shard["sha256"]:
                raise UserError(f"{path}: checksum differs: expected {shard['sha256'][:12]}..., found {found[:12]}...")

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            # list() waits for all and raises the first error.
            list(pool.map(check, shards[part::parts]))


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

    def __init__(self, dataset: Dataset, split: str, sizes: dict[str, int]):
        record = dataset.splits[split]
        self.tokens, self.bytes, self.documents = record["tokens"], record["bytes"], record["documents"]
        self.vocab_size, self._dtype = dataset.vocab_size, dataset.dtype
        self._fs, root = storage.filesystem(dataset.path)
        self._paths, self._names, self._starts = [], [], []
        start = 0
        for shard in record["shards"]:
            path = os.path.join(dataset.path, shard["file"])
            expected = shard["tokens"] * self._dtype.itemsize
            found = sizes.get(shard["file"])
            if found != expected:
                raise UserError(f"{path}: expected {expected} bytes, found {'no file' if found is None else found}")
            self._paths.append(path)  # for error messages: as the user wrote it
            self._names.append(os.path.join(root, shard["file"]))  # for reading: as the file system expects it
            self._starts.append(start)
            start += shard["tokens"]
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
