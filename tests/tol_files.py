"""Helpers for tests of ToL files: an independent reader, rows to build files from, and damaged copies."""

import json
import os
import shutil
import struct

import jax
import numpy as np
import xxhash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lab import opened

from memoryllm_jax import config
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model import sharding
from memoryllm_jax.tol.codec import Band, Part
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.layout import Layout, Tier, decode_rows
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.sources import Identity, read_rows

VOCAB, DIM, LAYERS, CHUNK = 300, 96, 7, 64
TYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "U64": "<u8", "F32": "<f4", "BF16": "<u2"}


class Reader:
    """Reads a whole file: header, rows and values. Written from docs/tol.md alone, without code of the package."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.content = file.read()
        (length,) = struct.unpack("<Q", self.content[:8])
        self.header = json.loads(self.content[8 : 8 + length])
        self.meta = self.header.pop("__metadata__")
        self.check(self.content[8 : 8 + length], 8 + length)
        self.layout = json.loads(self.meta["layout"])
        self.start = 8 + length

    def check(self, text, data):
        """The header's checksum, and `data_offsets` without gaps up to the end of the file."""
        digits = self.meta.get("header_checksum")
        if digits is not None:
            assert digits == xxhash.xxh3_64_hexdigest(text.replace(digits.encode(), b"0" * 16)), "header_checksum"
        at = 0
        for entry in sorted(self.header.values(), key=lambda entry: entry["data_offsets"]):
            begin, end = entry["data_offsets"]
            size = np.prod(entry["shape"], dtype=object) * np.dtype(TYPES[entry["dtype"]]).itemsize
            assert begin == at and end - begin == size, f"data_offsets {begin}, {end}"
            at = end
        assert data + at == len(self.content), "size"

    def at(self, name):
        """The first byte of a tensor, counted from the start of the file."""
        return self.start + self.header[name]["data_offsets"][0]

    def tensor(self, name):
        entry = self.header[name]
        begin, end = (self.start + offset for offset in entry["data_offsets"])
        return np.frombuffer(self.content[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])

    def tensor_at(self, byte):
        """The name of the tensor that this byte of the file belongs to."""
        offset = byte - self.start
        return next(name for name, e in self.header.items() if e["data_offsets"][0] <= offset < e["data_offsets"][1])

    def raw(self, tier):
        """uint8 [rows, bytes of a row]."""
        rows = self.layout["tiers"][tier]["rows"]
        return self.tensor(f"rows.{tier}").reshape(rows, -1).view("u1")

    def tokens(self, tier):
        """Token ids in the order of the tier's rows."""
        first = sum(t["rows"] for t in self.layout["tiers"][:tier])
        return np.argsort(self.tensor("row_of_token"))[first : first + self.layout["tiers"][tier]["rows"]]

    def bands(self, tier):
        """Yields (part, band, its first element, values [rows, size], steps [rows, size] or None for floats)."""
        raw, at = self.raw(tier), 0
        for part in self.layout["tiers"][tier]["parts"]:
            first = 0
            for band in part["bands"]:
                values, steps, used = decode_band(raw[:, at:], band["size"], band["bits"])
                yield part, band, first, values, steps
                at, first = at + used, first + band["size"]
        assert at == raw.shape[1]  # the layout accounts for every byte

    def vectors(self):
        """{part name: float64 [V, D]}; zero where a row holds no such part."""
        dim, layers = self.layout["dim"], self.layout["layers"]
        names = ["x0"] * self.layout["has_x0"] + [f"ffn.{layer}" for layer in range(layers)]
        out = {name: np.zeros((len(self.tensor("row_of_token")), dim)) for name in names}
        for tier in range(len(self.layout["tiers"])):
            tokens = self.tokens(tier)
            for part, _, first, values, _ in self.bands(tier):
                if part["rotated"]:
                    basis = bfloat16(self.tensor(f"basis.{part['name']}"))
                    out[part["name"]][tokens] += values @ basis[first : first + values.shape[1]]
                else:
                    out[part["name"]][tokens, first : first + values.shape[1]] = values
        return out


def bfloat16(bits):
    return (bits.astype("<u4") << 16).view("<f4").astype(np.float64)


def decode_band(raw, size, bits):
    """Decodes the band at the start of the rows, element by element. Returns: (values, steps, bytes used of a row)."""
    rows = len(raw)
    if bits >= 16:
        used = size * bits // 8
        stored = np.ascontiguousarray(raw[:, :used])
        return bfloat16(stored.view("<u2")) if bits == 16 else stored.view("<f4").astype(np.float64), None, used
    group = 64 if size >= 64 else (size + 7) // 8 * 8
    groups = (size + group - 1) // group
    scales = bfloat16(np.ascontiguousarray(raw[:, : 2 * groups]).view("<u2"))
    codes = raw[:, 2 * groups : 2 * groups + groups * group * bits // 8].astype(int)
    values, steps = np.empty((rows, size)), np.empty((rows, size))
    for i in range(size):
        code = codes[:, i] if bits == 8 else 0
        for plane in range(bits if bits < 8 else 0):
            code = code | (codes[:, plane * groups * group // 8 + i // 8] >> i % 8 & 1) << plane
        steps[:, i] = scales[:, i // group]
        values[:, i] = (code - 2 ** (bits - 1) + 0.5) * steps[:, i]
    return values, steps, 2 * groups + codes.shape[1]


class Source:
    """A source of rows for `build`, from a fixed table. With `stop`, it raises as if killed after that many calls."""

    def __init__(self, tokenizer, devices=1, has_x0=True, stop=None):
        self.mesh = sharding.make_mesh(config.MeshConfig(1, -1, 1), jax.devices()[:devices])
        self.vocab_size, self.dim, self.layers, self.has_x0 = VOCAB, DIM, LAYERS, has_x0
        self.identity = Identity("flex-3", 7, "float32", "1" * 64, "2" * 64, tokenizer)
        self.calls, self.stop, self.bits = 0, stop, 32
        rng = np.random.default_rng(0)
        names = ["x0"] * has_x0 + [f"ffn.{layer}" for layer in range(LAYERS)]
        self.table = {name: rng.standard_t(4, (VOCAB, DIM)).astype(np.float32) for name in names}
        self.table["ffn.2"][5] = 0.0  # a group of zeros has no scale
        self.table["ffn.1"] *= 1e-6

    def vectors(self, ids_U):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        where = NamedSharding(self.mesh, P(self.mesh.axis_names))
        ids = np.asarray(ids_U)
        return {name: jax.device_put(rows[ids], where) for name, rows in self.table.items()}


def uniform(bits, has_x0=True, layers=range(LAYERS)):
    """A layout with one tier and the same number of bits for all parts."""
    names = ["x0"] * has_x0 + [f"ffn.{layer}" for layer in layers]
    parts = tuple(Part(name, (Band(DIM, bits),), rotated=False) for name in names)
    return Layout(DIM, LAYERS, has_x0, (Tier(VOCAB, parts),))


def tier(rows, *parts):
    """A tier whose parts are given as (name, rotated, (size, bits), ...), one (size, bits) for each band."""
    return Tier(rows, tuple(Part(name, tuple(Band(*b) for b in bands), rotated) for name, rotated, *bands in parts))


def mixed():
    """A layout with every special case.

    Two tiers, every number of bits, bands longer and shorter than a group, rotated parts, layer 4 dropped, and layer 6
    only in the first tier.
    """
    first = tier(
        110,
        ("x0", False, (DIM, 16)),
        ("ffn.0", True, (64, 8), (20, 5), (5, 3)),
        ("ffn.1", False, (DIM, 7)),
        ("ffn.2", False, (DIM, 4)),
        ("ffn.3", True, (40, 6)),
        ("ffn.5", False, (DIM, 32)),
        ("ffn.6", False, (DIM, 16)),
    )
    second = tier(
        190,
        ("x0", False, (DIM, 8)),
        ("ffn.0", True, (70, 4)),
        ("ffn.1", False, (DIM, 2)),
        ("ffn.2", False, (DIM, 3)),
        ("ffn.3", True, (16, 16), (3, 2)),
        ("ffn.5", False, (31, 6), (65, 5)),
    )
    return Layout(DIM, LAYERS, True, (first, second))


def small():
    """A layout like `mixed` with fewer special cases, which compiles faster."""
    rest = [(f"ffn.{layer}", False, (DIM, 16)) for layer in (1, 2, 5)]
    first = tier(110, ("x0", False, (DIM, 16)), ("ffn.0", True, (70, 16)), ("ffn.3", True, (40, 6)), *rest)
    second = tier(190, ("x0", False, (DIM, 8)), ("ffn.0", True, (89, 16)), ("ffn.3", True, (16, 3)), *rest)
    return Layout(DIM, LAYERS, True, (first, second))


def more():
    """The other arguments that `build` needs for the layouts `mixed` and `small`."""
    rng = np.random.default_rng(1)

    def basis(rank):
        orthonormal = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)[:rank]
        return orthonormal * rng.uniform(0.1, 10, (rank, 1)).astype(np.float32)

    return {
        "order": rng.permutation(VOCAB),
        "counts": rng.integers(0, 1 << 40, VOCAB),
        "bases": {"ffn.0": basis(89), "ffn.3": basis(40)},
        "chunk_rows": CHUNK,
    }


def sealed(header, align=4096):
    """The first bytes of a file with this header, its checksum computed as docs/tol.md says."""
    header["__metadata__"]["header_checksum"] = "0" * 16
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    field = b'"header_checksum": "%s"'
    text = text.replace(field % (b"0" * 16), field % xxhash.xxh3_64_hexdigest(text).encode())
    return struct.pack("<Q", len(text)) + text


def missed_flips(path, bits, check):
    """Flips bits of a file, one at a time. Returns: those that `check(path)` does not refuse."""
    missed = []
    with open(path, "r+b", buffering=0) as file:
        for bit in bits:
            at = int(bit) // 8
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), at)
            try:
                check(path)
                missed.append(bit)
            except UserError:
                pass
            os.pwrite(file.fileno(), bytes([byte]), at)
    check(path)
    return missed


def content(path):
    with open(path, "rb") as file:
        return file.read()


def file_rows(tol):
    """The rows of all tokens as the package decodes them: {part name: [V, D]}."""
    reader = RowReader(tol)
    raw, tier = reader.read(np.arange(tol.vocab_size, dtype=np.int32))
    reader.close()
    bases = {name: tol.basis(name) for name in tol.layout.rotated}
    decoded = jax.jit(lambda raw, tier: decode_rows(tol.layout, raw, tier, bases))(tol.layout.view(raw), tier)
    return {name: np.asarray(x) for name, x in decoded.items()}


def rows_of(tol_or_overlay):
    """The FFN outputs of all tokens of a ToL file or an overlay, [V, layers, D]; those of dropped layers are zero."""
    if isinstance(tol_or_overlay, TolFile):
        return read_rows(tol_or_overlay, np.arange(tol_or_overlay.vocab_size, dtype=np.int32))
    return tol_or_overlay.rows(np.arange(tol_or_overlay.memory.vocab_size, dtype=np.int32))


def damaged_copy(path, damaged, copy):
    """Copies a file and flips one bit in the copy.

    Args:
      damaged: a token id or the name of a tensor: where the bit is.
    Returns: path of the copy.
    """
    shutil.copy(path, copy)
    with opened(copy) as tol:
        if damaged in tol.tensors:
            at = tol.tensors[damaged].start
        else:
            at = int(tol.start_of_row[tol.row_of_token[damaged]]) + 5
    with open(copy, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 64]))
    return str(copy)


def relative(a, b, axis=None):
    """The relative error of `a`: norm of a - b, divided by the norm of b."""
    return np.linalg.norm(np.float64(a) - b, axis=axis) / np.linalg.norm(np.float64(b), axis=axis)
