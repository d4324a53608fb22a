"""What each row of a ToL file holds: tiers of rows, parts of a row."""

import dataclasses

import numpy as np

from memoryllm_jax.tol.codec import FLOATS, Band, Part


@dataclasses.dataclass(frozen=True)
class Tier:
    """`rows` consecutive rows that are encoded alike."""

    rows: int
    parts: tuple[Part, ...]

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return sum(part.bytes for part in self.parts)

    @property
    def plain(self) -> int:
        """16 or 32 if every element is a float of that size, so that the rows are one ordinary tensor; else 0."""
        kinds = {(band.bits, band.size) for part in self.parts for band in part.bands}
        single = len(kinds) == 1 and not any(part.rotated or len(part.bands) > 1 for part in self.parts)
        return next(iter(kinds))[0] if single and next(iter(kinds))[0] in FLOATS else 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """What every row of the file holds; rows of the first tier come first."""

    dim: int
    layers: int
    has_x0: bool
    tiers: tuple[Tier, ...]

    @property
    def rows(self) -> int:
        return sum(tier.rows for tier in self.tiers)

    @property
    def stride(self) -> int:
        """Bytes of the longest row."""
        return max(tier.stride for tier in self.tiers)

    @property
    def rotated(self) -> dict[str, int]:
        """{part name: largest rank of any tier} of the parts that need a basis."""
        ranks: dict[str, int] = {}
        for part in (p for tier in self.tiers for p in tier.parts if p.rotated):
            ranks[part.name] = max(ranks.get(part.name, 0), part.rank)
        return ranks

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(tier.rows * tier.stride for tier in self.tiers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows and bases: what a budget counts."""
        return self.row_bytes + sum(rank * self.dim * 2 for rank in self.rotated.values())

    @property
    def row_type(self) -> tuple[np.dtype, tuple[int, ...]]:
        """dtype and shape of a row in memory: [parts, D] where it is floats only, else bytes.

        bfloat16 goes as its bits, which XLA moves on a CPU thirty times as fast.
        """
        if len(self.tiers) == 1 and self.tiers[0].plain:
            dtype = {16: np.uint16, 32: np.float32}[self.tiers[0].plain]
            return np.dtype(dtype), (len(self.tiers[0].parts), self.dim)
        return np.dtype(np.uint8), (self.stride,)

    def view(self, raw: np.ndarray) -> np.ndarray:
        """Encoded rows uint8 [n, stride] as rows of `row_type`, without a copy."""
        dtype, shape = self.row_type
        return raw.view(dtype).reshape(len(raw), *shape)

    def kept_layers(self) -> list[int]:
        """Layers that some tier holds."""
        names = {part.name for tier in self.tiers for part in tier.parts}
        return [layer for layer in range(self.layers) if f"ffn.{layer}" in names]

    def codec(self) -> str:
        """In few words, for people."""
        bits = sorted({b.bits for t in self.tiers for p in t.parts for b in p.bands}, reverse=True)
        names = [{32: "float32", 16: "bfloat16"}.get(b, f"int{b}") for b in bits]
        return "+".join(names) + (", low rank" if self.rotated else "")

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: dict) -> "Layout":
        def part(p):
            return Part(p["name"], tuple(Band(b["size"], b["bits"]) for b in p["bands"]), p["rotated"])

        tiers = tuple(Tier(t["rows"], tuple(part(p) for p in t["parts"])) for t in tree["tiers"])
        return cls(tree["dim"], tree["layers"], tree["has_x0"], tiers)
