"""The ToL file opened for reading: a safetensors file whose rows can be read by position, as docs/tol.md specifies."""

import os
import re

import ml_dtypes
import numpy as np
import xxhash

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.records import Count, Size
from memoryllm_jax.common.safetensors_header import Tensor, read_header
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.tol import header
from memoryllm_jax.tol.layout import Layout

VERSION = 1
ALIGN = 4096  # bytes: the data, and the rows of each tier, begin at a multiple of a disk's block
# NumPy has no bfloat16: BF16 is read as its bit patterns.
DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "BF16": np.uint16}
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


def checksum(row: np.ndarray) -> int:
    """XXH3-64 of a row's bytes."""
    return xxhash.xxh3_64_intdigest(row)


def text_checksum(array: np.ndarray) -> str:
    """XXH3-64 of a tensor's bytes in the form that metadata holds: 16 hexadecimal digits."""
    return f"{checksum(array.reshape(-1).view(np.uint8)):016x}"


def open_regular(path: str, expected: str) -> int:
    """Opens a local file for reading. Returns: its descriptor. Raises: UserError, also for a folder or a pipe."""
    if storage.is_url(path):
        raise UserError(f"{path}: expected {expected} on a disk, found a URL; copy the file to a disk first")
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError(f"{path}: expected {expected}, found a folder or a special file")
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: expected {expected}: {error.strerror}") from error


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
        self.fd = open_regular(path, "a ToL file")
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
        found = read_header(self.fd, self.path, expected, header.MOST_BYTES)
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
        dropped = self._metadata_json("dropped_layers", list[Count])
        # Counted first: a list of as many layers as the layout claims might be far larger than the file.
        if len(dropped) != self.layout.dropped_count:
            expected = f"{self.layout.dropped_count} layers, as many as some tier of the layout lacks"
            raise UserError(f"{self.path}: dropped_layers: expected {expected}, found {len(dropped)}")
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
        return self._read_bytes(name).view(DTYPES[tensor.dtype]).reshape(tensor.shape)

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

    def holds(self, layer: int) -> np.ndarray:
        """bool [V], whether each token's row holds a vector of this layer."""
        tiers = [any(part.layer == layer for part in tier.parts) for tier in self.layout.tiers]
        return np.array(tiers)[self.tier_of_row[self.row_of_token]]

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
        names = [
            ("vocabulary", mine["vocab_size"], str(config.vocab_size)),
            ("width", str(self.layout.dim), str(config.dim)),
            ("layers", str(self.layout.layers), str(config.layers)),
            ("architecture", mine["architecture"], config.architecture),
        ]
        digests = [
            ("tokenizer", mine["tokenizer_digest"], tokenizer_digest),
            ("parameters", mine["decoder_digest"], decoder_digest or mine["decoder_digest"]),
        ]
        different = [f"{what} {a} in the file, {b} in the model" for what, a, b in names if a != b]
        # The first 12 digits are enough to tell digests apart.
        different += [f"{what} {a[:12]} in the file, {b[:12]} in the model" for what, a, b in digests if a != b]
        if different:
            raise UserError(
                f"{self.path}: made for another model (its step {mine['step']}): {'; '.join(different)}; "
                "run precompute on this checkpoint"
            )

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
