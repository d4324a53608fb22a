"""What each row of a ToL file holds: tiers of rows, parts of a row."""

import collections
import dataclasses
import functools
import itertools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.records import Size
from memoryllm_jax.tol import codec
from memoryllm_jax.tol.codec import FLOATS, Part


@dataclasses.dataclass(frozen=True)
class Tier:
    """`rows` consecutive rows that have the same parts in the same encoding."""

    rows: Size
    parts: tuple[Part, ...]

    @functools.cached_property  # a sum over all parts, which every read of rows asks for
    def stride(self) -> int:
        """Bytes of a row."""
        return sum(part.bytes for part in self.parts)

    @property
    def float_bits(self) -> int:
        """16 or 32 if the rows are one ordinary tensor of floats of that size, [rows, parts, D]; else 0."""
        # That takes equal parts of one band each, not rotated.
        kinds = {(band.bits, band.size) for part in self.parts for band in part.bands}
        if len(kinds) != 1 or any(part.rotated or len(part.bands) > 1 for part in self.parts):
            return 0
        ((bits, _),) = kinds
        return bits if bits in FLOATS else 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """What every row of the file holds.

    Attributes:
      dim: width of the model.
      layers: number of layers of the model.
      has_x0: whether rows hold the input embedding.
      tiers: Tiers, in the order of the rows.
    """

    # Far more than any model has. Readers hold rows of all layers, also of those that the file drops.
    dim: Annotated[int, Meta(ge=1, le=1 << 16)]
    layers: Annotated[int, Meta(ge=1, le=1 << 12)]
    has_x0: bool
    # `decode_rows` decodes every row in the encoding of every tier. A budget makes three.
    tiers: Annotated[tuple[Tier, ...], Meta(min_length=1, max_length=64)]

    @property
    def rows(self) -> int:
        return sum(tier.rows for tier in self.tiers)

    @property
    def first_rows(self) -> list[int]:
        """Number of the first row of each tier."""
        return [0, *itertools.accumulate(tier.rows for tier in self.tiers[:-1])]

    @functools.cached_property
    def stride(self) -> int:
        """Bytes of the longest row."""
        return max(tier.stride for tier in self.tiers)

    @property
    def rotated(self) -> dict[str, int]:
        """{part name: number of vectors in its basis} of rotated parts: the largest rank in any tier."""
        ranks: dict[str, int] = {}
        for tier in self.tiers:
            for part in tier.parts:
                if part.rotated:
                    ranks[part.name] = max(ranks.get(part.name, 0), part.rank)
        return ranks

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(tier.rows * tier.stride for tier in self.tiers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows and of the bases, which are bfloat16: what a budget limits."""
        return self.row_bytes + sum(rank * self.dim * 2 for rank in self.rotated.values())

    @functools.cached_property
    def row_type(self) -> tuple[np.dtype, tuple[int, ...]]:
        """dtype and shape of an encoded row in memory: [parts, D] where it is floats only, else bytes."""
        bits = self.tiers[0].float_bits if len(self.tiers) == 1 else 0
        if not bits:
            return np.dtype(np.uint8), (self.stride,)
        # Bit patterns instead of bfloat16 values: on a CPU, XLA moves uint16 thirty times as fast.
        return np.dtype({16: np.uint16, 32: np.float32}[bits]), (len(self.tiers[0].parts), self.dim)

    def view(self, raw: np.ndarray) -> np.ndarray:
        """Encoded rows uint8 [n, stride] as rows of `row_type`, without a copy."""
        dtype, shape = self.row_type
        return raw.view(dtype).reshape(len(raw), *shape)

    def kept_layers(self) -> list[int]:
        """Numbers of the layers that at least one tier holds."""
        return sorted(self._tiers_of_layer())

    def dropped_layers(self) -> list[int]:
        """Numbers of the layers that at least one tier lacks."""
        tiers_of = self._tiers_of_layer()
        return [layer for layer in range(self.layers) if tiers_of[layer] < len(self.tiers)]

    @property
    def dropped_count(self) -> int:
        """Number of the layers that at least one tier lacks."""
        return self.layers - list(self._tiers_of_layer().values()).count(len(self.tiers))

    def _tiers_of_layer(self) -> collections.Counter[int]:
        """{layer: number of tiers that hold it}."""
        return collections.Counter(part.layer for tier in self.tiers for part in tier.parts if part.layer is not None)

    def codec(self) -> str:
        """The encoding in a few words, such as "bfloat16" or "int8+int4, low rank"."""
        bits = {band.bits for tier in self.tiers for part in tier.parts for band in part.bands}
        names = [{32: "float32", 16: "bfloat16"}.get(b, f"int{b}") for b in sorted(bits, reverse=True)]
        return "+".join(names) + (", low rank" if self.rotated else "")

    def to_json(self) -> dict:
        """The layout as docs/tol.md specifies it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Layout":
        """The layout whose `to_json` is this JSON text. Raises: UserError that begins with `where`."""
        layout = records.parse(cls, text, where)
        for number, tier in enumerate(layout.tiers):
            layout._check_parts(tier, f"{where}: tiers[{number}]")
        # Such a file would hold nothing that bounds the width.
        if not any(tier.parts for tier in layout.tiers):
            raise UserError(f"{where}: expected at least one part in some tier, found none")
        return layout

    def _check_parts(self, tier: Tier, where: str) -> None:
        order = [-1 if part.layer is None else part.layer for part in tier.parts]  # x0 comes first
        for (before, after), part in zip(itertools.pairwise(order), tier.parts[1:]):
            if before >= after:
                raise UserError(f"{where}: expected x0 and then layers upwards, each once, found {part.name} too late")
        if (-1 in order) != self.has_x0:
            problem = "with x0, found none" if self.has_x0 else "without x0, found one"
            raise UserError(f"{where}: expected a row {problem}")
        for part in tier.parts:
            if part.layer is not None and part.layer >= self.layers:
                raise UserError(f"{where}: expected layers below {self.layers}, found {part.name}")
            if part.rank > self.dim or (part.rank < self.dim and not part.rotated):
                most = "at most " if part.rotated else ""
                raise UserError(f"{where}: {part.name}: expected {most}{self.dim} elements, found {part.rank}")


def decode_rows(layout: Layout, raw, tier_U, bases: dict) -> dict:
    """Decodes rows of any tiers. For use in jit.

    Args:
      layout: of the file.
      raw: encoded rows as `Layout.view` gives them, [U, ...].
      tier_U: int32 [U], the tier of each row.
      bases: {part name: [rank, D]} of rotated parts.
    Returns: {part name: [U, D]}. A layer that a row's tier drops is zero; one that all tiers drop is absent.
    """
    if raw.ndim == 3:  # floats only
        dtype = FLOATS[layout.tiers[0].float_bits]
        parts = layout.tiers[0].parts
        return {part.name: jax.lax.bitcast_convert_type(raw[:, i], dtype) for i, part in enumerate(parts)}
    decoded = [codec.decode(tier.parts, raw[:, : tier.stride], bases) for tier in layout.tiers]
    if len(decoded) == 1:
        return decoded[0]
    # Shapes must be static: every row is decoded in the encoding of each tier, and its own tier's result is selected.
    out = {}
    for number, vectors in enumerate(decoded):
        for name, x_UD in vectors.items():
            out[name] = jnp.where((tier_U == number)[:, None], x_UD.astype(jnp.float32), out.get(name, 0.0))
    return out
