"""Prepared data: token shards that `prepare` wrote, read by position. No JAX.

File shards on a disk are memory-mapped. Behind a URL each window of tokens is one ranged read, and the reads of one
call are under way at the same time.
"""

import bisect
import concurrent.futures
import functools
import hashlib
import json
import os
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.tokenizer import Tokenizer

FORMAT = 1
SPLITS = ("train", "validation")
# Memory maps kept for one split. A corpus may have more file shards than a process may hold files open.
_OPEN_SHARDS = 128


class Dataset:
    """What `prepare` wrote in a folder, or a copy of it behind a URL that fsspec reads.

    Attributes:
      path, vocab_size.
      dtype: of the token ids in the file shards, little-endian.
      splits: {split: its record in dataset.json}.
      train, validation: the splits as `Tokens`.
      digest: SHA-256 over the checksums of the tokenizer and all file shards: names the data in checkpoints.
    Raises: UserError.
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
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}/dataset.json: expected a field {error}") from error
        if version != FORMAT:
            raise UserError(f"{path}/dataset.json: expected format {FORMAT}, found {version}; prepare the data again")
        self.digest = hashlib.sha256(json.dumps([self._tokenizer["digest"], *checksums]).encode()).hexdigest()
        sizes = storage.sizes(path)
        self.train = Tokens(self, "train", sizes)
        self.validation = Tokens(self, "validation", sizes)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data. Raises: UserError if the file beside the shards is another one."""
        path = os.path.join(self.path, self._tokenizer["file"])
        model = tokenizer_lib.load(f"{self._tokenizer['kind']}:{path}")
        if model.digest != self._tokenizer["digest"]:
            raise UserError(
                f"{path}: the tokenizer does not match the data: "
                f"expected SHA-256 {self._tokenizer['digest'][:12]}..., found {model.digest[:12]}..."
            )
        if model.kind == "hf":
            # `prepare` may have taken bos and eos from a tokenizer_config.json, which is not copied with the data.
            bos_id, eos_id = self._tokenizer["bos_id"], self._tokenizer["eos_id"]
            model.name_special(bos_id, [] if eos_id is None else [eos_id])
        return model

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compares checksums of every `parts`-th file shard, from number `part` on: a host's share.

        Raises: UserError that names the shard.
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
    """Prepared data for a model with this tokenizer. Raises: UserError if the data was made with another."""
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
      tokens, bytes, documents: of the whole split.
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
            expected, found = shard["tokens"] * self._dtype.itemsize, sizes.get(shard["file"])
            if found != expected:
                raise UserError(f"{path}: expected {expected} bytes, found {'no file' if found is None else found}")
            self._paths.append(path)  # as the user names it
            self._names.append(os.path.join(root, shard["file"]))  # as the file system takes it
            self._starts.append(start)
            start += shard["tokens"]
        self._map = functools.lru_cache(_OPEN_SHARDS)(lambda shard: np.memmap(self._names[shard], self._dtype, "r"))

    def read(self, start: int, count: int) -> np.ndarray:
        """int32 ids of positions start to start + count, or to the end. Raises: UserError for an id out of range."""
        return self.read_each([start], count)[0]

    def read_each(self, starts: list[int], count: int) -> list[np.ndarray]:
        """`read` of each start; ranges behind a URL are fetched at the same time."""
        pieces = [self._pieces(start, min(start + count, self.tokens)) for start in starts]
        fetched = iter(self._fetch([piece for of_one in pieces for piece in of_one]))
        return [np.concatenate([self._checked(piece, next(fetched)) for piece in of_one]) for of_one in pieces]

    def _pieces(self, start: int, stop: int) -> list[_Piece]:
        """The range cut where file shards end."""
        out = []
        while start < stop:
            shard = bisect.bisect_right(self._starts, start) - 1
            is_last = shard + 1 == len(self._starts)
            end = stop if is_last else min(stop, self._starts[shard + 1])
            out.append(_Piece(shard, start - self._starts[shard], end - self._starts[shard]))
            start = end
        return out

    def _fetch(self, pieces: list[_Piece]) -> list[np.ndarray]:
        if storage.is_local(self._fs):
            return [self._map(piece.shard)[piece.first : piece.end] for piece in pieces]
        size = self._dtype.itemsize
        # Of each range its bytes, or the exception that its read ended in.
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
        # An id beyond the vocabulary would be clamped on the device, silently.
        if ids.max() >= self.vocab_size:
            at = piece.first + int(ids.argmax())
            raise UserError(
                f"{self._paths[piece.shard]}: token {at}: expected an id below {self.vocab_size}, found {ids.max()}"
            )
        return ids.astype(np.int32)
