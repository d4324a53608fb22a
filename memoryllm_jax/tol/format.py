"""The ToL file: a safetensors file whose rows can be read by position. docs/tol.md is its specification."""

import hashlib
import math
import os
import re
from typing import NamedTuple

import ml_dtypes
import numpy as np
import xxhash

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.records import Count, Record, Size
from memoryllm_jax.common.safetensors_header import Tensor, read_header
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.tol import header
from memoryllm_jax.tol.header import Place
from memoryllm_jax.tol.layout import Layout

VERSION = 1
ALIGN = 4096  # bytes: the data, and the rows of each tier, begin at a multiple of a disk's block
# NumPy has no bfloat16: BF16 is read as its bit patterns.
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "BF16": np.uint16}
_PADDING = r"padding(\.\d+)?"
_METADATA = frozenset(  # keys that every file has; files of earlier versions have no others
    (
        "format",
        "version",
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
)


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
      metadata: {key: text}, to which the header's checksum is added.
    """
    places: dict[str, Place] = {}
    offset = 0

    def add(name, dtype, shape):
        nonlocal offset
        end = offset + math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        places[name] = Place(dtype, shape, offset, end)
        offset = end

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
    first = header.to_bytes(metadata, places, ALIGN)
    tensors = {name: Tensor(p.dtype, p.shape, len(first) + p.start, len(first) + p.end) for name, p in places.items()}
    return FilePlan(first, tensors, len(first) + offset)


def checksum(row: np.ndarray) -> int:
    """XXH3-64 of a row's bytes."""
    return xxhash.xxh3_64_intdigest(row)


def text_checksum(array: np.ndarray) -> str:
    """XXH3-64 of a tensor's bytes in the form that metadata holds: 16 hexadecimal digits."""
    return f"{checksum(array.reshape(-1).view(np.uint8)):016x}"


def _short(layers: list[int]) -> str:
    """A list of layers for an error message, cut to its first ones."""
    return str(layers) if len(layers) <= 16 else f"{layers[:16]} and {len(layers) - 16} more"


class TolFile:
    """A ToL file opened for reading. Its header is checked: it must be consistent and fit the size of the file.

    Attributes:
      path: of the file.
      fd: its file descriptor; None once it is closed.
      size: bytes of the file.
      layout: what rows hold.
      tensors: {name: Tensor}.
      data_start: the first byte of the tensors' data.
      metadata: {key: text} as in docs/tol.md.
      vocab_size: V, the number of rows.
      step: training step of the checkpoint that it was made from.
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
        expected = "a ToL file"
        found = read_header(self.fd, self.path, expected)
        self.size, self.data_start = found.size, found.data_start
        self.tensors, self.metadata = found.tensors, found.metadata
        kind, version = (self.metadata.get(key, "")[:100] for key in ("format", "version"))
        if kind != "memoryllm_tol" or version != str(VERSION):
            raise UserError(
                f"{self.path}: expected {expected} of version {VERSION}, found format {kind!r} version {version!r}"
            )
        header.check(found, self.path, _METADATA)
        self._parse_metadata()
        self._check_layers()
        self._check_tensors()

    def _parse_metadata(self):
        absent = sorted(_METADATA - self.metadata.keys())
        if absent:
            raise UserError(f"{self.path}: expected metadata {absent[0]}, found none")
        self.vocab_size = self._metadata_json("vocab_size", Size)
        self.step = self._metadata_json("step", Count)
        self.layout = Layout.from_json(self.metadata["layout"], f"{self.path}: layout")
        self._tensor_checksums = self._metadata_json("tensor_checksums", dict[str, str])
        for key in ("rows_digest", "decoder_digest", "tokenizer_digest"):
            if not re.fullmatch("[0-9a-f]{1,128}", self.metadata[key]):
                raise UserError(f"{self.path}: {key}: expected hexadecimal digits, found {self.metadata[key][:100]!r}")

    def _metadata_json(self, key, kind):
        return records.parse(kind, self.metadata[key], f"{self.path}: {key}")

    def _check_layers(self):
        for key, expected in (
            ("kept_layers", self.layout.kept_layers()),
            ("dropped_layers", self.layout.dropped_layers()),
        ):
            found = self._metadata_json(key, list[Count])
            if found != expected:
                raise UserError(
                    f"{self.path}: {key}: expected {_short(expected)}, as in the layout, found {_short(found)}"
                )

    def _check_tensors(self):
        layout, V = self.layout, self.vocab_size
        if layout.rows != V:
            raise UserError(f"{self.path}: vocab_size: expected {layout.rows}, the rows of the layout, found {V}")
        # Their dtypes are free: rows are read as bytes.
        rows = {f"rows.{number}": tier.rows * tier.stride for number, tier in enumerate(layout.tiers)}
        for name, size in rows.items():
            found = self._tensor(name)
            if found.end - found.start != size:
                raise UserError(f"{self.path}: tensor {name}: expected {size} bytes, found {found.end - found.start}")
        exact = {"row_of_token": ("I32", (V,)), "checksums": ("U64", (V,))}
        exact |= {f"basis.{name}": ("BF16", (rank, layout.dim)) for name, rank in layout.rotated.items()}
        if "counts" in self.tensors:
            exact["counts"] = ("I64", (V,))
        for name, expected in exact.items():
            found = self._tensor(name)
            if (found.dtype, found.shape) != expected:
                raise UserError(f"{self.path}: tensor {name}: expected {expected}, found {(found.dtype, found.shape)}")
        self._tensor("tokenizer")
        # Rows have checksums of their own; nobody uses the bytes of the padding.
        unsummed = rows.keys() | {"checksums"} | {name for name in self.tensors if re.fullmatch(_PADDING, name)}
        summed = self.tensors.keys() - unsummed
        different = sorted(summed ^ self._tensor_checksums.keys())
        if different:
            problem = f"expected one for each of {len(summed)} tensors"
            raise UserError(f"{self.path}: tensor_checksums: {problem}, found a difference in {different[0][:100]!r}")

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path}: expected a tensor {name}, found none")
        return self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        """Reads a whole tensor and verifies its checksum. BF16 comes as bit patterns, uint16. Raises: UserError."""
        tensor = self.tensors[name]
        return self._read_bytes(name).view(_DTYPES[tensor.dtype]).reshape(tensor.shape)

    def verify(self) -> None:
        """Verifies the checksums of all tensors that have one; rows have their own. Raises: UserError."""
        for name in self._tensor_checksums:
            self._read_bytes(name)

    def _read_bytes(self, name: str) -> np.ndarray:
        """A whole tensor, uint8 [bytes], after its checksum was verified."""
        tensor = self.tensors[name]
        out = np.empty(tensor.end - tensor.start, np.uint8)
        self._read_into(memoryview(out), tensor.start, name)
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


def to_replace(path: str) -> dict[str, str] | None:
    """The metadata of the ToL file that a new one at `path` would replace; None where there is no file.

    Raises: ArgumentError for the output, if something other than a ToL file is there.
    """
    if not os.path.exists(path):
        return None
    try:
        found = TolFile(path)
    except UserError as error:
        expected = "expected a name that is free, or the name of a ToL file to replace"
        raise ArgumentError("output", f"{expected}, found another file: {error}") from error
    found.close()
    return found.metadata


class _Progress(Record):
    """How far an unfinished file is.

    Attributes:
      plan: digest of what is written, and in which chunks.
      chunks: number of chunks that are on disk.
    """

    plan: str
    chunks: Count


class TolWriter:
    """Writes a ToL file of a known layout in any order, and gives the file its name when it is whole.

    Until then the file is PATH.part. PATH.part.progress says how many chunks are on disk, so that a build that was
    killed goes on.

    Args:
      path: of the finished file.
      layout, extra, metadata: as of `plan`.
      chunking: names the chunks that rows are written in. An unfinished file of another header or other chunks is
        started anew.
    Raises: UserError if the file does not fit the disk or cannot be written.
    """

    def __init__(self, path: str, layout: Layout, extra, metadata, chunking: str):
        self.path, self.layout = path, layout
        # Not `storage.replaced`, which removes the partial file on an error: a build that was stopped goes on with it.
        self._part, self._progress = f"{path}.part", f"{path}.part.progress"
        self._header, self.tensors, self.size = plan(layout, extra, metadata)
        # The header has the checksums of all tensors but the rows, and the digests of the weights that rows come from.
        self._plan_digest = hashlib.sha256(self._header + chunking.encode()).hexdigest()
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
            if self.done() is None:
                self._check_own()
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

    def _check_own(self):
        """Refuses to overwrite a file under the partial name that no writer of ToL files began."""
        first = os.pread(self._fd, ALIGN, 0)
        # A writer that was killed early may have left only zeros.
        if first.strip(b"\0") and b'"format": "memoryllm_tol"' not in first:
            raise UserError(f"{self._part}: expected an unfinished ToL file, which is overwritten; found another file")

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
        progress = records.read(_Progress, self._progress, "the progress of an unfinished ToL file")
        return progress.chunks if progress.plan == self._plan_digest else None

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
