"""Reads files of token-wise lookups (ToL). docs/tol.md of memoryllm_jax specifies them.

A file is read correctly or refused with a ValueError, whatever it holds: every field is checked before anything of the
size that it states is allocated. From top to bottom: header, layout, rows (`Tol`), codec.
"""

import itertools
import json
import math
import os
import re
import weakref
import zlib
from typing import NamedTuple

import numpy as np
import torch

try:  # transformers asks for every package imported outside of `try`, and only ToL files need this one
    import xxhash
except ImportError:
    xxhash = None


def check_ids(ids, vocab_size):
    """Raises: ValueError if a token id is not from 0 to vocab_size - 1."""
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids: expected ids from 0 to {vocab_size - 1}, found {low if low < 0 else high}")


class Json:
    """A value in parsed JSON that anyone may have written, with its name in error messages."""

    def __init__(self, value, name):
        self.value = value
        self.name = name

    @classmethod
    def parse(cls, text, name):
        """Parses bytes or a text. Raises: ValueError."""
        try:
            return cls(json.loads(text), name)
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise ValueError(f"{name}: expected JSON, found what cannot be parsed: {error}") from None

    def refuse(self, expected):
        """Raises the ValueError for this value."""
        is_group = isinstance(self.value, (dict, list))
        found = f"a {type(self.value).__name__}" if is_group else repr(self.value)[:80]
        raise ValueError(f"{self.name}: expected {expected}, found {found}")

    def integer(self, low, high):
        if type(self.value) is not int or not low <= self.value <= high:  # not isinstance: true is no number here
            self.refuse(f"a whole number from {low} to {high}")
        return self.value

    def of(self, kind, expected):
        if not isinstance(self.value, kind):
            self.refuse(expected)
        return self.value

    def items(self):
        return [Json(item, f"{self.name}[{i}]") for i, item in enumerate(self.of(list, "a list"))]

    def fields(self):
        return {key: Json(value, f"{self.name}.{key[:80]}") for key, value in self.of(dict, "an object").items()}

    def __getitem__(self, key):
        fields = self.fields()
        if key not in fields:
            self.refuse(f"a field {key}")
        return fields[key]


class Tensor(NamedTuple):
    """A tensor of the file: its dtype, its shape, and its first byte and the one after its last."""

    dtype: str
    shape: tuple
    start: int
    end: int


class Part(NamedTuple):
    """A vector of a row: its name (`x0` or `ffn.L`), its bands [(elements, bits each)], and whether it is rotated."""

    name: str
    bands: list
    rotated: bool

    @property
    def rank(self):
        """Elements stored."""
        return sum(size for size, _ in self.bands)


class Tier(NamedTuple):
    """Rows that have the same parts in the same encoding."""

    rows: int
    parts: list

    @property
    def stride(self):
        """Bytes of a row."""
        return sum(_band_bytes(size, bits) for part in self.parts for size, bits in part.bands)


_ITEM_BYTES = {"U8": 1, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "U64": 8}
_MOST_BYTES = 2**53  # sizes up to here are exact in every reader of JSON
_MAX_HEADER = 100_000_000  # bytes: readers of safetensors accept no more
_METADATA = {  # keys that every file has
    "format", "version", "layout", "vocab_size", "architecture", "step", "dtype", "codec", "kept_layers",
    "dropped_layers", "rows_digest", "decoder_digest", "tokenizer_kind", "tokenizer_digest", "tensor_checksums",
}  # fmt: skip


def _read_header(file, path):
    """Reads the header of a safetensors file.

    Returns: ({key: text} of the metadata, {name: Tensor}).
    Raises: ValueError if the header is damaged, or its tensors do not fill the file exactly.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_read_at(file, 0, min(8, size), path), "little")
    if size < 8 or not 0 < length <= min(_MAX_HEADER, size - 8):
        raise ValueError(f"{path}: expected a ToL file, found a header of {length} bytes in a file of {size}")
    text = _read_at(file, 8, length, path)
    header = Json.parse(text, path)
    metadata = {key: value.of(str, "a text") for key, value in header["__metadata__"].fields().items()}
    _check_header(text, metadata, path)
    tensors, end = {}, 8 + length
    entries = [(name, _entry(entry)) for name, entry in header.fields().items() if name != "__metadata__"]
    # In the order of the data; an empty tensor comes before the one that begins at the same byte.
    for name, (dtype, shape, begin, stop) in sorted(entries, key=lambda item: item[1][2:]):
        if begin != end - 8 - length:
            raise ValueError(f"{path}.{name}.data_offsets: expected {end - 8 - length} first, found {begin}")
        end = 8 + length + stop
        tensors[name] = Tensor(dtype, shape, 8 + length + begin, end)
    if end != size:
        raise ValueError(f"{path}: bytes: expected {end}, found {size}; the file is truncated or damaged")
    return metadata, tensors


def _check_header(text, metadata, path):
    """Checks that the metadata is that of a ToL file, and the checksum of the header. Raises: ValueError."""
    for name, expected in {"format": "memoryllm_tol", "version": "1"}.items():
        if metadata.get(name) != expected:
            raise ValueError(f"{path}: {name}: expected {expected}, found {metadata.get(name, 'none')[:80]}")
    missing = sorted(_METADATA - metadata.keys())
    if missing:
        raise ValueError(f"{path}: {missing[0]}: expected a text in the metadata, found none")
    if "header_checksum" in metadata:
        digits = metadata["header_checksum"]
        if not re.fullmatch("[0-9a-f]{16}", digits):
            raise ValueError(f"{path}: header_checksum: expected 16 hexadecimal digits, found {digits[:80]!r}")
        # The checksum is that of the header with zeros in its place.
        expected = xxhash.xxh3_64_hexdigest(text.replace(digits.encode(), b"0" * 16))
        if digits != expected:
            raise ValueError(f"{path}: header_checksum: expected {expected}, found {digits[:80]}; it is damaged")
    elif metadata.keys() != _METADATA:
        # Files of earlier versions have no checksum and no other keys: the name of the checksum itself is damaged.
        raise ValueError(f"{path}: header_checksum: expected a checksum, found none; the header is damaged")


def _entry(entry):
    """(dtype, shape, first byte, end) of a tensor, counted from the start of the data. Raises: ValueError."""
    dtype = entry["dtype"].of(str, "a text")
    if dtype not in _ITEM_BYTES:
        entry["dtype"].refuse("one of " + ", ".join(_ITEM_BYTES))
    shape = tuple(axis.integer(0, _MOST_BYTES) for axis in entry["shape"].items())
    offsets = [offset.integer(0, _MOST_BYTES) for offset in entry["data_offsets"].items()]
    size = math.prod(shape) * _ITEM_BYTES[dtype]  # integers of Python do not overflow
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        entry["data_offsets"].refuse(f"begin and end, {size} bytes apart,")
    return dtype, shape, *offsets


class Layout:
    """How the rows of a file are encoded: docs/tol.md, section Layout.

    Args:
      metadata: {key: text} of the file.
      path: of the file, for error messages.
      config: MemoryLLMConfig of the model that reads it.
    Raises: ValueError for a layout that is damaged or of another model.
    """

    def __init__(self, metadata, path, config):
        tree = Json.parse(metadata["layout"], f"{path}: layout")
        self.dim = tree["dim"].integer(config.hidden_size, config.hidden_size)
        self.layers = tree["layers"].integer(config.num_hidden_layers, config.num_hidden_layers)
        # Rows hold the input embedding exactly if the head is another matrix, which the model has.
        self.has_x0 = tree["has_x0"].of(bool, "true or false")
        if self.has_x0 == config.tie_word_embeddings:
            tree["has_x0"].refuse(f"{not config.tie_word_embeddings}, as the model's embeddings demand")
        self.tiers = [self._tier(tier, config.vocab_size) for tier in tree["tiers"].items()]
        rows = sum(tier.rows for tier in self.tiers)
        if rows != config.vocab_size:
            raise ValueError(f"{path}: layout.tiers: expected {config.vocab_size} rows in all, found {rows}")
        held = [{part.name for part in tier.parts} for tier in self.tiers]
        names = {layer: f"ffn.{layer}" for layer in range(self.layers)}
        # A part that is missing is read as zeros, so it must be one that the file declares as dropped.
        self._check_layers(metadata, path, "kept_layers", [n for n in names if any(names[n] in h for h in held)])
        self._check_layers(metadata, path, "dropped_layers", [n for n in names if any(names[n] not in h for h in held)])

    def _check_layers(self, metadata, path, key, expected):
        """Raises: ValueError if a list of layers in the metadata is not the one that follows from the layout."""
        found = Json.parse(metadata[key], f"{path}: {key}")
        if found.value != expected:
            raise ValueError(
                f"{found.name}: expected {str(expected)[:80]}, as in the layout, found {metadata[key][:80]}"
            )

    def _tier(self, tree, most_rows):
        names = ["x0"] if self.has_x0 else []
        names += [f"ffn.{layer}" for layer in range(self.layers)]
        parts = [self._part(part) for part in tree["parts"].items()]
        found = [part.name for part in parts]
        # In the order of the layers, each at most once; x0 is in every tier.
        if found != [name for name in names if name in found or name == "x0"]:
            expected = f"some of {names[0]} to {names[-1]}, in this order" + (", with x0" if self.has_x0 else "")
            raise ValueError(f"{tree.name}.parts: expected {expected}, found {', '.join(found)[:80] or 'none'}")
        return Tier(tree["rows"].integer(1, most_rows), parts)

    def _part(self, tree):
        bands = []
        for band in tree["bands"].items():
            bits = band["bits"].integer(2, 32)
            if bits not in (2, 3, 4, 5, 6, 7, 8, 16, 32):
                band["bits"].refuse("2 to 8, 16 or 32")
            bands.append((band["size"].integer(1, self.dim), bits))
        rotated = tree["rotated"].of(bool, "true or false")
        part = Part(tree["name"].of(str, "a text"), bands, rotated)
        if not 1 <= part.rank <= self.dim or (part.rank < self.dim and not rotated):
            expected = f"1 to {self.dim}" if rotated else self.dim
            raise ValueError(f"{tree.name}.bands: expected {expected} elements, found {part.rank}")
        return part

    def ranks(self):
        """{name: largest rank} of the rotated parts."""
        out = {}
        for tier in self.tiers:
            for part in tier.parts:
                if part.rotated:
                    out[part.name] = max(out.get(part.name, 0), part.rank)
        return out

    def tensors(self, vocab_size):
        """{name: (dtypes, bytes)} of the tensors that the file must have."""
        out = {"row_of_token": (["I32"], 4 * vocab_size), "checksums": (["U64"], 8 * vocab_size)}
        for number, tier in enumerate(self.tiers):
            out[f"rows.{number}"] = (["U8", "BF16", "F32"], tier.rows * tier.stride)
        for name, rank in self.ranks().items():
            out[f"basis.{name}"] = (["BF16"], 2 * rank * self.dim)
        return out


# The open files, by number: an operation of torch takes numbers, but no objects of Python.
_OPEN: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class Tol:
    """A ToL file of version 1, read row by row.

    Args:
      path: path of the file.
      config: MemoryLLMConfig of the model that reads it.
    Attributes:
      path: path of the file.
      has_x0: whether the rows hold X_0 too, which they do if the embedding is untied.
      decoder_digest: digest of the weights that the rows belong to.
    Raises: ValueError for a damaged file or one of another model.
    """

    def __init__(self, path, config):
        if xxhash is None:
            raise ImportError("tol: expected the package xxhash, which checks what is read: pip install xxhash")
        self.path = path
        self._config = config
        try:
            self._file = open(path, "rb")
        except OSError as error:
            raise ValueError(f"{path}: expected a ToL file: {error.strerror}") from error
        weakref.finalize(self, self._file.close)
        metadata, self._tensors = _read_header(self._file, path)
        if metadata["vocab_size"] != str(config.vocab_size):
            raise ValueError(f"{path}: vocab_size: expected {config.vocab_size}, found {metadata['vocab_size'][:80]}")
        self.decoder_digest = metadata["decoder_digest"]
        self._layout = Layout(metadata, path, config)
        self.has_x0 = self._layout.has_x0
        self._dim = self._layout.dim
        self._first_ffn = 1 if self.has_x0 else 0  # place of layer 0 among a token's vectors
        self._vectors = self._first_ffn + self._layout.layers  # of a token
        self._check_tensors(metadata)
        self._row_of_token = np.frombuffer(self._read("row_of_token"), "<i4")
        if not np.array_equal(np.sort(self._row_of_token), np.arange(config.vocab_size)):
            raise ValueError(f"{path}: row_of_token: expected each row once, found others")
        self._checksums = np.frombuffer(self._read("checksums"), "<u8")
        self._first_rows = np.cumsum([0] + [tier.rows for tier in self._layout.tiers])  # of each tier, and the end
        self._bases = {
            name: _bfloat16(self._read(f"basis.{name}")).reshape(-1, self._dim) for name in self._layout.ranks()
        }
        self._number = next(_NUMBERS)
        _OPEN[self._number] = self

    def __deepcopy__(self, memo):
        return self  # nothing in it changes, so that copies of a model share the open file

    def __reduce__(self):
        return Tol, (os.path.abspath(self.path), self._config)

    def _check_tensors(self, metadata):
        """Checks sizes, and all tensors but the rows, each of which is checked when it is read. Raises: ValueError."""
        for name, (dtypes, size) in self._layout.tensors(self._config.vocab_size).items():
            tensor = self._tensors.get(name)
            found = "none" if tensor is None else f"{tensor.end - tensor.start} bytes of {tensor.dtype}"
            if tensor is None or tensor.dtype not in dtypes or tensor.end - tensor.start != size:
                raise ValueError(
                    f"{self.path}: tensor {name}: expected {size} bytes of {' or '.join(dtypes)}, found {found}"
                )
        sums = Json.parse(metadata["tensor_checksums"], f"{self.path}: tensor_checksums")
        for name in self._tensors:
            if re.fullmatch(r"rows\.\d+|padding(\.\d+)?|checksums", name):
                continue  # rows have checksums of their own, and nobody uses padding
            if f"{xxhash.xxh3_64_intdigest(self._read(name)):016x}" != sums[name].value:
                raise ValueError(f"{self.path}: tensor {name}: expected its checksum, found another; it is damaged")

    def __call__(self, ids, dtype):
        """Looks up the rows of token ids.

        Args:
          ids: token ids [B, T].
          dtype: of the results, which are on the device of the ids.
        Returns: (X_0 [B, T, D], or None if the embedding is tied; FFN-M outputs [B, T, L, D]).
        Raises: ValueError for an id out of range or a damaged row.
        """
        found = _look_up(ids, self._number, self._vectors, self._dim, dtype)
        x0 = found[:, :, 0] if self.has_x0 else None
        return x0, found[:, :, self._first_ffn :]

    def look_up(self, ids, dtype):
        """All vectors of the ids: X_0, if the rows hold it, and the FFN-M outputs, [B, T, 1 + L or L, D]."""
        on_host = ids.cpu()
        check_ids(on_host, len(self._row_of_token))
        unique, index = np.unique(on_host.numpy(), return_inverse=True)
        vectors = np.zeros((len(unique), self._vectors, self._dim), np.float32)
        rows = self._row_of_token[unique]
        tiers = np.searchsorted(self._first_rows, rows, "right") - 1  # the tier that holds each row
        for tier in np.unique(tiers):
            members = np.flatnonzero(tiers == tier)
            raw = np.stack([self._read_row(tier, rows[m], unique[m]) for m in members])
            # A dropped layer has no part in the row: its vector stays zero.
            for name, part in self._decode(tier, raw).items():
                place = 0 if name == "x0" else self._first_ffn + int(name.removeprefix("ffn."))
                vectors[members, place] = part
        # Each distinct row travels to the device once.
        found = torch.from_numpy(vectors).to(ids.device, dtype)
        index = torch.from_numpy(index.reshape(-1)).to(ids.device)
        return found[index].reshape(*ids.shape, self._vectors, self._dim)

    def _read(self, name):
        """The bytes of a tensor."""
        tensor = self._tensors[name]
        return _read_at(self._file, tensor.start, tensor.end - tensor.start, self.path)

    def _read_row(self, tier, row, token):
        """One row as uint8 [bytes]. `row` counts over all tiers. Raises: ValueError if it is damaged."""
        size = self._layout.tiers[tier].stride
        start = self._tensors[f"rows.{tier}"].start + int(row - self._first_rows[tier]) * size
        raw = _read_at(self._file, start, size, self.path)
        if xxhash.xxh3_64_intdigest(raw) != int(self._checksums[row]):
            raise ValueError(f"{self.path}: the row of token {token} is damaged")
        return np.frombuffer(raw, np.uint8)

    def _decode(self, tier, raw):
        """Decodes rows of a tier, uint8 [n, bytes], to {part name: float32 [n, D]}."""
        out = {}
        for part in self._layout.tiers[tier].parts:
            bands = []
            for size, bits in part.bands:
                values, raw = _decode_band(raw, size, bits)
                bands.append(values)
            x = np.concatenate(bands, 1)
            if part.rotated:
                x = x @ self._bases[part.name][: x.shape[1]]
            out[part.name] = x
        return out


def _look_up_rows(ids: torch.Tensor, number: int, vectors: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return _OPEN[number].look_up(ids, dtype)


if hasattr(torch.Tag, "cudagraph_unsafe"):
    # One operation for torch.compile, which cannot look into the reading of a file. Its name contains that of this
    # module, as each model in a process may bring its own copy of this file.
    _look_up = torch.library.custom_op(
        f"memoryllm_{zlib.crc32(__name__.encode()):08x}::look_up",
        _look_up_rows,
        mutates_args=(),
        tags=[torch.Tag.cudagraph_unsafe],  # ids come to the host, which a recorded graph could not repeat
    )

    @_look_up.register_fake
    def _(ids, number, vectors, dim, dtype):
        return ids.new_empty((*ids.shape, vectors, dim), dtype=dtype)
else:  # older versions of torch, where a graph ends before the lookup and another begins after it
    _look_up = torch.compiler.disable(_look_up_rows)


def _read_at(file, start, size, path):
    """`size` bytes from byte `start`. Raises: ValueError if the file has become shorter."""
    pieces = []
    while size:
        # pread does not move the file's position, so threads may share the file. It may return fewer bytes than asked.
        piece = os.pread(file.fileno(), size, start)
        if not piece:
            raise ValueError(f"{path}: expected {size} bytes from byte {start}, found none; the file is truncated")
        pieces.append(piece)
        start, size = start + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _bfloat16(raw):
    """bfloat16 bytes as float32. NumPy lacks bfloat16, whose bits are the upper half of those of a float32."""
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


def _groups(size):
    """(groups of a band, elements of a group) that share one scale each."""
    # 64 elements a group; a shorter band is one group, padded to a multiple of 8 elements.
    group = 64 if size >= 64 else -(-size // 8) * 8
    return -(-size // group), group


def _band_bytes(size, bits):
    """Bytes of a band of `size` elements."""
    if bits >= 16:
        return size * bits // 8
    groups, group = _groups(size)
    return 2 * groups + groups * group * bits // 8


def _decode_band(raw, size, bits):
    """Decodes the band at the start of each row.

    Args:
      raw: what is still to decode of the rows, uint8 [n, bytes].
      size: elements in the band.
      bits: bits per element: 32 (float32), 16 (bfloat16) or fewer (scaled integers).
    Returns: (the values, float32 [n, size]; the bytes after the band, uint8 [n, fewer bytes]).
    """
    n = len(raw)
    end = _band_bytes(size, bits)
    if bits >= 16:
        content = np.ascontiguousarray(raw[:, :end])
        values = _bfloat16(content) if bits == 16 else content.view("<f4")
        return values.reshape(n, size), raw[:, end:]
    groups, group = _groups(size)
    scales = _bfloat16(np.ascontiguousarray(raw[:, : 2 * groups])).reshape(n, groups, 1)
    codes = raw[:, 2 * groups : end]
    if bits < 8:
        # The codes are stored as bit planes: plane i holds bit i of every code.
        planes = np.unpackbits(codes.reshape(n, bits, -1), axis=2, bitorder="little")
        codes = sum(planes[:, i].astype(int) << i for i in range(bits))
    # Code c of b bits means (c - 2^(b-1) + 1/2) scale: the levels lie symmetrically around zero.
    values = (codes.reshape(n, groups, group).astype("<f4") - 2 ** (bits - 1) + 0.5) * scales
    return values.reshape(n, -1)[:, :size], raw[:, end:]
