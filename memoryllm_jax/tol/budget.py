"""Compression to a size: bits, rank and dropped layers for each layer, and bits by token frequency, by measurement.

Rows are split into tiers by how often their tokens occur. Each part of a row (x0 or a layer) is stored in one of
three ways: as it is, at some number of bits in each tier; rotated into the basis of its singular vectors, where each
group of coefficients has its own number of bits, none for the weak ones; or dropped. The expected rise in loss of
a choice is

    importance of the part * share of text in the tier * mean squared error there

where errors are measured on rows of the tier, weighted by frequency, and a part's importance is the measured rise in
loss on text over the error, when the part alone is coarsely quantised. What a dropped layer costs is measured outright.
For a price of bytes in nats every choice is made by itself; the price is found by bisection. At the end the
result is measured against the best uniform setting of the same size, and the better one is taken.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data import dataset
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol import build, codec
from memoryllm_jax.tol.build import decode_rows
from memoryllm_jax.tol.codec import GROUP, Band, Part
from memoryllm_jax.tol.layout import Layout, Tier

_COVERAGE = (0.75, 0.95)  # of the text, by the first tier, and by the first two
_SAMPLED_ROWS = 512  # of a tier, to measure errors on
_PROBE_BITS = 2  # at which a part's importance is measured: an error that loss shows clearly
_BITS = (16, 8, 7, 6, 5, 4, 3, 2)
_LEAST_IMPORTANCE = 1e-3  # of the largest: text too short to show a part's worth must not make it worthless


class Scorer:
    """Loss of a model on windows of text, with the rows of its tokens replaced by what a layout makes of them.

    Args:
      decoder: decoder.Decoder.  windows: int32 [N, T + 1].  embedding: the tied embedding, else None.
    """

    def __init__(self, decoder, windows: np.ndarray, embedding=None, batch: int = 8):
        self.decoder, self.embedding = decoder, embedding
        self.ids, index = np.unique(windows[:, :-1], return_inverse=True)
        self.ids = self.ids.astype(np.int32)
        index, targets = index.reshape(windows[:, :-1].shape).astype(np.int32), windows[:, 1:].astype(np.int32)
        weights = np.ones(index.shape, np.float32)
        pad = ((0, -len(windows) % batch), (0, 0))
        padded = [np.pad(x, pad) for x in (index, targets, weights)]
        self._batches = list(zip(*(x.reshape(-1, batch, x.shape[1]) for x in padded)))
        self.tokens = index.size
        self.counts = np.bincount(index.reshape(-1), minlength=len(self.ids))

    def nats(self, vectors: dict) -> float:
        """Mean loss with these rows: {part name: [U, D]} for `ids`, without those of dropped layers."""
        x0 = vectors["x0"] if "x0" in vectors else self.embedding[self.ids]
        ffn = [vectors.get(f"ffn.{layer}") for layer in range(self.decoder.config.layers)]
        zeros = jnp.zeros_like(x0)  # one compiled function, whichever layers are dropped
        rows = TokenRows(x0[None], [(zeros if y is None else y.astype(x0.dtype))[None] for y in ffn])
        sums = [self.decoder.score(rows, *batch) for batch in self._batches]
        return float(sum(jax.device_get(sums))) / self.tokens


def full_vectors(source, ids: np.ndarray) -> dict:
    """{part name: float32 [U, D]} of any ids on one device, a chunk at a time."""
    step = 1024
    padded = np.pad(ids, (0, -len(ids) % step), mode="edge")
    pieces = [source.vectors(jnp.asarray(padded[i : i + step])) for i in range(0, len(padded), step)]
    return {k: jnp.concatenate([p[k].astype(jnp.float32) for p in pieces])[: len(ids)] for k in pieces[0]}


@functools.partial(jax.jit, static_argnames="layout")
def as_stored(layout: Layout, vectors: dict, tier_U, bases: dict) -> dict:
    """What a file of this layout gives back for full rows of tokens in these tiers."""
    raw = None
    for number, tier in enumerate(layout.tiers):
        mine = codec.encode(tier.parts, vectors, bases) if tier.parts else jnp.zeros((len(tier_U), 0), jnp.uint8)
        mine = jnp.pad(mine, ((0, 0), (0, layout.stride - tier.stride)))
        raw = mine if raw is None else jnp.where((tier_U == number)[:, None], mine, raw)
    return decode_rows(layout, raw, tier_U, bases)


def tiers_of(order_counts: np.ndarray) -> list[int]:
    """Rows of each tier, for counts in the order of the rows."""
    share = np.cumsum(order_counts) / max(order_counts.sum(), 1)
    edges = [0, *(int(np.searchsorted(share, c)) + 1 for c in _COVERAGE), len(order_counts)]
    return [b - a for a, b in itertools.pairwise(edges) if b > a]


@dataclasses.dataclass
class _PartTable:
    """What the choices for one part cost: sizes in bytes a row, losses in nats a token of text."""

    name: str
    drop_loss: float | None  # None: may not be dropped
    plain_loss: np.ndarray  # [tier, bits]
    group_loss: np.ndarray | None  # [tier, group, 1 + bits]; first: none of the group is stored
    sizes: list[int]  # of the groups of coefficients


class Planner:
    """Measures a model's rows once, and then finds the layout for any size.

    Args:
      source: of full rows (tol/build.py).  scorer: on text that is not what results are reported on.
      counts: int64 [V], how often each token occurs.
    Attributes:
      bases: {part name: [D, D] bfloat16}, singular vectors of a layer's rows weighted by frequency.
    """

    def __init__(self, source, scorer: Scorer, counts: np.ndarray):
        self._source, self._scorer = source, scorer
        order = np.argsort(-counts, kind="stable")
        self._tier_rows = tiers_of(counts[order])
        names = (["x0"] if source.has_x0 else []) + [f"ffn.{layer}" for layer in range(source.layers)]
        self.whole = plain_layout(source, 16)
        weights = counts + 0.5  # a token that the text lacks still counts a little
        gram = build.grams(source, self.whole, names[source.has_x0 :], weights, "singular vectors")
        self.bases = {name: jnp.asarray(build.basis_of(g)[1], jnp.bfloat16) for name, g in gram.items()}
        self.tier_of_token = np.empty(len(order), np.int32)
        self.tier_of_token[order] = np.repeat(np.arange(len(self._tier_rows)), self._tier_rows)
        self._tables = _measure(source, scorer, names, self.bases, weights, order, self._tier_rows)

    def layout(self, total: int) -> Layout:
        """Of least expected loss within `total` bytes of rows and bases. Raises: UserError if none is that small."""
        return _solve(self._source, self._tables, self._tier_rows, total)

    def even_bases(self) -> tuple[dict, dict]:
        """({part name: singular values [D]}, bases like `bases`), but of rows among which every token counts alike."""
        grams = build.grams(
            self._source, self.whole, list(self.bases), np.ones(self._source.vocab_size), "singular vectors"
        )
        found = {name: build.basis_of(gram) for name, gram in grams.items()}
        values = {name: np.sqrt(squares) for name, (squares, _) in found.items()}
        return values, {name: jnp.asarray(basis, jnp.bfloat16) for name, (_, basis) in found.items()}

    def tiers(self, layout: Layout) -> np.ndarray:
        """int32 [V]: each token's tier in a layout, of the tiers planned or of one."""
        return self.tier_of_token if len(layout.tiers) > 1 else np.zeros_like(self.tier_of_token)

    def loss(self, layout: Layout, scorer: Scorer, vectors: dict, bases: dict | None = None) -> float:
        """Measured, with the full rows of the scorer's tokens as this layout stores them; bases: other than planned."""
        used = cut(self.bases if bases is None else bases, layout)
        return scorer.nats(as_stored(layout, vectors, self.tiers(layout)[scorer.ids], used))


def choose(source, scorer: Scorer, counts: np.ndarray, total: int) -> tuple[Layout, dict]:
    """The layout and bases for at most `total` bytes of rows and bases. Raises: UserError if nothing is that small."""
    planner = Planner(source, scorer, counts)
    layout = planner.layout(total)
    vectors = full_vectors(source, scorer.ids)
    full, found = scorer.nats(vectors), planner.loss(layout, scorer, vectors)
    lines = [f"loss on {scorer.tokens:,} tokens of text: full rows {full:.5f}, within the budget {found:.5f}"]
    fitting = [peer for bits in _BITS if (peer := plain_layout(source, bits)).total_bytes <= total][:2]
    peers = [(planner.loss(peer, scorer, vectors), peer) for peer in fitting]
    if peers:
        best, peer = min(peers, key=lambda p: p[0])
        lines.append(f"the best uniform setting of that size, {peer.codec()}: {best:.5f}")
        if best < found:
            layout = peer
            lines.append("the uniform setting is better and is taken")
    print("\n".join(lines), flush=True)
    return layout, {name: np.asarray(basis) for name, basis in cut(planner.bases, layout).items()}


def cut(bases: dict, layout: Layout) -> dict:
    """What a layout stores of whole bases."""
    return {name: bases[name][:rank] for name, rank in layout.rotated.items()}


def plain_layout(source, bits: int) -> Layout:
    """One tier, every layer at these bits, and x0 at no fewer than 8."""
    parts = [Part("x0", (Band(source.dim, max(bits, 8)),))] if source.has_x0 else []
    parts += [Part(f"ffn.{layer}", (Band(source.dim, bits),)) for layer in range(source.layers)]
    return Layout(source.dim, source.layers, source.has_x0, (Tier(source.vocab_size, tuple(parts)),))


def _measure(source, scorer, names, bases, weights, order, tier_rows) -> list[_PartTable]:
    """Errors and importance of every part."""
    samples, starts = [], np.cumsum([0, *tier_rows])
    for start, rows in zip(starts, tier_rows):
        tokens = order[start : start + rows]
        picked = tokens if rows <= _SAMPLED_ROWS else tokens[np.linspace(0, rows - 1, _SAMPLED_ROWS).astype(int)]
        samples.append(picked.astype(np.int32))
    sampled = [full_vectors(source, ids) for ids in samples]
    share = [weights[order[a : a + n]].sum() / weights.sum() for a, n in zip(starts, tier_rows)]
    vectors = full_vectors(source, scorer.ids)
    base = scorer.nats(vectors)
    rises = {}
    progress = Progress("importance", len(names), "part")
    for number, name in enumerate(names):
        coarse = _through(Band(source.dim, _PROBE_BITS), vectors[name])
        error = np.average(np.asarray(jnp.square(coarse - vectors[name]).sum(1)), weights=scorer.counts)
        rise = scorer.nats(vectors | {name: coarse}) - base
        drop = None if name == "x0" else scorer.nats(vectors | {name: jnp.zeros_like(coarse)}) - base
        rises[name] = (rise / max(error, 1e-30), drop)
        progress.update(number + 1)
    progress.close()
    least = _LEAST_IMPORTANCE * max(r for r, _ in rises.values())
    tables = []
    for name in names:
        importance, drop = max(rises[name][0], least), rises[name][1]
        plain = np.array([
            [_mean_error(Band(source.dim, bits), x[name], weights[ids]) for bits in _BITS]
            for x, ids in zip(sampled, samples)
        ])  # fmt: skip
        factor = importance * np.array(share)[:, None]
        sizes = [min(GROUP, source.dim - g) for g in range(0, source.dim, GROUP)]
        groups = None
        if name in bases:
            errors = [_group_errors(x[name], bases[name], weights[ids], sizes) for x, ids in zip(sampled, samples)]
            groups = factor[..., None] * np.array(errors)
        # A part never costs less than nothing, whatever a short text says.
        tables.append(_PartTable(name, None if drop is None else max(drop, 0.0), factor * plain, groups, sizes))
    return tables


@functools.partial(jax.jit, static_argnames="band")
def _through(band: Band, x_Un):
    """Encoded and decoded."""
    return codec.decode_band(band, codec.encode_band(band, x_Un)).astype(jnp.float32)


def _mean_error(band, x_Un, weights):
    errors = np.asarray(jnp.square(_through(band, x_Un) - x_Un).sum(1))
    return np.average(errors, weights=weights)


def _group_errors(x_UD, basis, weights, sizes):
    """[group, 1 + bits] of coefficients in the rotated basis; floats of 16 bits are left to plain parts."""
    coefficients = x_UD @ basis.astype(jnp.float32).T
    out, start = [], 0
    for size in sizes:
        c = coefficients[:, start : start + size]
        nothing = np.average(np.asarray(jnp.square(c).sum(1)), weights=weights)
        out.append([nothing] + [_mean_error(Band(size, bits), c, weights) for bits in _BITS])
        start += size
    return out


def _solve(source, tables: list[_PartTable], tier_rows: list[int], total: int) -> Layout:
    """The layout of least expected loss within `total` bytes."""

    def layout_at(price):
        tiers = [[] for _ in tier_rows]
        for table in tables:
            for parts, part in zip(tiers, _best(table, tier_rows, source.dim, price)):
                if part is not None:
                    parts.append(part)
        return Layout(
            source.dim, source.layers, source.has_x0,
            tuple(Tier(rows, tuple(parts)) for rows, parts in zip(tier_rows, tiers)),
        )  # fmt: skip

    low, high = 1e-30, 1e6  # nats a byte
    least = layout_at(high)
    if least.total_bytes > total:
        raise UserError(f"the budget: expected at least {least.total_bytes:,} bytes, found {total:,}")
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if layout_at(middle).total_bytes <= total else (middle, high)
    layout = layout_at(high)
    if not any(tier.parts for tier in layout.tiers):
        raise UserError(f"the budget: expected room for at least one layer, found {total:,} bytes")
    return layout


def _best(table: _PartTable, tier_rows, dim, price) -> list[Part | None]:
    """A part's cheapest choice for each tier, where nats and bytes are weighed by `price`."""
    plain, plain_cost = [], 0.0
    for rows, losses in zip(tier_rows, table.plain_loss):
        costs = [loss + price * rows * Band(dim, bits).bytes for loss, bits in zip(losses, _BITS)]
        k = int(np.argmin(costs))
        plain.append(Part(table.name, (Band(dim, _BITS[k]),)))
        plain_cost += costs[k]
    choices = [(plain_cost, plain)]
    if table.group_loss is not None:
        choices.append(_rotated(table, tier_rows, dim, price))
    if table.drop_loss is not None:
        choices.append((table.drop_loss, [None] * len(tier_rows)))
    return min(choices, key=lambda choice: choice[0])[1]


def _rotated(table, tier_rows, dim, price):
    """Each group of coefficients at the bits that pay for it; past the first that none pay for, nothing is stored."""
    parts, cost, most = [], 0.0, 0
    for rows, losses in zip(tier_rows, table.group_loss):
        bytes_ = np.array([[0] + [Band(size, bits).bytes for bits in _BITS] for size in table.sizes])
        costs = losses + price * rows * bytes_
        best = costs.argmin(1)
        kept = int(np.argmin(best)) if (best == 0).any() else len(best)
        bits = [_BITS[k - 1] for k in best[:kept]]
        cost += costs[np.arange(kept), best[:kept]].sum() + losses[kept:, 0].sum()
        most = max(most, sum(table.sizes[:kept]))
        bands: list[Band] = []
        for size, b in zip(table.sizes, bits):
            if bands and bands[-1].bits == b:
                bands[-1] = Band(bands[-1].size + size, b)
            else:
                bands.append(Band(size, b))
        parts.append(Part(table.name, tuple(bands), rotated=True) if bands else None)
    return cost + price * most * dim * 2, parts


CALIBRATION_TOKENS = 1 << 15  # of the held-out text, on which a budget is measured


def scorer(trained: TrainedModel, path: str, tokens: int = CALIBRATION_TOKENS, half: int = 0) -> Scorer:
    """Measures on windows of held-out text: of its windows, every second one, so that each half can judge the other.

    Raises: UserError if the text is too short.
    """
    stream, length = dataset.Dataset(path).validation, trained.context
    windows_there = (stream.tokens - 1) // length
    chosen = np.arange(half, windows_there, 2)
    if not len(chosen):
        raise UserError(f"{path}: expected at least {(half + 1) * length + 1} held-out tokens, found {stream.tokens}")
    count = min(max(1, tokens // length), len(chosen))
    chosen = chosen[np.linspace(0, len(chosen) - 1, count).astype(int)]
    windows = np.stack([stream.read(int(k) * length, length + 1) for k in chosen])
    wanted = lambda name: not trained.is_memory(name)  # noqa: E731
    params, _ = trained.load(wanted)
    embedding = params["embedding"] if trained.config.tie_embeddings else None
    decoder = Decoder(trained.config, params, trained.mesh)
    batch = decoder.shards * max(1, min(8, 4096 // length) // decoder.shards)
    return Scorer(decoder, windows, embedding, batch)
