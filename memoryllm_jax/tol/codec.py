"""Encodes a token's vectors to bytes and decodes them, in JAX: floats, or integers of 2 to 8 bits.

A row consists of parts: "x0", the input embedding where it is untied, and "ffn.L", the output of FFN-M of layer L. A
part's vector is stored as it is, or as its first coefficients in a rotated basis that all tokens share (low rank by
SVD). The basis vectors are orthogonal, and each is as long as its coefficients would be large if it had length 1
(`build.Basis`): so the coefficients that share a scale are of one size. The elements of a part are split into
consecutive bands, each with its own number of bits. A layer without a part is dropped: it adds zero.

Integers of b bits are in groups of 64 that share one bfloat16 scale s: element = (code - 2^(b-1) + 1/2) s.
docs/tol.md specifies the bytes.

Shapes: U tokens, D width, n elements of a band, G groups of g elements.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from msgspec import Meta

from memoryllm_jax.common.records import Size

GROUP = 64  # elements that share a scale
FLOATS = {32: jnp.float32, 16: jnp.bfloat16}
INTEGERS = (2, 3, 4, 5, 6, 7, 8)
# A group's largest magnitude times one of these is the end of the range of its codes: the one of least error is taken.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclasses.dataclass(frozen=True)
class Band:
    """`size` elements at `bits` bits each."""

    size: Size
    bits: Literal[32, 16, 8, 7, 6, 5, 4, 3, 2]

    @property
    def padded(self) -> int:
        """Number of codes stored: `size` rounded up to whole groups, and so to whole bytes in every bit plane."""
        return -(-self.size // self.group) * self.group

    @property
    def group(self) -> int:
        """Number of elements that share a scale."""
        # A short band is one group of whole bytes in every bit plane.
        return GROUP if self.size >= GROUP else -(-self.size // 8) * 8

    @property
    def bytes(self) -> int:
        if self.bits in FLOATS:
            return self.size * self.bits // 8
        scales = 2 * (self.padded // self.group)  # bfloat16
        return scales + self.padded * self.bits // 8


@dataclasses.dataclass(frozen=True)
class Part:
    """One vector of a row.

    Attributes:
      name: "x0" or "ffn.L".
      bands: of its elements, in their order.
      rotated: whether the elements are coefficients in a basis.
    """

    name: Annotated[str, Meta(pattern=r"\A(x0|ffn\.(0|[1-9][0-9]{0,9}))\Z")]
    bands: Annotated[tuple[Band, ...], Meta(min_length=1)]
    rotated: bool

    @property
    def layer(self) -> int | None:
        """The layer whose output it is; None for x0."""
        return None if self.name == "x0" else int(self.name.removeprefix("ffn."))

    @property
    def bytes(self) -> int:
        return sum(band.bytes for band in self.bands)

    @property
    def rank(self) -> int:
        """Number of elements stored: the width, or fewer in a rotated part."""
        return sum(band.size for band in self.bands)


def encode(parts: tuple[Part, ...], vectors: dict, bases: dict):
    """Encodes vectors to the bytes of rows. For use in jit.

    Args:
      parts: of a row, in their order.
      vectors: {part name: [U, D]}.
      bases: {part name: [rank or more, D]} of rotated parts.
    Returns: uint8 [U, bytes of a row].
    """
    return jnp.concatenate([_encode_part(part, vectors[part.name], bases) for part in parts], 1)


def decode(parts: tuple[Part, ...], raw, bases: dict) -> dict:
    """Decodes the bytes of rows. For use in jit.

    Args:
      parts, bases: as of `encode`.
      raw: uint8 [U, bytes of a row].
    Returns: {part name: [U, D]}, in bfloat16 where a part is one unrotated band of 16 bits, else in float32.
    """
    out, offset = {}, 0
    for part in parts:
        out[part.name] = _decode_part(part, raw[:, offset : offset + part.bytes], bases)
        offset += part.bytes
    return out


def _encode_part(part, x_UD, bases):
    x_UD = x_UD.astype(jnp.float32)
    if part.rotated:
        x_UD = coefficients(x_UD, bases[part.name][: part.rank])
    pieces, start = [], 0
    for band in part.bands:
        pieces.append(encode_band(band, x_UD[:, start : start + band.size]))
        start += band.size
    return jnp.concatenate(pieces, 1)


def _decode_part(part, raw, bases):
    pieces, offset = [], 0
    for band in part.bands:
        pieces.append(decode_band(band, raw[:, offset : offset + band.bytes]))
        offset += band.bytes
    # A single band keeps its dtype, so that stored bfloat16 comes back as it is.
    x = pieces[0]
    if len(pieces) > 1:
        x = jnp.concatenate([piece.astype(jnp.float32) for piece in pieces], 1)
    if part.rotated:
        x = combined(x, bases[part.name][: part.rank])
    return x


def coefficients(x_UD, basis_RD):
    """The coefficients of vectors in a basis of R orthogonal vectors of any length, float32 [U, R]."""
    squares_R = jnp.square(basis_RD.astype(jnp.float32)).sum(1)
    # A basis vector of zeros adds nothing, whatever its coefficient is: it is divided by 1 instead.
    return _product(x_UD, basis_RD.T) / jnp.where(squares_R > 0, squares_R, 1)


def combined(coefficients_UR, basis_RD):
    """The vectors that coefficients in a basis stand for, float32 [U, D]."""
    return _product(coefficients_UR, basis_RD)


def _product(x, w):
    # "highest": accelerators would otherwise round float32 products to bfloat16 or TF32.
    return jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")


def encode_band(band: Band, x_Un):
    """Encodes float32 [U, n] to uint8 [U, bytes of the band]."""
    if band.bits in FLOATS:
        return _to_bytes(x_Un.astype(FLOATS[band.bits]))
    U = x_Un.shape[0]
    groups = jnp.pad(x_Un, ((0, 0), (0, band.padded - band.size))).reshape(U, -1, band.group)
    scales, codes = _quantize(groups, band.bits)
    codes = codes.reshape(U, band.padded)
    if band.bits == 8:
        packed = codes
    else:  # plane i holds bit i of every element, eight elements a byte
        packed = [jnp.packbits((codes >> i) & 1, axis=1, bitorder="little") for i in range(band.bits)]
        packed = jnp.concatenate(packed, 1)
    return jnp.concatenate([_to_bytes(scales), packed], 1)


def decode_band(band: Band, raw):
    """Decodes uint8 [U, bytes of the band] to [U, n], bfloat16 for 16 bits, else float32."""
    if band.bits in FLOATS:
        return _from_bytes(raw, FLOATS[band.bits])
    count = band.padded // band.group
    scales = _from_bytes(raw[:, : 2 * count], jnp.bfloat16).astype(jnp.float32)
    codes = raw[:, 2 * count :]
    if band.bits < 8:
        planes = codes.reshape(len(raw), band.bits, -1)
        bits = jnp.unpackbits(planes, axis=2, bitorder="little")
        codes = sum(bits[:, i] << i for i in range(band.bits))
    values = codes.reshape(len(raw), count, band.group).astype(jnp.float32) - (2 ** (band.bits - 1) - 0.5)
    return (values * scales[..., None]).reshape(len(raw), band.padded)[:, : band.size]


def _quantize(groups_UGg, bits):
    """Chooses each group's scale, among those of `_CLIPS`, so that its squared error is least.

    Returns: (scales bfloat16 [U, G], codes uint8 [U, G, g]).
    """
    half = 2.0 ** (bits - 1)
    top = jnp.abs(groups_UGg).max(-1)

    def attempt(clip):
        # Rounded before codes are chosen, so that they are the best for the scale that the file holds.
        scale = (top * clip / half).astype(jnp.bfloat16)
        # A group of zeros has scale 0, and is divided by 1 instead.
        s = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
        # Code k covers the step from k - half to k - half + 1 and stands for its middle: none stands for zero.
        code = jnp.clip(jnp.floor(groups_UGg / s) + half, 0, 2 * half - 1)
        error = jnp.square((code - half + 0.5) * scale.astype(jnp.float32)[..., None] - groups_UGg).sum(-1)
        return error, scale, code.astype(jnp.uint8)

    error, scale, code = attempt(_CLIPS[0])
    for clip in _CLIPS[1:]:
        new_error, new_scale, new_code = attempt(clip)
        better = new_error < error
        error = jnp.where(better, new_error, error)
        scale = jnp.where(better, new_scale, scale)
        code = jnp.where(better[..., None], new_code, code)
    return scale, code


def _to_bytes(x):
    """[U, n] of any dtype as uint8 [U, bytes]."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(len(x), -1)


def _from_bytes(raw, dtype):
    """uint8 [U, bytes] as [U, n] of a dtype."""
    size = jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(raw.reshape(len(raw), -1, size), dtype)
