"""Builds a ToL file: rows are made in chunks of tokens on all devices, encoded there, and written where they belong.

Each device owns a contiguous range of the rows of each tier, and each host writes what its devices made. Neither holds
more than two chunks, so the table may be larger than any memory.
"""

import dataclasses
import functools
import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.inference.rows import live_rows
from memoryllm_jax.tol import codec
from memoryllm_jax.tol.format import TolFile, TolWriter, checksum
from memoryllm_jax.tol.layout import Layout
from memoryllm_jax.tol.reader import RowReader

_CHUNK_BYTES = 64 << 20  # of the float32 rows of a chunk on one device
_CHUNK_ROWS = 1024
_TYPES = {"int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "BF16"}  # of tensors beside the rows


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a ToL file says of where its rows come from."""

    architecture: str
    step: int
    dtype: str  # of the computation that made the rows
    rows_digest: str
    decoder_digest: str
    tokenizer: Tokenizer


class LiveSource:
    """Rows computed from a checkpoint by `jax.vmap` over token ids."""

    counts = successors = None  # it takes text to know them

    def __init__(self, trained: TrainedModel):
        c = self.config = trained.config
        self.mesh, self.vocab_size = trained.mesh, c.vocab_size
        self.dim, self.layers, self.has_x0 = c.dim, c.layers, not c.tie_embeddings
        decoder_digest = trained.digest(lambda name: not trained.is_memory(name))
        self._params, rows_digest = trained.load(lambda name: trained.is_memory(name) or name == "embedding")
        digests = {"rows_digest": rows_digest, "decoder_digest": decoder_digest}
        self.identity = Identity(c.architecture, trained.step, c.dtype, **digests, tokenizer=trained.tokenizer)

        self._rows = _row_function(c)

    def vectors(self, ids_U) -> dict:
        """{part name: [U, D]} of token ids on the mesh."""
        with jax.set_mesh(self.mesh):
            return self._rows(self._params, ids_U)


def _row_function(config):
    """Jitted (params, ids [U]) -> {part name: [U, D]}: one token's row, mapped over the vocabulary."""

    def row(params, token):
        rows = live_rows(config, params, token[None])
        x0 = {} if config.tie_embeddings else {"x0": rows.x0_SUD[0, 0]}
        return x0 | {f"ffn.{layer}": y[0, 0] for layer, y in enumerate(rows.ffn_LSUD)}

    return jax.jit(lambda params, ids_U: jax.vmap(lambda token: row(params, token))(ids_U))


class Repair:
    """Computes damaged rows again from the checkpoint, whose FFN-M weights are loaded for that and let go."""

    def __init__(self, trained: TrainedModel, tol: TolFile):
        self._saved, self._tol = trained, tol
        self._mended: dict[int, np.ndarray] = {}

    def __call__(self, ids: np.ndarray) -> list[np.ndarray]:
        """Encoded rows of the ids. Raises: UserError if the weights are not those the file was made from."""
        new = np.array([token for token in ids.tolist() if token not in self._mended], np.int32)
        if len(new):
            self._mended.update(zip(new.tolist(), self._compute(new)))
        return [self._mended[token] for token in ids.tolist()]

    def _compute(self, ids):
        tol = self._tol
        print(f"{tol.path}: {len(ids)} damaged rows, token {ids[0]} first: computed from the weights", file=sys.stderr)
        trained = TrainedModel(self._saved.workdir, self._saved.step, tol.metadata["dtype"], self._saved.mesh)
        params, digest = trained.load(lambda name: trained.is_memory(name) or name == "embedding")
        trained.close()
        if digest != tol.metadata["rows_digest"]:
            raise UserError(f"{tol.path}: token {ids[0]}: its row is damaged, and the checkpoint has other weights")
        with jax.set_mesh(trained.mesh):
            vectors = _row_function(trained.config)(params, jnp.asarray(ids))
        bases = {name: jnp.asarray(tol.basis(name)) for name in tol.layout.rotated}
        tiers = tol.tier_of_row[tol.row_of_token[ids]]
        encoded = {k: np.asarray(codec.encode(tol.layout.tiers[k].parts, vectors, bases)) for k in np.unique(tiers)}
        return [encoded[tier][i] for i, tier in enumerate(tiers)]


class FileSource:
    """Rows of an existing ToL file, decoded, with the edits of an overlay."""

    def __init__(self, tol: TolFile, mesh, overlay=None):
        meta, layout = tol.metadata, tol.layout
        self._layout = layout
        self._overlay = overlay
        self._edits = overlay.arrays() if overlay else None
        self.mesh, self.vocab_size = mesh, tol.vocab_size
        self.dim, self.layers, self.has_x0 = layout.dim, layout.layers, layout.has_x0
        digests = {"rows_digest": meta["rows_digest"], "decoder_digest": meta["decoder_digest"]}
        self.identity = Identity(
            meta["architecture"], int(meta["step"]), meta["dtype"], **digests, tokenizer=tol.tokenizer()
        )
        self.counts, self.successors = (tol.read(n) if n in tol.tensors else None for n in ("counts", "successors"))
        self._reader = RowReader(tol)
        self._decode = RowDecoder(tol)

    def vectors(self, ids_U) -> dict:
        raw, tier = self._reader.read(np.asarray(ids_U))
        vectors = self._decode(self._layout.view(raw), tier)
        zeros = jnp.zeros((len(raw), self.dim), jnp.float32)
        vectors = {f"ffn.{layer}": zeros for layer in range(self.layers)} | vectors
        if self._overlay is not None:
            ffn = [vectors[f"ffn.{layer}"] for layer in range(self.layers)]
            edited = self._overlay.apply(self._edits, jnp.asarray(ids_U), ffn)
            vectors |= {f"ffn.{layer}": y for layer, y in enumerate(edited)}
        return vectors


class RowDecoder:
    """Encoded rows of a file -> {part name: [U, D]} on the device."""

    def __init__(self, tol: TolFile, device=None):
        self._bases = {name: jax.device_put(tol.basis(name), device) for name in tol.layout.rotated}
        self._decode = jax.jit(lambda raw, tier, bases: decode_rows(tol.layout, raw, tier, bases))

    def __call__(self, raw, tier_U) -> dict:
        return self._decode(raw, tier_U, self._bases)


def decode_rows(layout: Layout, raw, tier_U, bases) -> dict:
    """{part name: [U, D]}; a layer that a row's tier drops is zero, one that all drop is absent. For use in jit.

    `raw` is what `Layout.view` makes of encoded rows.
    """
    if raw.ndim == 3:
        floats = codec.FLOATS[layout.tiers[0].plain]
        parts = enumerate(layout.tiers[0].parts)
        return {part.name: jax.lax.bitcast_convert_type(raw[:, i], floats) for i, part in parts}
    decoded = [codec.decode(tier.parts, raw[:, : tier.stride], bases) for tier in layout.tiers]
    if len(decoded) == 1:
        return decoded[0]
    out = {}
    for number, vectors in enumerate(decoded):
        for name, x in vectors.items():
            out[name] = jnp.where((tier_U == number)[:, None], x.astype(jnp.float32), out.get(name, 0.0))
    return out


def chunks_of(rows: int, devices: int, dim: int, parts: int):
    """(rows a device owns, rows of a chunk on a device, chunks) of a tier."""
    owned = -(-rows // devices)
    size = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (4 * dim * max(parts, 1)), owned))
    return owned, size, -(-owned // size)


class _Chunks:
    """The rows of one tier, chunk by chunk: global arrays in which every device holds rows of its own range."""

    def __init__(self, mesh, rows: int, dim: int, parts: int):
        self.rows, self.devices = rows, mesh.size
        self.owned, self.size, self.count = chunks_of(rows, mesh.size, dim, parts)
        self.sharding = NamedSharding(mesh, P(mesh.axis_names))

    def span(self, device: int, chunk: int) -> tuple[int, int]:
        """First row and number of rows that a device has in a chunk; none at the ends."""
        first = device * self.owned + chunk * self.size
        end = min(first + self.size, (device + 1) * self.owned, self.rows)
        return min(first, self.rows), max(0, end - first)

    def place(self, values: np.ndarray, chunk: int, fill):
        """`values[row]` of the chunk's rows as a global array; `fill` where a device has none."""

        def local(index):
            first, count = self.span((index[0].start or 0) // self.size, chunk)
            part = np.full(self.size, fill, values.dtype)
            part[:count] = values[first : first + count]
            return part

        return jax.make_array_from_callback((self.devices * self.size,), self.sharding, local)

    def local_parts(self, array, chunk: int):
        """(first row, rows as numpy) of what this host's devices hold of a chunk's result."""
        for shard in array.addressable_shards:
            first, count = self.span((shard.index[0].start or 0) // self.size, chunk)
            if count:
                yield first, np.asarray(shard.data)[:count]


def build(
    source, layout: Layout, output: str, order: np.ndarray, counts=None, successors=None, bases=None, label="precompute"
) -> str:
    """Writes the file, or goes on with one that was left unfinished. On several hosts, call it on all of them.

    Args:
      order: token ids in the order of the rows.
      counts: int64 [V], how often each occurs, if known.  successors: int32 [V, n], likely next tokens, if known.
      bases: {part name: [rank, D]} for the layout's rotated parts.
    Returns: one line on what was written. Raises: UserError.
    """
    host, hosts = jax.process_index(), jax.process_count()
    arrays = {"row_of_token": np.empty(len(order), np.int32)}
    arrays["row_of_token"][order] = np.arange(len(order))
    arrays["tokenizer"] = np.frombuffer(source.identity.tokenizer.content, np.uint8)
    arrays |= {} if counts is None else {"counts": counts.astype(np.int64)}
    arrays |= {} if successors is None else {"successors": successors.astype(np.int32)}
    for name, basis in (bases or {}).items():
        arrays[f"basis.{name}"] = np.asarray(basis).astype(ml_dtypes.bfloat16).view(np.uint16)
    metadata = _metadata(source.identity, layout, arrays)
    extra = {name: (_TYPES[array.dtype.name], array.shape) for name, array in arrays.items()}
    writer = TolWriter(output, layout, extra, metadata, _plan_digest(source.mesh, metadata), host)
    if writer.is_there():
        return f"{output}: is there already, from the same weights; remove it to build it again"
    try:
        for first in (True, False):  # the first host makes the file, then the others open it
            _together(writer.begin if first == (host == 0) else None)
        if host == 0 and writer.done() is None:
            for name, array in arrays.items():
                writer.write(name, array)
            for number, tier in enumerate(layout.tiers):
                if not tier.stride:  # every layer dropped: the checksums are those of no bytes
                    writer.write_rows(number, 0, np.empty((tier.rows, 0), np.uint8))
            writer.record(0)
        _write_tiers(source, layout, writer, order, bases or {}, label)
        _sync("written", hosts)
        if host == 0:
            writer.finish(range(hosts))
    finally:
        writer.close()
    return f"{output}: {layout.codec()}, {layout.rows:,} rows, {writer.size:,} bytes"


def _write_tiers(source, layout, writer, order, bases, label):
    mesh = source.mesh
    replicated = NamedSharding(mesh, P())
    bases = {name: jax.device_put(np.asarray(b).astype(ml_dtypes.bfloat16), replicated) for name, b in bases.items()}
    tiers = [_Chunks(mesh, t.rows, layout.dim, layout.layers + layout.has_x0) for t in layout.tiers]
    work = [(number, chunk) for number, tier in enumerate(tiers) for chunk in range(tier.count)]
    start = _agree(writer.done() or 0)
    progress = Progress(label, len(work), "chunk", initial=start, enabled=jax.process_index() == 0)
    if start:
        progress.line(f"going on from chunk {start} of {len(work)}")
    encoders = [
        jax.jit(functools.partial(codec.encode, tier.parts), out_shardings=chunks.sharding)
        for tier, chunks in zip(layout.tiers, tiers)
    ]
    firsts = np.cumsum([0] + [tier.rows for tier in layout.tiers])
    pending = None
    for position, (number, chunk) in enumerate([*work[start:], (None, None)], start):
        upcoming = None
        if number is not None and layout.tiers[number].stride:
            tokens = order[firsts[number] : firsts[number + 1]].astype(np.int32)
            ids = tiers[number].place(tokens, chunk, tokens[0])
            upcoming = encoders[number](source.vectors(ids), bases), number, chunk
        if pending is not None:
            raw, earlier, part = pending
            for first, rows in tiers[earlier].local_parts(raw, part):
                writer.write_rows(earlier, first, rows)
            writer.record(position)
            progress.update(position)
        pending = upcoming
    progress.close()


def _plan_digest(mesh, metadata: dict) -> str:
    """Of all that decides the file's bytes and the chunks they are written in."""
    return hashlib.sha256(json.dumps([metadata, mesh.size, jax.process_count(), _CHUNK_ROWS]).encode()).hexdigest()


def _metadata(identity: Identity, layout: Layout, arrays: dict) -> dict[str, str]:
    sums = {name: f"{checksum(array.reshape(-1).view(np.uint8)):016x}" for name, array in arrays.items()}
    held = [{part.name for part in tier.parts} for tier in layout.tiers]
    dropped = [layer for layer in range(layout.layers) if not all(f"ffn.{layer}" in names for names in held)]
    return {
        "format": "memoryllm_tol",
        "version": "1",
        "architecture": identity.architecture,
        "vocab_size": str(layout.rows),
        "codec": layout.codec(),
        "dtype": identity.dtype,
        "kept_layers": json.dumps(layout.kept_layers()),
        "dropped_layers": json.dumps(dropped),  # by at least one tier
        "step": str(identity.step),
        "rows_digest": identity.rows_digest,
        "decoder_digest": identity.decoder_digest,
        "tokenizer_kind": identity.tokenizer.kind,
        "tokenizer_digest": identity.tokenizer.digest,
        "tensor_checksums": json.dumps(sums),
        "layout": json.dumps(layout.to_json()),
    }


def grams(source, layout: Layout, names: list[str], weights_V: np.ndarray, label="measuring") -> dict[str, np.ndarray]:
    """{part name: sum over tokens of weight * x x^T, float32 [D, D]} of full rows: what low rank is found from."""
    chunks = _Chunks(source.mesh, source.vocab_size, layout.dim, layout.layers + layout.has_x0)
    ids = np.arange(source.vocab_size, dtype=np.int32)

    @functools.partial(jax.jit, out_shardings=NamedSharding(source.mesh, P()))
    def add(total, vectors, weights):
        def gram(name):
            x = vectors[name].astype(jnp.float32)
            return jnp.einsum("ud,ue->de", x * weights[:, None], x, precision="highest")

        return {name: total[name] + gram(name) for name in names}

    total = {name: jnp.zeros((layout.dim, layout.dim), jnp.float32) for name in names}
    progress = Progress(label, chunks.count, "chunk", enabled=jax.process_index() == 0)
    for chunk in range(chunks.count):
        vectors = source.vectors(chunks.place(ids, chunk, 0))
        total = add(total, vectors, chunks.place(weights_V.astype(np.float32), chunk, 0))
        progress.update(chunk + 1)
    progress.close()
    return jax.device_get(total)


def basis_of(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalues, eigenvectors as rows [D, D]) in falling order: the right singular vectors of a layer's rows."""
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    return values[::-1].clip(0), np.ascontiguousarray(vectors[:, ::-1].T).astype(np.float32)


def _agree(done: int) -> int:
    """The least of all hosts' chunks."""
    if jax.process_count() == 1:
        return done
    return int(multihost_utils.process_allgather(np.int32(done)).min())


def _together(action) -> None:
    """Runs an action, if this host has one; if it fails on any host, all stop. Raises: UserError."""
    failure = None
    try:
        if action:
            action()
    except UserError as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(failure is not None))
        if failed.any() and failure is None:
            raise UserError("another host could not open the file; its message says why")
    if failure:
        raise failure


def _sync(name: str, hosts: int) -> None:
    if hosts > 1:
        multihost_utils.sync_global_devices(name)
