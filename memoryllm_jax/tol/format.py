"""The ToL file: a safetensors file whose rows can be read by position. docs/tol.md is its specification."""

import dataclasses
import json
import os
from typing import NamedTuple

import ml_dtypes
import numpy as np
import xxhash

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.tol.codec import FLOATS, INTEGERS
from memoryllm_jax.tol.layout import Layout, Tier

VERSION = 1
ALIGN = 4096  # bytes: the data, and the rows of each tier, begin at a multiple of a disk's block
# NumPy has no bfloat16: BF16 is read as its bit patterns.
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "BF16": np.uint16}
_METADATA = (  # keys that every file has
    "architecture",
    "vocab_size",
    "codec",
    "dtype",
    "kept_layers",
    "dropped_layers",
    "step",
    "layout",
    "rows_digest",
    "decoder_digest",
    "tokenizer_kind",
    "tokenizer_digest",
    "tensor_checksums",
)
_MAX_HEADER = 100_000_000  # bytes: readers of safetensors accept no more


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
      dtype: its name in safetensors, such as "BF16".
      shape: number of elements along each axis.
      start: the first byte, counted from the start of the file; within `plan`, from the start of the data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(_DTYPES[self.dtype]).itemsize


class FilePlan(NamedTuple):
    """A file that is to be written.

    Attributes:
      header: its first bytes, up to the data.
      tensors: {name: Tensor}, where the tensors go.
      size: bytes of the whole file.
    """

    header: bytes
    tensors: dict[str, Tensor]
    size: int


def plan(layout: Layout, extra: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> FilePlan:
    """Decides where everything in a file goes.

    Args:
      layout: what rows hold.
      extra: {name: (dtype, shape)} of the tensors beside the rows and their checksums.
      metadata: {key: text}.
    """
    entries: list[tuple[str, Tensor]] = []
    offset = 0

    def add(name, dtype, shape):
        nonlocal offset
        tensor = Tensor(dtype, shape, offset)
        entries.append((name, tensor))
        offset += tensor.nbytes

    # safetensors allows no gaps between tensors, so that padding is a tensor too.
    for number, tier in enumerate(layout.tiers):
        if offset % ALIGN:
            add(f"padding.{number}", "U8", (-offset % ALIGN,))
        if tier.float_bits:
            add(f"rows.{number}", {16: "BF16", 32: "F32"}[tier.float_bits], (tier.rows, len(tier.parts), layout.dim))
        else:
            add(f"rows.{number}", "U8", (tier.rows, tier.stride))
    if offset % 8:
        add("padding", "U8", (-offset % 8,))
    add("checksums", "U64", (layout.rows,))
    # Tensors of larger elements come first, so that each begins at a multiple of the size of its elements.
    for name, (dtype, shape) in sorted(extra.items(), key=lambda item: -np.dtype(_DTYPES[item[1][0]]).itemsize):
        add(name, dtype, shape)
    header: dict = {"__metadata__": metadata}
    for name, t in entries:
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.start + t.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)  # JSON may end in spaces
    start = 8 + len(text)
    tensors = {name: dataclasses.replace(t, start=start + t.start) for name, t in entries}
    return FilePlan(len(text).to_bytes(8, "little") + text, tensors, start + offset)


def checksum(row: np.ndarray) -> int:
    """XXH3-64 of a row's bytes."""
    return xxhash.xxh3_64_intdigest(row)


def text_checksum(array: np.ndarray) -> str:
    """XXH3-64 of a tensor's bytes in the form that metadata holds: 16 hexadecimal digits."""
    return f"{checksum(array.reshape(-1).view(np.uint8)):016x}"


class TolFile:
    """A ToL file opened for reading. Its header is checked: it must be consistent and fit the size of the file.

    Attributes:
      path: of the file.
      fd: its file descriptor; None once it is closed.
      size: bytes of the file.
      layout: what rows hold.
      tensors: {name: Tensor}.
      metadata: {key: text} as in docs/tol.md.
      vocab_size: V, the number of rows.
      row_of_token: int32 [V], the number of each token's row.
      tier_of_row: int [V], the tier of each row.
      start_of_row: int [V], the first byte of each row, counted from the start of the file.
      stride_of_row: int [V], the bytes of each row.
    Raises: UserError that names the file and what is wrong.
    """

    def __init__(self, path: str):
        self.path = path
        self.fd: int | None = None
        self._checksums: np.ndarray | None = None
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
        self._locate_rows()

    def _locate_rows(self):
        tiers = self.layout.tiers
        rows = [tier.rows for tier in tiers]
        self.tier_of_row = np.repeat(np.arange(len(tiers)), rows)
        self.stride_of_row = np.repeat([tier.stride for tier in tiers], rows)
        starts = np.array([self.tensors[f"rows.{number}"].start for number in range(len(tiers))])
        row_in_tier = np.arange(self.vocab_size) - np.array(self.layout.first_rows)[self.tier_of_row]
        self.start_of_row = starts[self.tier_of_row] + row_in_tier * self.stride_of_row

    def _read_header(self):
        self.size = os.fstat(self.fd).st_size
        try:
            end = self._parse_header()
            self._check_tensors()
            for number, tier in enumerate(self.layout.tiers):
                self._check_parts(number, tier)
            absent = [key for key in _METADATA if key not in self.metadata]
            if absent:
                raise ValueError(f"no metadata {', '.join(absent)}")
        # A damaged header may be any JSON, on which the code above fails in any of these ways.
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, OSError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{self.path}: expected a ToL file, found {found}") from error
        if self.size != end:
            raise UserError(f"{self.path}: expected {end} bytes, found {self.size}; it is truncated or damaged")

    def _parse_header(self) -> int:
        """Sets the attributes that the header holds. Returns: where the last tensor ends, which the file must too."""
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
            name: Tensor(t["dtype"], tuple(t["shape"]), 8 + length + t["data_offsets"][0]) for name, t in header.items()
        }
        self.vocab_size = int(self.metadata["vocab_size"])
        self._tensor_checksums = json.loads(self.metadata["tensor_checksums"])
        return max(t.start + t.nbytes for t in self.tensors.values())

    def _check_tensors(self):
        layout = self.layout
        needed = {"row_of_token": 4 * self.vocab_size, "checksums": 8 * self.vocab_size}
        needed |= {f"rows.{number}": tier.rows * tier.stride for number, tier in enumerate(layout.tiers)}
        needed |= {f"basis.{name}": 2 * rank * layout.dim for name, rank in layout.rotated.items()}
        wrong = [n for n, size in needed.items() if n not in self.tensors or self.tensors[n].nbytes != size]
        if wrong:
            raise ValueError(f"a layout that does not fit its tensors {', '.join(wrong)}")
        if not layout.tiers or layout.rows != self.vocab_size:
            raise ValueError(f"a layout of {layout.rows} rows for a vocabulary of {self.vocab_size}")
        # Rows have checksums of their own; nobody uses the bytes of the padding.
        summed = {n for n in self.tensors if not n.startswith(("rows.", "padding")) and n != "checksums"}
        if summed != set(self._tensor_checksums):
            raise ValueError(f"checksums of {sorted(self._tensor_checksums)} for the tensors {sorted(summed)}")

    def _check_parts(self, number: int, tier: Tier):
        """Checks that a tier has every part that it should, and none that the code cannot decode."""
        layout = self.layout
        dropped = {f"ffn.{layer}" for layer in json.loads(self.metadata["dropped_layers"])}
        expected = {f"ffn.{layer}" for layer in range(layout.layers)}
        if layout.has_x0:
            expected.add("x0")
        names = [part.name for part in tier.parts]
        missing = expected - dropped - set(names)
        if missing:
            raise ValueError(f"no rows of {', '.join(sorted(missing))} in tier {number}")
        if len(set(names)) < len(names) or set(names) - expected:
            raise ValueError(f"the parts {', '.join(names)} in tier {number}")
        for part in tier.parts:
            if any(band.bits not in (*FLOATS, *INTEGERS) or band.size < 1 for band in part.bands):
                raise ValueError(f"a band of {part.name} that is empty or has an unknown number of bits")
            if part.rank > layout.dim or (part.rank < layout.dim and not part.rotated):
                raise ValueError(f"{part.rank} elements of {part.name}, where the width is {layout.dim}")

    def read(self, name: str) -> np.ndarray:
        """Reads a whole tensor and verifies its checksum. BF16 comes as bit patterns, uint16. Raises: UserError."""
        tensor = self.tensors[name]
        out = np.empty(tensor.shape, _DTYPES[tensor.dtype])
        self._read_into(memoryview(out.reshape(-1).view(np.uint8)), tensor.start, name)
        expected = self._tensor_checksums.get(name)
        if expected is not None and expected != text_checksum(out):
            raise UserError(f"{self.path}: {name}: its checksum differs; the file is damaged")
        return out

    def _read_into(self, view: memoryview, start: int, what: str):
        done = 0
        try:
            while done < len(view):  # one call may read fewer bytes than asked for
                count = os.preadv(self.fd, [view[done:]], start + done)
                if count == 0:
                    raise UserError(
                        f"{self.path}: {what}: expected {len(view)} bytes, found {done}; the file is truncated"
                    )
                done += count
        except OSError as error:
            raise UserError(f"{self.path}: {what}: cannot be read: {error.strerror}") from error

    @property
    def checksums(self) -> np.ndarray:
        """uint64 [V], the checksum of each row."""
        if self._checksums is None:
            self._checksums = self.read("checksums")
        return self._checksums

    def basis(self, name: str) -> np.ndarray:
        """The basis of a rotated part, bfloat16 [rank, D]. Raises: UserError."""
        return self.read(f"basis.{name}").view(ml_dtypes.bfloat16)

    def token_of_row(self) -> np.ndarray:
        """int32 [V], the token id of each row."""
        return np.argsort(self.row_of_token).astype(np.int32)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file. Raises: UserError if it is damaged."""
        model = Tokenizer(self.metadata["tokenizer_kind"], self.read("tokenizer").tobytes(), f"of {self.path}")
        if model.digest != self.metadata["tokenizer_digest"]:
            raise UserError(f"{self.path}: the tokenizer in the file does not match its digest; it is damaged")
        return model

    def check_model(self, config, tokenizer_digest: str, decoder_digest: str | None) -> None:
        """Refuses a model that the rows were not made for.

        Args:
          config: the model's ModelConfig.
          tokenizer_digest: of the model's tokenizer.
          decoder_digest: of the weights that the decoder uses; None, where they are not read yet, compares nothing.
        Raises: UserError that names what differs.
        """
        mine = self.metadata
        pairs = [
            ("vocabulary", mine["vocab_size"], str(config.vocab_size)),
            ("width", str(self.layout.dim), str(config.dim)),
            ("layers", str(self.layout.layers), str(config.layers)),
            ("architecture", mine["architecture"], config.architecture),
            ("tokenizer", mine["tokenizer_digest"], tokenizer_digest),
            ("parameters", mine["decoder_digest"], decoder_digest or mine["decoder_digest"]),
        ]
        # Digests are cut to their first 12 digits, which are enough to tell them apart.
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


class TolWriter:
    """Writes a ToL file of a known layout in any order, and gives the file its name when it is whole.

    Until then the file is PATH.part. PATH.part.progress says how many chunks are on disk, so that a build that was
    killed goes on.

    Args:
      path: of the finished file.
      layout, extra, metadata: as of `plan`.
      plan_digest: of all that determines what is written and in which chunks. An unfinished file of another plan is
        started anew.
    Raises: UserError if the file does not fit the disk or cannot be written.
    """

    def __init__(self, path: str, layout: Layout, extra, metadata, plan_digest: str):
        self.path, self.layout, self._plan_digest = path, layout, plan_digest
        # Not `storage.replaced`, which removes the partial file on an error: a build that was stopped goes on with it.
        self._part, self._progress = f"{path}.part", f"{path}.part.progress"
        self._header, self.tensors, self.size = plan(layout, extra, metadata)
        self._fd: int | None = None

    def is_there(self) -> bool:
        """Whether the file is there already, whole and with this header."""
        if not os.path.isfile(self.path) or os.path.getsize(self.path) != self.size:
            return False
        with open(self.path, "rb") as file:
            return file.read(len(self._header)) == self._header

    def begin(self) -> None:
        """Opens the partial file; makes it, unless an earlier writer with this plan left it unfinished."""
        try:
            if os.path.isdir(self.path):
                raise UserError(f"{self.path}: expected a name for a file, found a folder")
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
            storage.lock_byte(self._fd, self._part, 0)
            # Another run may have renamed the partial file between opening and locking.
            if not self._has_part():
                raise UserError(f"{self.path}: another run has just finished it; run the same line again")
            if self.done() is None or os.fstat(self._fd).st_size != self.size:
                self._start_anew()
        except OSError as error:
            self._give_up()
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _has_part(self) -> bool:
        """Whether the open file is the one under the partial name."""
        try:
            return os.fstat(self._fd).st_ino == os.stat(self._part).st_ino
        except FileNotFoundError:
            return False

    def _start_anew(self):
        free = os.statvfs(self._part)
        occupied = os.fstat(self._fd).st_blocks * 512  # by an unfinished file, which is overwritten
        room = free.f_bavail * free.f_frsize + occupied
        if room < self.size:
            self._give_up()
            raise UserError(f"{self.path}: needs {self.size:,} bytes, found room for {room:,} on its disk")
        os.ftruncate(self._fd, 0)
        if os.path.exists(self._progress):
            os.remove(self._progress)
        os.posix_fallocate(self._fd, 0, self.size)  # so that a full disk shows now, not after hours
        self._write(np.frombuffer(self._header, np.uint8), 0)

    def _give_up(self):
        if self._fd is not None:
            self.close()
            os.remove(self._part)

    def done(self) -> int | None:
        """Number of this plan's chunks that are on disk; None if no file of this plan was begun."""
        if not os.path.exists(self._progress):
            return None
        progress = storage.read_json(self._progress, "progress")
        return progress["chunks"] if progress["plan"] == self._plan_digest else None

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a whole tensor."""
        self._write(np.ascontiguousarray(array), self.tensors[name].start)

    def write_rows(self, tier: int, first: int, raw: np.ndarray) -> None:
        """Writes consecutive encoded rows and their checksums.

        Args:
          first: number of the first row within the tier.
          raw: uint8 [n, bytes of a row].
        """
        raw = np.ascontiguousarray(raw)
        self._write(raw, self.tensors[f"rows.{tier}"].start + first * self.layout.tiers[tier].stride)
        sums = np.array([checksum(row) for row in raw], np.uint64)
        self._write(sums, self.tensors["checksums"].start + 8 * (self.layout.first_rows[tier] + first))

    def _write(self, array, start):
        view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], start + done)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; run the same line again") from error

    def record(self, chunks: int) -> None:
        """Notes that the first `chunks` chunks are written."""
        try:
            os.fdatasync(self._fd)  # before the note: a chunk that it counts is never written again
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; run the same line again") from error
        storage.write_json(self._progress, {"plan": self._plan_digest, "chunks": chunks})

    def finish(self) -> None:
        """Gives the whole file its name."""
        os.fsync(self._fd)
        os.replace(self._part, self.path)
        os.remove(self._progress)
        self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
