"""Describes what a ToL file holds, as text and as JSON."""

import dataclasses

import numpy as np

from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.sources import read_rows


@dataclasses.dataclass(frozen=True)
class TokenNorms:
    """The norms of one token's row.

    Attributes:
      token: the token's id.
      text: the text that it decodes to.
      row: number of its row in the file.
      norms: float32 [layers], the L2 norm of FFN-M's output of each layer.
    """

    token: int
    text: str
    row: int
    norms: np.ndarray

    def line(self) -> str:
        """The norms as one line of text."""
        norms = " ".join(f"{norm:.3g}" for norm in self.norms)
        return f"#{self.token} {self.text!r}: row {self.row}, norms by layer {norms}"


def token_norms(tol: TolFile, names: tuple[str, ...]) -> list[TokenNorms]:
    """The norms of the rows of tokens, each named by a text that is one token, or as #ID. Raises: UserError."""
    if not names:
        return []
    tokenizer = tol.tokenizer()
    ids = [tokenizer.token(name, "token", tol.vocab_size) for name in names]
    rows = read_rows(tol, np.array(ids, np.int32))
    found = []
    for token, row_LD in zip(ids, rows):
        text, row = tokenizer.decode([token]), int(tol.row_of_token[token])
        found.append(TokenNorms(token, text, row, np.linalg.norm(row_LD, axis=1)))
    return found


def lines(tol: TolFile) -> list[str]:
    """The description of a file as lines of text."""
    layout, meta = tol.layout, tol.metadata
    x0 = ", with the input embedding" if layout.has_x0 else ""
    dropped = ", ".join(map(str, tol.layout.dropped_layers())) or "none"
    # `precompute` orders rows by the counts if it has them, and stores these counts only then.
    order = "frequency" if "counts" in tol.tensors else "token id"
    # 12 of 64 digits are enough to tell files apart and keep the line short; the JSON has them whole.
    digests = {name: meta[f"{name}_digest"][:12] for name in ("rows", "decoder", "tokenizer")}
    out = [
        f"{tol.path}: {tol.size:,} bytes, {meta['codec']}",
        f"made from {meta['architecture']} at step {meta['step']}, computed in {meta['dtype']}: {layout.layers} layers "
        f"of width {layout.dim}, {tol.vocab_size:,} tokens{x0}",
        f"dropped layers: {dropped}; rows in order of {order}",
        f"digests: rows {digests['rows']}, decoder {digests['decoder']}, tokenizer {meta['tokenizer_kind']} "
        f"{digests['tokenizer']}",
        f"{layout.row_bytes / tol.vocab_size:,.0f} bytes a token on average; bases "
        f"{layout.total_bytes - layout.row_bytes:,} bytes",
    ]
    for number, tier in enumerate(layout.tiers):
        out.append(f"tier {number}: {tier.rows:,} rows of {tier.stride:,} bytes")
        for part in tier.parts:
            bands = " + ".join(f"{band.size} at {band.bits} bits" for band in part.bands)
            out.append(f"  {part.name:>7}  {bands}{'  in a rotated basis' if part.rotated else ''}")
    return out


def record(tol: TolFile, tokens: list[TokenNorms]) -> dict:
    """The description of a file and of the named tokens' norms as JSON."""
    # In the metadata the layout is JSON within a text: here it is a tree that programs can read.
    found = {
        "size": tol.size,
        "metadata": {name: text for name, text in tol.metadata.items() if name != "layout"},
        "layout": tol.layout.to_json(),
    }
    if tokens:
        found["tokens"] = {entry.token: entry.norms.tolist() for entry in tokens}
    return found
