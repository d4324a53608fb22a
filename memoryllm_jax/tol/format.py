"""The ToL file: a safetensors file whose rows can be read by position. docs/tol.md is its specification."""

import dataclasses
import glob
import json
import os
from collections.abc import Iterable

import numpy as np
import xxhash

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.tol.codec import FLOATS, INTEGERS
from memoryllm_jax.tol.layout import Layout

VERSION = 1
ALIGN = 4096  # bytes; data, and the rows of each tier, begin at a multiple
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "BF16": np.uint16}
_METADATA = (
    *("architecture", "vocab_size", "codec", "dtype", "kept_layers", "dropped_layers", "step", "layout"),
    *("rows_digest", "decoder_digest", "tokenizer_kind", "tokenizer_digest", "tensor_checksums"),
)
_MAX_HEADER = 100_000_000  # bytes; what readers of safetensors accept


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its first byte counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(_DTYPES[self.dtype]).itemsize


def plan(layout: Layout, extra: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]):
    """(header bytes, {tensor name: Tensor}, size of the file) of a file to be written.

    `extra`: {name: (dtype, shape)} of what comes beside the rows and their checksums.
    """
    entries, offset = [], 0

    def add(name, dtype, shape):
        nonlocal offset
        tensor = Tensor(dtype, shape, offset)
        entries.append((name, tensor))
        offset += tensor.nbytes

    for number, tier in enumerate(layout.tiers):
        if offset % ALIGN:
            add(f"padding.{number}", "U8", (-offset % ALIGN,))
        if tier.plain:
            width = tier.parts[0].rank
            add(f"rows.{number}", {16: "BF16", 32: "F32"}[tier.plain], (tier.rows, len(tier.parts), width))
        else:
            add(f"rows.{number}", "U8", (tier.rows, tier.stride))
    if offset % 8:
        add("padding", "U8", (-offset % 8,))
    add("checksums", "U64", (layout.rows,))
    for name, (dtype, shape) in sorted(extra.items(), key=lambda item: -np.dtype(_DTYPES[item[1][0]]).itemsize):
        add(name, dtype, shape)
    header: dict = {"__metadata__": metadata}
    for name, t in entries:
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.start + t.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    start = 8 + len(text)
    tensors = {name: dataclasses.replace(t, start=start + t.start) for name, t in entries}
    return len(text).to_bytes(8, "little") + text, tensors, start + offset


def checksum(row: np.ndarray) -> int:
    """XXH3-64 of a row's bytes."""
    return xxhash.xxh3_64_intdigest(row)


class TolFile:
    """A ToL file opened for reading, its header checked against its size and itself.

    Attributes:
      path, fd: of the file.  size: bytes.  layout, tensors.  metadata: {name: text} as in docs/tol.md.
      row_of_token: int32 [V].
    Raises: UserError that names the file and what is wrong.
    """

    def __init__(self, path: str):
        self.path = path
        if path.endswith(".part"):
            raise UserError(f"{path}: expected a whole ToL file, found one that precompute has not finished")
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: expected a ToL file: {error.strerror}") from error
        try:
            self._read_header()
            self.row_of_token = self.read("row_of_token")
            if not np.array_equal(np.sort(self.row_of_token), np.arange(self.vocab_size)):
                raise UserError(f"{path}: row_of_token: expected each of {self.vocab_size} rows once; it is damaged")
        except Exception:
            self.close()
            raise
        strides = np.repeat([t.stride for t in self.layout.tiers], [t.rows for t in self.layout.tiers])
        firsts = np.cumsum([0] + [t.rows for t in self.layout.tiers])[:-1]
        self.tier_of_row = np.repeat(np.arange(len(firsts)), [t.rows for t in self.layout.tiers])
        starts = np.array([self.tensors[f"rows.{k}"].start for k in range(len(firsts))])
        within = np.arange(self.vocab_size) - firsts[self.tier_of_row]
        self.start_of_row = starts[self.tier_of_row] + within * strides
        self.stride_of_row = strides
        self._checksums = None

    def _read_header(self):
        self.size = os.fstat(self.fd).st_size
        try:
            length = int.from_bytes(os.pread(self.fd, 8, 0), "little")
            if self.size < 8 or not 0 < length <= min(_MAX_HEADER, self.size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {self.size}")
            header = json.loads(os.pread(self.fd, length, 8))
            self.metadata = header.pop("__metadata__")
            kind, version = self.metadata["format"], self.metadata["version"]
            if kind != "memoryllm_tol" or version != str(VERSION):
                raise ValueError(f"format {kind!r} version {version!r}, where this reads version {VERSION}")
            self.layout = Layout.from_json(json.loads(self.metadata["layout"]))
            self.tensors = {
                name: Tensor(t["dtype"], tuple(t["shape"]), 8 + length + t["data_offsets"][0])
                for name, t in header.items()
            }
            self.vocab_size = int(self.metadata["vocab_size"])
            self._tensor_checksums = json.loads(self.metadata["tensor_checksums"])
            end = max(t.start + t.nbytes for t in self.tensors.values())
            rows = [self.tensors[f"rows.{k}"] for k in range(len(self.layout.tiers))]
            needed = {"row_of_token": 4 * self.vocab_size, "checksums": 8 * self.vocab_size}
            needed |= {f"rows.{k}": t.rows * t.stride for k, t in enumerate(self.layout.tiers)}
            needed |= {f"basis.{n}": r * self.layout.dim * 2 for n, r in self.layout.rotated.items()}
            wrong = [n for n, size in needed.items() if n not in self.tensors or self.tensors[n].nbytes != size]
            if wrong or len(rows) == 0 or self.layout.rows != self.vocab_size:
                raise ValueError(f"a layout that does not fit its tensors {', '.join(wrong)}")
            summed = {n for n in self.tensors if not n.startswith(("rows.", "padding")) and n != "checksums"}
            if summed != set(self._tensor_checksums):
                raise ValueError(f"checksums of {sorted(self._tensor_checksums)} for the tensors {sorted(summed)}")
            self._check_parts()
            absent = [key for key in _METADATA if key not in self.metadata]
            if absent:
                raise ValueError(f"no metadata {', '.join(absent)}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, OSError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{self.path}: expected a ToL file, found {found}") from error
        if self.size != end:
            raise UserError(f"{self.path}: expected {end} bytes, found {self.size}; it is truncated or damaged")

    def _check_parts(self):
        layout = self.layout
        dropped = {f"ffn.{layer}" for layer in json.loads(self.metadata["dropped_layers"])}
        expected = {f"ffn.{layer}" for layer in range(layout.layers)} | ({"x0"} if layout.has_x0 else set())
        for number, tier in enumerate(layout.tiers):
            names = [part.name for part in tier.parts]
            missing = expected - dropped - set(names)
            if missing:
                raise ValueError(f"no rows of {', '.join(sorted(missing))} in tier {number}")
            if len(set(names)) < len(names) or set(names) - expected:
                raise ValueError(f"the parts {', '.join(names)} in tier {number}")
            for part in tier.parts:
                if any(band.bits not in (*FLOATS, *INTEGERS) or band.size < 1 for band in part.bands):
                    raise ValueError(f"a band of {part.name} that there is no codec for")
                if part.rank > layout.dim or (part.rank < layout.dim and not part.rotated):
                    raise ValueError(f"{part.rank} elements of {part.name}, where the width is {layout.dim}")

    def read(self, name: str) -> np.ndarray:
        """A whole tensor; BF16 comes as uint16 bit patterns. Raises: UserError."""
        tensor = self.tensors[name]
        out = np.empty(tensor.shape, _DTYPES[tensor.dtype])
        read_into(self.fd, memoryview(out.reshape(-1).view(np.uint8)), tensor.start, self.path, name)
        expected = self._tensor_checksums.get(name)
        if expected is not None and expected != f"{checksum(out.reshape(-1).view(np.uint8)):016x}":
            raise UserError(f"{self.path}: {name}: its checksum differs; the file is damaged")
        return out

    @property
    def checksums(self) -> np.ndarray:
        if self._checksums is None:
            self._checksums = self.read("checksums")
        return self._checksums

    def basis(self, name: str) -> np.ndarray:
        """[rank, D] of a rotated part, bfloat16."""
        import ml_dtypes

        return self.read(f"basis.{name}").view(ml_dtypes.bfloat16)

    def token_of_row(self) -> np.ndarray:
        return np.argsort(self.row_of_token).astype(np.int32)

    def tokenizer(self):

        model = Tokenizer(self.metadata["tokenizer_kind"], self.read("tokenizer").tobytes(), f"of {self.path}")
        if model.digest != self.metadata["tokenizer_digest"]:
            raise UserError(f"{self.path}: the tokenizer in the file does not match its digest; it is damaged")
        return model

    def check_model(self, config, tokenizer_digest: str, decoder_digest: str | None) -> None:
        """Refuses a model that the rows were not made for. Raises: UserError that names what differs."""
        mine = self.metadata
        pairs = [
            ("vocabulary", mine["vocab_size"], str(config.vocab_size)),
            ("width", str(self.layout.dim), str(config.dim)),
            ("layers", str(self.layout.layers), str(config.layers)),
            ("architecture", mine["architecture"], config.architecture),
            ("tokenizer", mine["tokenizer_digest"], tokenizer_digest),
            ("parameters", mine["decoder_digest"], decoder_digest or mine["decoder_digest"]),
        ]
        different = [f"{what} {a[:12]} in the file, {b[:12]} in the model" for what, a, b in pairs if a != b]
        if different:
            raise UserError(
                f"{self.path}: made for another model (its step {mine['step']}): {'; '.join(different)}; "
                "run precompute on this checkpoint"
            )

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def read_into(fd: int, view: memoryview, start: int, path: str, what: str) -> None:
    """Fills the view from the file. Raises: UserError that names the file and what was to be read."""
    done = 0
    try:
        while done < len(view):
            count = os.preadv(fd, [view[done:]], start + done)
            if count == 0:
                raise UserError(f"{path}: {what}: expected {len(view)} bytes, found {done}; the file is truncated")
            done += count
    except OSError as error:
        raise UserError(f"{path}: {what}: cannot be read: {error.strerror}") from error


class TolWriter:
    """Writes a ToL file of a known layout in place, in any order, and gives it its name when it is whole.

    Until then it is PATH.part, with PATH.part.HOST holding how many chunks this host has on disk, so that a writer
    that was killed goes on. Several hosts write one file, each its own rows; the first of them begins and ends it.

    Args:
      plan_digest: of all that decides what is written and in which chunks; a writer goes on only with its own plan.
    Raises: UserError if the file does not fit the disk or cannot be written.
    """

    def __init__(self, path: str, layout: Layout, extra, metadata, plan_digest: str, host: int = 0):
        self.path, self.layout, self._plan = path, layout, plan_digest
        self._part, self._progress, self._host = f"{path}.part", f"{path}.part.{host}", host
        self._header, self.tensors, self.size = plan(layout, extra, metadata)
        self._fd = None

    def begin(self) -> None:
        """Opens the file; the first host makes it, unless an earlier writer with this plan left it unfinished."""
        try:
            if os.path.isdir(self.path):
                raise UserError(f"{self.path}: expected a name for a file, found a folder")
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
            storage.lock_byte(self._fd, self._part, self._host)
            if os.fstat(self._fd).st_ino != os.stat(self._part).st_ino:
                raise UserError(f"{self.path}: another run has just finished it; run the same line again")
            if self._host or (self.done() is not None and os.fstat(self._fd).st_size == self.size):
                return
            free = os.statvfs(self._part)
            room = free.f_bavail * free.f_frsize + os.fstat(self._fd).st_blocks * 512
            if room < self.size:
                self._give_up()
                raise UserError(f"{self.path}: needs {self.size:,} bytes, found room for {room:,} on its disk")
            os.ftruncate(self._fd, 0)
            for progress in glob.glob(f"{glob.escape(self._part)}.*"):
                os.remove(progress)
            os.posix_fallocate(self._fd, 0, self.size)
            self._write(np.frombuffer(self._header, np.uint8), 0)
        except OSError as error:
            self._give_up()
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def is_there(self) -> bool:
        """Whether the file is there already, whole and with this header."""
        if not os.path.isfile(self.path) or os.path.getsize(self.path) != self.size:
            return False
        with open(self.path, "rb") as file:
            return file.read(len(self._header)) == self._header

    def _give_up(self):
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            os.remove(self._part)

    def done(self) -> int | None:
        """Chunks of this plan that this host has written; None if it has not begun."""
        if not os.path.exists(self._progress):
            return None
        progress = storage.read_json(self._progress, "progress")
        return progress["chunks"] if progress["plan"] == self._plan else None

    def write(self, name: str, array: np.ndarray) -> None:
        self._write(np.ascontiguousarray(array), self.tensors[name].start)

    def write_rows(self, tier: int, first: int, raw: np.ndarray) -> None:
        """Consecutive encoded rows, uint8 [n, stride]; `first` counts within the tier."""
        raw = np.ascontiguousarray(raw)
        self._write(raw, self.tensors[f"rows.{tier}"].start + first * self.layout.tiers[tier].stride)
        sums = np.array([checksum(row) for row in raw], np.uint64)
        before = sum(t.rows for t in self.layout.tiers[:tier])
        self._write(sums, self.tensors["checksums"].start + 8 * (before + first))

    def _write(self, array, start):
        view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], start + done)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; run the same line again") from error

    def record(self, chunks: int) -> None:
        """The first `chunks` chunks of this host are written; makes sure that they are on disk."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; run the same line again") from error
        storage.write_json(self._progress, {"plan": self._plan, "chunks": chunks})

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def finish(self, hosts: Iterable[int]) -> None:
        """Gives the file its name. For the first host, when all have written."""
        os.fsync(self._fd)
        os.replace(self._part, self.path)
        for host in hosts:
            if os.path.exists(f"{self._part}.{host}"):
                os.remove(f"{self._part}.{host}")
        self.close()
