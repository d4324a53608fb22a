"""Prepared token shards, read by position."""

import bisect
import concurrent.futures
import concurrent.futures.process
import functools
import hashlib
import json
import os

import numpy as np

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.tokenizer import Tokenizer, load

FORMAT = 1
_OPEN_SHARDS = 128  # a split's; a corpus has more files than a process may hold open


class Dataset:
    """What `prepare` wrote in a folder, or a copy of it behind a URL that fsspec reads.

    Attributes:
      vocab_size, digest (of all shards' checksums and the tokenizer's), train, validation: `Tokens`.
    """

    def __init__(self, path: str):
        self.path = path
        tree = storage.read_json(os.path.join(path, "dataset.json"), "a folder that `prepare` finished")
        try:
            self.vocab_size: int = tree["vocab_size"]
            self._tokenizer = tree["tokenizer"]
            self.dtype = np.dtype(tree["dtype"]).newbyteorder("<")
            self.splits = {name: tree["splits"][name] for name in ("train", "validation")}
            checksums = [shard["sha256"] for split in self.splits.values() for shard in split["shards"]]
            version = tree["format"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}/dataset.json: expected a field {error}") from error
        if version != FORMAT:
            raise UserError(f"{path}/dataset.json: expected format {FORMAT}, found {version}; prepare the data again")
        self.digest = hashlib.sha256(json.dumps([self._tokenizer["digest"], *checksums]).encode()).hexdigest()
        found = storage.sizes(path)
        self.train, self.validation = (Tokens(self, split, found) for split in ("train", "validation"))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data. Raises: UserError if the file is another one."""
        path = os.path.join(self.path, self._tokenizer["file"])
        model = load(f"{self._tokenizer['kind']}:{path}")
        if model.digest != self._tokenizer["digest"]:
            raise UserError(
                f"{path}: the tokenizer does not match the data: "
                f"expected SHA-256 {self._tokenizer['digest'][:12]}..., found {model.digest[:12]}..."
            )
        if model.kind == "hf":  # `prepare` may have found them in another file
            bos_id, eos_id = self._tokenizer["bos_id"], self._tokenizer["eos_id"]
            model.name_special(bos_id, [] if eos_id is None else [eos_id])
        return model

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compares the checksums of every parts-th shard. Raises: UserError that names the shard."""
        shards = [shard for split in self.splits.values() for shard in split["shards"]][part::parts]

        def check(shard):
            path = os.path.join(self.path, shard["file"])
            found = storage.sha256(path)
            if found != shard["sha256"]:
                raise UserError(f"{path}: checksum differs: expected {shard['sha256'][:12]}..., found {found[:12]}...")

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(check, shards))


def open_for(path: str, tokenizer_digest: str) -> Dataset:
    """Prepared data for a model with this tokenizer. Raises: UserError if it was made with another."""
    dataset = Dataset(path)
    digest = dataset.tokenizer().digest
    if digest != tokenizer_digest:
        raise UserError(
            f"--data={path}: made with another tokenizer: expected {tokenizer_digest[:12]}, found {digest[:12]}"
        )
    return dataset


class Tokens:
    """One split as a stream of token ids over its shards, read by position."""

    def __init__(self, dataset: Dataset, split: str, sizes: dict[str, int]):
        record = dataset.splits[split]
        self.tokens, self.bytes, self.documents = record["tokens"], record["bytes"], record["documents"]
        self.vocab_size, self._dtype = dataset.vocab_size, dataset.dtype
        self._paths = [os.path.join(dataset.path, shard["file"]) for shard in record["shards"]]
        self._fs, root = storage.filesystem(dataset.path)
        self._names = [os.path.join(root, shard["file"]) for shard in record["shards"]]
        self._mapped = functools.lru_cache(_OPEN_SHARDS)(lambda k: np.memmap(self._names[k], self._dtype, "r"))
        self._starts, start = [], 0
        for path, shard in zip(self._paths, record["shards"]):
            expected, found = shard["tokens"] * self._dtype.itemsize, sizes.get(shard["file"])
            if found != expected:
                raise UserError(f"{path}: expected {expected} bytes, found {'no file' if found is None else found}")
            self._starts.append(start)
            start += shard["tokens"]

    def read(self, start: int, count: int) -> np.ndarray:
        """int32 ids of positions start to start + count, or to the end. Raises: UserError for an id out of range."""
        return self.read_each([start], count)[0]

    def read_each(self, starts: list[int], count: int) -> list[np.ndarray]:
        """`read` of each start; ranges behind a URL are fetched at the same time."""
        pieces = [list(self._pieces(start, min(start + count, self.tokens))) for start in starts]
        fetched = iter(self._fetch([piece for of_one in pieces for piece in of_one]))
        return [np.concatenate([self._checked(piece, next(fetched)) for piece in of_one]) for of_one in pieces]

    def _pieces(self, start, stop):
        """(shard, first token in it, one past the last) of each shard that the range touches."""
        while start < stop:
            k = bisect.bisect_right(self._starts, start) - 1
            end = min(stop, self._starts[k + 1]) if k + 1 < len(self._starts) else stop
            yield k, start - self._starts[k], end - self._starts[k]
            start = end

    def _fetch(self, pieces):
        if storage.is_local(self._fs):
            return [self._mapped(k)[first:end] for k, first, end in pieces]
        size = self._dtype.itemsize
        names, firsts, ends = ([self._names[k] for k, _, _ in pieces], *([p[i] * size for p in pieces] for i in (1, 2)))
        found = self._fs.cat_ranges(names, firsts, ends)  # bytes, or the exception that a range ran into
        for (k, first, end), data in zip(pieces, found):
            if isinstance(data, Exception):
                raise UserError(f"{self._paths[k]}: cannot be read: {storage.reason(data)}") from data
            if len(data) != (end - first) * size:
                raise UserError(
                    f"{self._paths[k]}: expected bytes up to {end * size}, found {len(data)} from {first * size}"
                )
        return [np.frombuffer(data, self._dtype) for data in found]

    def _checked(self, piece, ids):
        if ids.max() >= self.vocab_size:
            k, first, _ = piece
            at = first + int(ids.argmax())
            raise UserError(f"{self._paths[k]}: token {at}: expected an id below {self.vocab_size}, found {ids.max()}")
        return ids.astype(np.int32)
