"""Compression to a size: bits, rank and dropped layers for each layer, and bits by token frequency, by measurement.

Rows are split into tiers by how often their tokens occur. Each part of a row (x0 or a layer) is stored in one of
three ways: as it is, at some number of bits in each tier; rotated into the basis of its singular vectors, where each
group of coefficients has its own number of bits, none for the weak ones; or dropped. The expected rise in loss of
a choice is

    importance of the part * share of text in the tier * mean squared error there

Errors are measured on rows of the tier, weighted by frequency. A part's importance is the measured rise in loss on
text over the error, when that part alone is coarsely quantised. The loss of dropping a layer is measured directly.
With a price in nats for a byte, each part's cheapest choice is found separately; bisection finds the price at which
the size fits. In the end the result is measured against uniform settings of the same size, and the best one is taken.

Shapes: V vocabulary, U tokens, D width, K tiers, B numbers of bits to choose from, G groups of coefficients.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol import codec
from memoryllm_jax.tol.build import Basis, singular_bases
from memoryllm_jax.tol.codec import GROUP, Band, Part
from memoryllm_jax.tol.layout import Layout, Tier
from memoryllm_jax.tol.sources import Source, full_vectors

CALIBRATION_TOKENS = 1 << 15  # held-out tokens that a budget is measured on
_COVERAGE = (0.75, 0.95)  # share of the text that the first tier covers, and that the first two cover together
_SAMPLED_ROWS = 512  # rows of each tier that errors are measured on
_PROBE_BITS = 2  # a part's importance is measured at these bits: the error is large enough to show in the loss
_BITS = (16, 8, 7, 6, 5, 4, 3, 2)  # most bits first, which `choose` relies on
# A part's importance is at least this share of the largest one: noise on a short text may make it seem worth nothing.
_LEAST_IMPORTANCE = 1e-3


def scorer(trained: TrainedModel, path: str, tokens: int = CALIBRATION_TOKENS, half: int = 0) -> "Scorer":
    """A scorer on windows of held-out text.

    Args:
      trained: the model, whose FFN-M weights are not loaded.
      path: prepared data, as of `open_data`.
      tokens: number of tokens to score, at most.
      half: 0 or 1: which of every two windows is used, so that settings chosen on one half are judged on the other.
    Raises: UserError if the text is too short, or of another tokenizer.
    """
    stream, length = run_data.open_data(trained, path).validation, trained.context
    chosen = np.arange(half, (stream.tokens - 1) // length, 2)
    if not len(chosen):
        raise UserError(f"{path}: expected at least {(half + 1) * length + 1} held-out tokens, found {stream.tokens}")
    count = min(max(1, tokens // length), len(chosen))
    chosen = chosen[np.linspace(0, len(chosen) - 1, count).astype(int)]  # spread evenly over the whole text
    starts = [int(number) * length for number in chosen]
    stream.verify(starts, length + 1)
    windows = np.stack(stream.read_each(starts, length + 1))
    params = trained.load(lambda name: not trained.is_memory(name))
    embedding = params["embedding"] if trained.config.tie_embeddings else None
    decoder = Decoder(trained.config, params, trained.mesh)
    # At most about 4,096 tokens a batch, and the same number of whole sequences for every batch shard.
    batch = decoder.shards * max(1, min(8, 4096 // length) // decoder.shards)
    return Scorer(decoder, windows, embedding, batch)


class Scorer:
    """Measures a model's loss on windows of text when tokens have other rows than the model's own.

    Args:
      windows: int [N, T + 1], token ids.
      embedding: [V, D], the tied embedding; None where rows hold x0.
      batch: number of sequences that are scored at a time.
    Attributes:
      ids: int32 [U], the distinct tokens of the text; a loss needs rows for these.
      counts: int [U], how often each of them occurs.
      tokens: number of tokens that are predicted.
      batch_tokens: int [N], how many of them are in each batch.
    """

    def __init__(self, decoder: Decoder, windows: np.ndarray, embedding=None, batch: int = 8):
        self.decoder, self.embedding = decoder, embedding
        inputs, targets = windows[:, :-1], windows[:, 1:].astype(np.int32)
        ids, index = np.unique(inputs, return_inverse=True)
        self.ids = ids.astype(np.int32)
        index = index.reshape(inputs.shape).astype(np.int32)
        self.tokens = index.size
        self.counts = np.bincount(index.reshape(-1), minlength=len(ids))
        self._batches = _batches(index, targets, batch)
        self.batch_tokens = np.array([int(weights.sum()) for _, _, weights in self._batches])

    def nats(self, vectors: dict) -> float:
        """Mean loss in nats a token; `vectors` as of `batch_nats`."""
        return float(self.batch_nats(vectors).sum()) / self.tokens

    def batch_nats(self, vectors: dict) -> np.ndarray:
        """The loss in nats of all tokens of each batch, float64 [N].

        Args:
          vectors: {part name: [U, D]}, the rows of `ids`; a layer without an entry is dropped.
        """
        x0_UD = vectors["x0"] if "x0" in vectors else self.embedding[self.ids]
        # Zeros rather than None for dropped layers: one compiled function serves all sets of them.
        zeros = jnp.zeros_like(x0_UD)
        ffn = []
        for layer in range(self.decoder.config.layers):
            y_UD = vectors.get(f"ffn.{layer}")
            ffn.append((zeros if y_UD is None else y_UD.astype(x0_UD.dtype))[None])
        rows = TokenRows(x0_UD[None], ffn)
        # All batches are dispatched before the first sum is read: the device never waits for the host.
        sums = [self.decoder.score(rows, *arrays) for arrays in self._batches]
        return np.array(jax.device_get(sums), np.float64)


class _Batch(NamedTuple):
    """A batch of B sequences.

    Attributes:
      index: int32 [B, T], places of the input tokens in the scorer's `ids`.
      targets: int32 [B, T], token ids.
      weights: float32 [B, T], 1, or 0 in sequences that only fill up the batch.
    """

    index: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def _batches(index, targets, batch) -> list[_Batch]:
    weights = np.ones(index.shape, np.float32)
    padding = ((0, -len(index) % batch), (0, 0))  # the last batch is filled up, so that one shape compiles
    padded = [np.pad(array, padding) for array in (index, targets, weights)]
    return [_Batch(*(array[start : start + batch] for array in padded)) for start in range(0, len(padded[0]), batch)]


def as_stored(layout: Layout, vectors: dict, tier_U, bases: dict) -> dict:
    """Encodes and decodes full rows: what a file of this layout would give back for them.

    Args:
      vectors: {part name: [U, D]}, full rows of tokens.
      tier_U: int32 [U], the tier of each token.
      bases: {part name: [rank, D]} of rotated parts.
    Returns: as `decode_rows`.
    """
    out: dict = {}
    for number, tier in enumerate(layout.tiers):
        for part in tier.parts:
            x_UD = _part_as_stored(part, vectors[part.name], bases)
            # Shapes must be static: every row is encoded for every tier, and its own tier's result is selected.
            if len(layout.tiers) > 1:
                x_UD = jnp.where((tier_U == number)[:, None], x_UD.astype(jnp.float32), out.get(part.name, 0.0))
            out[part.name] = x_UD
    return out


def _part_as_stored(part: Part, x_UD, bases: dict):
    """A part's vectors as they come back from a file, [U, D]."""
    if not part.rotated:
        return _bands_as_stored(part.bands, x_UD)
    basis_RD = bases[part.name][: part.rank]
    return codec.combined(_bands_as_stored(part.bands, codec.coefficients(x_UD, basis_RD)), basis_RD)


def _bands_as_stored(bands: tuple[Band, ...], x_Un):
    """Elements as they come back from a file, [U, n]. A band is compiled alone, so that other layouts can reuse it."""
    ends = np.cumsum([band.size for band in bands])
    pieces = [_through(band, x_Un[:, end - band.size : end]) for band, end in zip(bands, ends)]
    # A single band keeps its dtype, as in `codec.decode`.
    return pieces[0] if len(pieces) == 1 else jnp.concatenate([piece.astype(jnp.float32) for piece in pieces], 1)


def tiers_of(counts: np.ndarray) -> list[int]:
    """Number of rows of each tier.

    Args:
      counts: int [V], how often each token occurs, most frequent first, which is the order of the rows.
    """
    share = np.cumsum(counts) / max(counts.sum(), 1)
    edges = [0, *(int(np.searchsorted(share, covered)) + 1 for covered in _COVERAGE), len(counts)]
    return [end - start for start, end in itertools.pairwise(edges) if end > start]


class Planner:
    """Measures a model's rows once, and then finds the layout for any size.

    Args:
      source: the full rows.
      scorer: of a text that results are not reported on.
      counts: int64 [V], how often each token occurs.
    Attributes:
      bases: {part name: bfloat16 [D, D]}, each layer's basis as a file stores it, of rows weighted by frequency.
      tier_of_token: int32 [V], the tier that each token is planned for.
    """

    def __init__(self, source: Source, scorer: Scorer, counts: np.ndarray):
        self._source = source
        self._layers = [f"ffn.{layer}" for layer in range(source.layers)]
        order = np.argsort(-counts, kind="stable")
        self._tier_rows = tiers_of(counts[order])
        self.tier_of_token = np.empty(len(order), np.int32)
        self.tier_of_token[order] = np.repeat(np.arange(len(self._tier_rows)), self._tier_rows)
        weights_V = counts + 0.5  # a token that the text lacks still counts a little: it may occur elsewhere
        self.bases = _stored(singular_bases(source, self._layers, weights_V))
        samples = _samples(source, order, self._tier_rows, weights_V)
        names = ["x0", *self._layers] if source.has_x0 else self._layers
        self._costs = _measure(source, scorer, names, self.bases, samples)

    def layout(self, total: int, name: str = "total") -> Layout:
        """The layout of least expected loss within `total` bytes of rows and bases.

        Raises: ArgumentError that names the argument `name` if no layout is that small.
        """
        return _solve(self._source, self._costs, self._tier_rows, total, name)

    def even_bases(self) -> tuple[dict, dict]:
        """({part name: singular values [D]}, {part name: bfloat16 [D, D]}) where every token counts alike."""
        found = singular_bases(self._source, self._layers, np.ones(self._source.vocab_size))
        return {name: np.sqrt(basis.squares) for name, basis in found.items()}, _stored(found)

    def tiers(self, layout: Layout) -> np.ndarray:
        """int32 [V], each token's tier in a layout that has the planned tiers, or only one."""
        return self.tier_of_token if len(layout.tiers) > 1 else np.zeros_like(self.tier_of_token)

    def loss(self, layout: Layout, scorer: Scorer, vectors: dict, bases: dict | None = None) -> float:
        """Measures the loss of a layout, in nats a token.

        Args:
          vectors: {part name: [U, D]}, full rows of the scorer's `ids`.
          bases: {part name: [D, D]}; by default those of the planner.
        """
        used = cut(self.bases if bases is None else bases, layout)
        return scorer.nats(as_stored(layout, vectors, self.tiers(layout)[scorer.ids], used))


def _stored(bases: dict[str, Basis]) -> dict[str, jax.Array]:
    """The bases as a file stores them."""
    return {name: jnp.asarray(basis.stored) for name, basis in bases.items()}


def cut(bases: dict, layout: Layout) -> dict:
    """The part of whole bases that a layout stores: the first, strongest vectors of each rotated part."""
    return {name: bases[name][:rank] for name, rank in layout.rotated.items()}


def choose(source: Source, scorer: Scorer, counts: np.ndarray, total: int, name: str) -> tuple[Layout, dict]:
    """Chooses the bits and ranks of all parts for a size.

    Args:
      source: gives the full rows.
      scorer: measures the loss on a text from rows that were encoded and decoded.
      counts: int64 [V], how often each token occurs.
      total: the size, in bytes of rows and bases together.
      name: of the argument that gives the size, for the error message.
    Returns: (layout of at most `total` bytes, {part name: its basis}).
    Raises: ArgumentError if no layout is that small.
    """
    planner = Planner(source, scorer, counts)
    layout = planner.layout(total, name)
    vectors = full_vectors(source, scorer.ids)
    full, found = scorer.nats(vectors), planner.loss(layout, scorer, vectors)
    print(f"loss on {scorer.tokens:,} tokens of text: full rows {full:.5f}, within the budget {found:.5f}", flush=True)
    # Only the two of most bits are measured: with fewer bits the loss would not be lower.
    uniform = _uniform_within(source, total)[:2]
    losses = [planner.loss(peer, scorer, vectors) for peer in uniform]
    if losses:
        best = int(np.argmin(losses))
        print(f"the best uniform setting of that size, {uniform[best].codec()}: {losses[best]:.5f}", flush=True)
        if losses[best] < found:
            layout = uniform[best]
            print("the uniform setting is better and is taken", flush=True)
    return layout, {name: np.asarray(basis) for name, basis in cut(planner.bases, layout).items()}


def _uniform_within(source: Source, total: int) -> list[Layout]:
    """Layouts of one tier within `total` bytes, in falling order of the layers' bits, each with x0 as fine as fits."""
    out = []
    for bits in _BITS:
        layouts = (plain_layout(source, bits, x0_bits) for x0_bits in _BITS)
        fitting = [layout for layout in layouts if layout.total_bytes <= total]
        out += fitting[:1]  # the first has most bits for x0
    return out


def plain_layout(source: Source, bits: int, x0_bits: int | None = None) -> Layout:
    """A layout of one tier with every layer at `bits`, and x0 at `x0_bits`, by default the same but no fewer than 8."""
    parts = [Part("x0", (Band(source.dim, x0_bits or max(bits, 8)),), rotated=False)] if source.has_x0 else []
    parts += [Part(f"ffn.{layer}", (Band(source.dim, bits),), rotated=False) for layer in range(source.layers)]
    return Layout(source.dim, source.layers, source.has_x0, (Tier(source.vocab_size, tuple(parts)),))


class _Sample(NamedTuple):
    """Rows of one tier, to measure errors on.

    Attributes:
      vectors: {part name: float32 [U, D]}.
      weights: float [U], how much each row counts, by its token's frequency.
      share: share of the text that the tier's tokens make up.
    """

    vectors: dict
    weights: np.ndarray
    share: float


def _samples(source, order, tier_rows, weights_V) -> list[_Sample]:
    out = []
    for start, rows in zip(np.cumsum([0, *tier_rows]), tier_rows):
        tokens = order[start : start + rows]
        share = weights_V[tokens].sum() / weights_V.sum()
        if rows > _SAMPLED_ROWS:  # evenly spaced in the order of frequency, so that rare tokens are among them
            tokens = tokens[np.linspace(0, rows - 1, _SAMPLED_ROWS).astype(int)]
        ids = tokens.astype(np.int32)
        out.append(_Sample(full_vectors(source, ids), weights_V[ids], share))
    return out


@dataclasses.dataclass
class _Costs:
    """Expected rise in loss, in nats a token of text, of each choice for one part.

    Attributes:
      name: of the part.
      drop: the rise if the part is dropped; None where it may not be dropped.
      plain_KB: float [K, B], the rise if it is stored as it is, by tier and number of bits in `_BITS`.
      group_KGB: float [K, G, 1 + B], the rise from each group of coefficients of a rotated part. The last axis begins
        with the rise if the group is not stored; `_BITS` follow. None where the part may not be rotated.
      sizes_G: number of coefficients in each group.
    """

    name: str
    drop: float | None
    plain_KB: np.ndarray
    group_KGB: np.ndarray | None
    sizes_G: list[int]


def _measure(source, scorer, names, bases, samples: list[_Sample]) -> list[_Costs]:
    """Measures the costs of every part, in the order of `names`, which becomes the order of the parts in a row."""
    importance, drop = _importance(source, scorer, names)
    share_K = np.array([sample.share for sample in samples])
    sizes_G = [min(GROUP, source.dim - start) for start in range(0, source.dim, GROUP)]
    out = []
    for name in names:
        nats_per_error_K = importance[name] * share_K
        plain_KB = [
            [_mean_error(Band(source.dim, bits), s.vectors[name], s.weights) for bits in _BITS] for s in samples
        ]
        group_KGB = None
        if name in bases:
            errors = [_group_errors(s.vectors[name], bases[name], s.weights, sizes_G) for s in samples]
            group_KGB = nats_per_error_K[:, None, None] * np.array(errors)
        out.append(_Costs(name, drop[name], nats_per_error_K[:, None] * np.array(plain_KB), group_KGB, sizes_G))
    return out


def _importance(source, scorer, names) -> tuple[dict[str, float], dict[str, float | None]]:
    """({part name: rise in loss over mean squared error}, {part name: rise in loss if it is dropped}).

    The embedding x0 is never dropped: its entry of the second is None.
    """
    vectors = full_vectors(source, scorer.ids)
    base = scorer.nats(vectors)
    rise, drop = {}, {}
    progress = Progress("importance", len(names), "part")
    for number, name in enumerate(names):
        coarse = _through(Band(source.dim, _PROBE_BITS), vectors[name])
        error = np.average(np.asarray(jnp.square(coarse - vectors[name]).sum(1)), weights=scorer.counts)
        rise[name] = (scorer.nats(vectors | {name: coarse}) - base) / max(error, 1e-30)
        drop[name] = None
        if name != "x0":
            # On a short text the loss may fall by chance; a drop must not count as a gain.
            drop[name] = max(scorer.nats(vectors | {name: jnp.zeros_like(coarse)}) - base, 0.0)
        progress.update(number + 1)
    progress.close()
    least = _LEAST_IMPORTANCE * max(rise.values())
    return {name: max(value, least) for name, value in rise.items()}, drop


@functools.partial(jax.jit, static_argnames="band")
def _through(band: Band, x_Un):
    """The elements as they come back after encoding and decoding, [U, n] in the dtype of `codec.decode_band`."""
    return codec.decode_band(band, codec.encode_band(band, x_Un.astype(jnp.float32)))


def _mean_error(band, x_Un, weights, squares_n=1.0) -> float:
    """Squared error of a band summed over its elements, averaged over tokens with these weights.

    Args:
      squares_n: what each element's squared error counts, such as the squared length of its basis vector.
    """
    errors = np.asarray((squares_n * jnp.square(_through(band, x_Un) - x_Un)).sum(1))
    return np.average(errors, weights=weights)


def _group_errors(x_UD, basis, weights, sizes_G) -> list[list[float]]:
    """Mean squared errors [G, 1 + B] of coefficients in the basis, with the axes of `_Costs.group_KGB`."""
    coefficients_UD = codec.coefficients(x_UD, basis)
    # The basis is orthogonal, so that errors of coefficients, times the vectors' lengths, are errors of the vector.
    squares_D = jnp.square(basis.astype(jnp.float32)).sum(1)
    out, start = [], 0
    for size in sizes_G:
        c_Un, squares_n = coefficients_UD[:, start : start + size], squares_D[start : start + size]
        not_stored = np.average(np.asarray((squares_n * jnp.square(c_Un)).sum(1)), weights=weights)
        out.append([not_stored] + [_mean_error(Band(size, bits), c_Un, weights, squares_n) for bits in _BITS])
        start += size
    return out


def _solve(source, costs: list[_Costs], tier_rows: list[int], total: int, name: str) -> Layout:
    """The layout of least expected loss within `total` bytes. Raises: ArgumentError that names the argument `name`."""

    def layout_at(price):
        tiers: list[list[Part]] = [[] for _ in tier_rows]
        for part_costs in costs:
            for parts, part in zip(tiers, _cheapest(part_costs, tier_rows, source.dim, price)):
                if part is not None:
                    parts.append(part)
        stored = tuple(Tier(rows, tuple(parts)) for rows, parts in zip(tier_rows, tiers))
        return Layout(source.dim, source.layers, source.has_x0, stored)

    low, high = 1e-30, 1e6  # nats a byte; at `high`, bytes are all that counts
    least = layout_at(high)
    if least.total_bytes > total:
        raise ArgumentError(name, f"expected a total of at least {least.total_bytes:,} bytes, found {total:,}")
    # Bisection of the logarithm, as prices span many orders of magnitude. The layout at `high` always fits.
    for _ in range(100):
        middle = math.sqrt(low * high)
        if layout_at(middle).total_bytes <= total:
            high = middle
        else:
            low = middle
    layout = layout_at(high)
    if not any(tier.parts for tier in layout.tiers):
        raise ArgumentError(name, f"expected room for at least one layer, found a total of {total:,} bytes")
    return layout


class _Choice(NamedTuple):
    """A way to store a part.

    Attributes:
      cost: the rise in loss plus the price of the bytes, in nats.
      parts: the part in each tier; None where it is not stored.
    """

    cost: float
    parts: list[Part | None]


def _cheapest(costs: _Costs, tier_rows, dim, price) -> list[Part | None]:
    """The part in each tier, stored in the way that costs least where a byte costs `price` nats."""
    choices = [_plain(costs, tier_rows, dim, price)]
    if costs.group_KGB is not None:
        choices.append(_rotated(costs, tier_rows, dim, price))
    if costs.drop is not None:
        choices.append(_Choice(costs.drop, [None] * len(tier_rows)))
    return min(choices, key=lambda choice: choice.cost).parts


def _plain(costs: _Costs, tier_rows, dim, price) -> _Choice:
    """The choice to store the vector as it is, at the best number of bits in each tier."""
    parts, total = [], 0.0
    for rows, losses_B in zip(tier_rows, costs.plain_KB):
        costs_B = [loss + price * rows * Band(dim, bits).bytes for loss, bits in zip(losses_B, _BITS)]
        best = int(np.argmin(costs_B))
        parts.append(Part(costs.name, (Band(dim, _BITS[best]),), rotated=False))
        total += costs_B[best]
    return _Choice(total, parts)


def _rotated(costs: _Costs, tier_rows, dim, price) -> _Choice:
    """The choice to store coefficients in the basis, each group at its best number of bits.

    A tier's coefficients end before the first group that is better not stored: later groups are weaker.
    """
    parts, total, basis_rows = [], 0.0, 0
    bytes_GB = np.array([[0] + [Band(size, bits).bytes for bits in _BITS] for size in costs.sizes_G])
    for rows, losses_GB in zip(tier_rows, costs.group_KGB):
        costs_GB = losses_GB + price * rows * bytes_GB
        best_G = costs_GB.argmin(1)
        not_stored = np.nonzero(best_G == 0)[0]
        kept = int(not_stored[0]) if len(not_stored) else len(best_G)
        total += costs_GB[np.arange(kept), best_G[:kept]].sum() + losses_GB[kept:, 0].sum()
        basis_rows = max(basis_rows, sum(costs.sizes_G[:kept]))  # the tiers share one basis
        bands = _joined([Band(size, _BITS[best - 1]) for size, best in zip(costs.sizes_G, best_G[:kept])])
        parts.append(Part(costs.name, bands, rotated=True) if bands else None)
    return _Choice(total + price * basis_rows * dim * 2, parts)  # 2 bytes an element: bases are bfloat16


def _joined(bands: list[Band]) -> tuple[Band, ...]:
    """The bands with neighbours of the same number of bits joined into one."""
    return tuple(
        Band(sum(band.size for band in group), bits)
        for bits, group in itertools.groupby(bands, key=lambda band: band.bits)
    )
