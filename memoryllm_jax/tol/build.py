"""Builds a ToL file: all devices make and encode rows a chunk of tokens at a time, and the host writes them.

Each device owns a contiguous range of the rows of each tier. Host and devices hold no more than two chunks, so that
the table may be larger than any memory.
"""

import functools
import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.tol import codec
from memoryllm_jax.tol.format import text_checksum
from memoryllm_jax.tol.layout import Layout
from memoryllm_jax.tol.sources import Identity, Source
from memoryllm_jax.tol.writer import TolWriter

CHUNK_ROWS = 1024  # rows that a device makes at a time, at most
_CHUNK_BYTES = 64 << 20  # bytes that the float32 values of these rows take, at most
# The file's names for dtypes of the tensors beside the rows. Bit patterns of bfloat16 are uint16 in NumPy.
_TYPES = {"int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "BF16"}


class _TierChunks:
    """The rows of one tier in chunks. A chunk is a global array in which every device holds rows of its own range.

    Args:
      rows: number of rows in the tier.
      row_elements: elements of a row before it is encoded.
      chunk_rows: rows of a chunk on a device, at most.
    Attributes:
      owned: number of rows that a device owns; the last devices may own fewer.
      size: number of rows of a chunk on each device.
      count: number of chunks.
    """

    def __init__(self, mesh, rows: int, row_elements: int, chunk_rows: int):
        self.rows, self.devices = rows, mesh.size
        self.owned = -(-rows // mesh.size)
        self.size = max(1, min(chunk_rows, _CHUNK_BYTES // (4 * row_elements), self.owned))
        self.count = -(-self.owned // self.size)
        self.sharding = NamedSharding(mesh, P(mesh.axis_names))

    def span(self, device: int, chunk: int) -> tuple[int, int]:
        """First row and number of rows that a device has in a chunk; no rows where its range has ended."""
        first = device * self.owned + chunk * self.size
        end = min(first + self.size, (device + 1) * self.owned, self.rows)
        return min(first, self.rows), max(0, end - first)

    def place(self, values: np.ndarray, chunk: int, fill) -> jax.Array:
        """Puts one value a row on the devices that own the chunk's rows.

        Args:
          values: [rows], the values of the whole tier.
          fill: the value where a device's range has ended.
        Returns: [devices * size], sharded by device.
        """
        out = np.full((self.devices, self.size), fill, values.dtype)
        for device in range(self.devices):
            first, count = self.span(device, chunk)
            out[device, :count] = values[first : first + count]
        return jax.device_put(out.reshape(-1), self.sharding)

    def pieces(self, array: jax.Array, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, rows) for each device that holds rows of a chunk's result."""
        for shard in array.addressable_shards:
            # `start` is None where one device holds the whole array.
            device = (shard.index[0].start or 0) // self.size
            first, count = self.span(device, chunk)
            if count:
                yield first, np.asarray(shard.data)[:count]


def build(
    source: Source,
    layout: Layout,
    output: str,
    order: np.ndarray,
    counts: np.ndarray | None = None,
    bases: dict[str, np.ndarray] | None = None,
    label: str = "precompute",
    chunk_rows: int = CHUNK_ROWS,
) -> str:
    """Writes a ToL file, or goes on with one that was left unfinished.

    Args:
      source: the full rows.
      output: path of the file.
      order: int [V], token ids in the order of the rows.
      counts: int64 [V], how often each token occurs; None where that is not known.
      bases: {part name: [rank, D]} for the layout's rotated parts.
      label: what the progress bar is called.
      chunk_rows: rows that a device makes at a time, at most. An unfinished file goes on only with the same number.
    Returns: one line on what was written. Raises: UserError.
    """
    if jax.process_count() > 1:
        raise UserError(f"{output}: expected one process, which uses all of its devices, found {jax.process_count()}")
    bases = {name: np.asarray(basis).astype(ml_dtypes.bfloat16) for name, basis in (bases or {}).items()}
    arrays = _tensors(source.identity, order, counts, bases)
    metadata = _metadata(source.identity, layout, arrays)
    extra = {name: (_TYPES[array.dtype.name], array.shape) for name, array in arrays.items()}
    writer = TolWriter(output, layout, extra, metadata, f"{source.mesh.size} devices, chunks of {chunk_rows} rows")
    if writer.is_there():
        writer.remove_leftover()
        return f"{output}: is there already, from the same weights; remove it to build it again"
    try:
        writer.begin()
        if writer.done() is None:
            for name, array in arrays.items():
                writer.write(name, array)
            for number, tier in enumerate(layout.tiers):
                if not tier.stride:  # every layer is dropped: no chunk will write the checksums of these empty rows
                    writer.write_rows(number, 0, np.empty((tier.rows, 0), np.uint8))
            writer.record(0)
        _write_tiers(source, layout, writer, order, bases, label, chunk_rows)
        writer.finish()
    finally:
        writer.close()
    return f"{output}: {layout.codec()}, {layout.rows:,} rows, {writer.size:,} bytes"


def _tensors(identity: Identity, order, counts, bases) -> dict[str, np.ndarray]:
    """{name: array} of the tensors other than the rows and their checksums; bases as bit patterns, uint16."""
    row_of_token = np.empty(len(order), np.int32)
    row_of_token[order] = np.arange(len(order))
    arrays = {"row_of_token": row_of_token, "tokenizer": np.frombuffer(identity.tokenizer.content, np.uint8)}
    if counts is not None:
        arrays["counts"] = counts.astype(np.int64)
    for name, basis in bases.items():
        arrays[f"basis.{name}"] = basis.view(np.uint16)
    return arrays


class _Chunk(NamedTuple):
    """Encoded rows on the devices.

    Attributes:
      tier: number of the tier.
      number: number of the chunk within the tier.
      raw: uint8 [devices * size, bytes of a row].
    """

    tier: int
    number: int
    raw: jax.Array


def _write_tiers(source: Source, layout: Layout, writer: TolWriter, order, bases, label, chunk_rows):
    """Makes and writes the rows of all tiers, from the first chunk that is not on disk yet."""
    replicated = NamedSharding(source.mesh, P())
    # Arguments of the encoders: as constants they would be compiled into every one of them.
    bases = {name: jax.device_put(basis, replicated) for name, basis in bases.items()}
    row_elements = layout.dim * (layout.layers + layout.has_x0)
    tiers = [_TierChunks(source.mesh, tier.rows, row_elements, chunk_rows) for tier in layout.tiers]
    encoders = [
        jax.jit(functools.partial(codec.encode, tier.parts), out_shardings=chunks.sharding)
        for tier, chunks in zip(layout.tiers, tiers)
    ]
    tokens = [order[first : first + tier.rows].astype(np.int32) for first, tier in zip(layout.first_rows, layout.tiers)]

    def make(tier, number) -> _Chunk:
        # Devices without rows of their own compute some token again, which `pieces` leaves out.
        ids = tiers[tier].place(tokens[tier], number, fill=tokens[tier][0])
        return _Chunk(tier, number, encoders[tier](source.vectors(ids), bases))

    def write(chunk: _Chunk):
        for first, rows in tiers[chunk.tier].pieces(chunk.raw, chunk.number):
            writer.write_rows(chunk.tier, first, rows)

    stored = [tier for tier, spec in enumerate(layout.tiers) if spec.stride]
    work = [(tier, number) for tier in stored for number in range(tiers[tier].count)]
    written = writer.done() or 0
    if written > len(work):
        raise UserError(f"{writer.path}.part.progress: chunks: expected at most {len(work)}, found {written}")
    progress = Progress(label, len(work), "chunk", initial=written)
    if written:
        progress.line(f"going on from chunk {written} of {len(work)}")
    for chunk in _one_ahead(make(tier, number) for tier, number in work[written:]):
        write(chunk)
        written += 1
        writer.record(written)
        progress.update(written)
    progress.close()


def _one_ahead(chunks: Iterator[_Chunk]) -> Iterator[_Chunk]:
    """Yields each chunk when the next one is dispatched: the devices make that one while the host writes this one."""
    held = next(chunks, None)
    for upcoming in chunks:
        yield held
        held = upcoming
    if held is not None:
        yield held


def _metadata(identity: Identity, layout: Layout, arrays: dict) -> dict[str, str]:
    sums = {name: text_checksum(array) for name, array in arrays.items()}
    return {
        "format": "memoryllm_tol",
        "version": "1",
        "architecture": identity.architecture,
        "vocab_size": str(layout.rows),
        "codec": layout.codec(),
        "dtype": identity.dtype,
        "kept_layers": json.dumps(layout.kept_layers()),
        "dropped_layers": json.dumps(layout.dropped_layers()),
        "step": str(identity.step),
        "rows_digest": identity.rows_digest,
        "decoder_digest": identity.decoder_digest,
        "tokenizer_kind": identity.tokenizer.kind,
        "tokenizer_digest": identity.tokenizer.digest,
        "tensor_checksums": json.dumps(sums),
        "layout": json.dumps(layout.to_json()),
    }


# The least length of a stored basis vector, as a share of the longest. Squares of singular values come from sums in
# float32, which err by some 1e-7 of the largest: singular values below this share are noise, or zero.
_LEAST_LENGTH = 1e-3


class Basis(NamedTuple):
    """Right singular vectors of a part's rows, strongest first.

    Attributes:
      squares: float64 [D], the weighted means over tokens of the squared coefficients; in proportion to the squares of
        the singular values.
      vectors: float32 [D, D], one singular vector in each row.
    """

    squares: np.ndarray
    vectors: np.ndarray

    @property
    def stored(self) -> np.ndarray:
        """The basis as a file stores it, bfloat16 [D, D]: each vector times the size of its coefficients.

        The coefficients that rows store are divided by that size. So those that share a scale have the same size; were
        they left in falling order of size, the scale of the largest would be far too coarse for the rest.
        """
        sizes_D = np.sqrt(self.squares)
        least = _LEAST_LENGTH * sizes_D.max()
        # The vectors stay as they are where all rows are zero.
        lengths_D = np.maximum(sizes_D, least) if least else np.ones_like(sizes_D)
        return (self.vectors * lengths_D[:, None]).astype(ml_dtypes.bfloat16)


def singular_bases(
    source: Source, names: list[str], weights_V: np.ndarray, chunk_rows: int = CHUNK_ROWS
) -> dict[str, Basis]:
    """The singular vectors of the rows of parts over all tokens, and the sizes of the coefficients.

    They are found as eigenvectors of a [D, D] matrix, so that memory does not grow with the vocabulary.

    Args:
      names: names of the parts.
      weights_V: float [V], how much each token's row counts.
      chunk_rows: rows that a device makes at a time, at most.
    Returns: {part name: Basis}.
    """
    # The weights add up to 1, so that sums are means.
    grams = _weighted_grams(source, names, weights_V / weights_V.sum(), chunk_rows) if names else {}
    return {name: _eigenvectors(gram) for name, gram in grams.items()}


def _weighted_grams(source, names, weights_V, chunk_rows) -> dict[str, np.ndarray]:
    """{part name: sum over tokens of weight * x x^T, float32 [D, D]}."""
    row_elements = source.dim * (source.layers + source.has_x0)
    chunks = _TierChunks(source.mesh, source.vocab_size, row_elements, chunk_rows)
    ids = np.arange(source.vocab_size, dtype=np.int32)
    weights_V = weights_V.astype(np.float32)

    @functools.partial(jax.jit, out_shardings=NamedSharding(source.mesh, P()))
    def add(total, vectors, weights_U):
        def gram(name):
            x_UD = vectors[name].astype(jnp.float32)
            # "highest": accelerators would otherwise round float32 products to bfloat16 or TF32.
            return jnp.einsum("ud,ue->de", x_UD * weights_U[:, None], x_UD, precision="highest")

        return {name: total[name] + gram(name) for name in names}

    total = {name: jnp.zeros((source.dim, source.dim), jnp.float32) for name in names}
    progress = Progress("singular vectors", chunks.count, "chunk")
    for chunk in range(chunks.count):
        vectors = source.vectors(chunks.place(ids, chunk, fill=0))
        total = add(total, vectors, chunks.place(weights_V, chunk, fill=0))  # rows that only fill up have weight 0
        progress.update(chunk + 1)
    progress.close()
    return jax.device_get(total)


def _eigenvectors(gram: np.ndarray) -> Basis:
    # eigh gives values in rising order and vectors as columns. Rounding may make the smallest values negative.
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    return Basis(values[::-1].clip(0), np.ascontiguousarray(vectors[:, ::-1].T).astype(np.float32))
