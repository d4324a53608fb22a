"""Encodes a token's vectors to bytes and decodes them, in JAX: floats, or integers of 2 to 8 bits.

A row consists of parts: "x0", the input embedding where it is untied, and "ffn.L", the output of FFN-M of layer L. A
part's vector is stored as it is, or as its first coefficients in a rotated basis that all tokens share (low rank by
SVD). Its elements are split into consecutive bands, each with its own number of bits. A layer without a part is
dropped: its rows are zero.

Integers of b bits are in groups of 64 that share one bfloat16 scale s: element = (code - 2^(b-1) + 1/2) s.

Shapes: U tokens, D width, n elements of a band, G groups of g elements.
"""

import dataclasses

import jax
import jax.numpy as jnp

GROUP = 64  # elements that share a scale
FLOATS = {32: jnp.float32, 16: jnp.bfloat16}
INTEGERS = (2, 3, 4, 5, 6, 7, 8)
# The outermost code stands for one of these fractions of a group's largest magnitude: the one with the least error.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclasses.dataclass(frozen=True)
class Band:
    """`size` elements at `bits` bits each."""

    size: int
    bits: int

    @property
    def padded(self) -> int:
        """Elements stored: `size`, rounded up to whole groups, and so to whole bytes of every bit plane."""
        return -(-self.size // self.group) * self.group

    @property
    def group(self) -> int:
        """Elements that share a scale."""
        return GROUP if self.size >= GROUP else -(-self.size // 8) * 8

    @property
    def bytes(self) -> int:
        if self.bits in FLOATS:
            return self.size * self.bits // 8
        return 2 * (self.padded // self.group) + self.padded * self.bits // 8


@dataclasses.dataclass(frozen=True)
class Part:
    """One vector of a row: "x0" or "ffn.L". `rotated`: stored as coefficients in a basis."""

    name: str
    bands: tuple[Band, ...]
    rotated: bool = False

    @property
    def bytes(self) -> int:
        return sum(band.bytes for band in self.bands)

    @property
    def rank(self) -> int:
        """Elements stored: the width, or fewer of a rotated part."""
        return sum(band.size for band in self.bands)


def encode(parts: tuple[Part, ...], vectors: dict, bases: dict):
    """Encodes vectors {part name: [U, D]} to uint8 [U, bytes of a row].

    `bases`: {part name: [rank or more, D]} of rotated parts.
    """
    return jnp.concatenate([_encode_part(part, vectors[part.name], bases) for part in parts], 1)


def decode(parts: tuple[Part, ...], raw, bases: dict) -> dict:
    """Decodes what `encode` made to {part name: [U, D]}: bfloat16 or float32 as stored, float32 for integers."""
    out, offset = {}, 0
    for part in parts:
        out[part.name] = _decode_part(part, raw[:, offset : offset + part.bytes], bases)
        offset += part.bytes
    return out


def _encode_part(part, x_UD, bases):
    x_UD = x_UD.astype(jnp.float32)
    if part.rotated:
        x_UD = _product(x_UD, bases[part.name][: part.rank].T)
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
    if len(pieces) > 1:
        pieces = [jnp.concatenate([p.astype(jnp.float32) for p in pieces], 1)]
    (x,) = pieces
    return _product(x, bases[part.name][: part.rank]) if part.rotated else x


def _product(x, w):
    # "highest": accelerators would otherwise round float32 products to bfloat16 or TF32.
    return jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")


def encode_band(band: Band, x_Un):
    """Encodes float32 [U, n] to uint8 [U, bytes]."""
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
    """Decodes uint8 [U, bytes] to [U, n]."""
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
    """(scales bfloat16 [U, G], codes uint8 [U, G, g]), clipped so that the squared error of the group is least."""
    half = 2.0 ** (bits - 1)
    top = jnp.abs(groups_UGg).max(-1)

    def attempt(clip):
        scale = (top * clip / half).astype(jnp.bfloat16)
        # A group of zeros has scale 0, and is divided by 1 instead.
        s = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
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
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(len(x), -1)


def _from_bytes(raw, dtype):
    size = jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(raw.reshape(len(raw), -1, size), dtype)
