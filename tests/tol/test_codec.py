"""Bands of rows against docs/tol.md, decoded by tests/tol_files.py."""

import numpy as np
import xxhash
from tol_files import DIM, VOCAB, Reader, bfloat16, decode_band

from memoryllm_jax.tol import codec
from memoryllm_jax.tol.codec import Band
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.sources import FileSource


def test_bytes_in_the_specification():
    raw, elements = bytes.fromhex("00 3F AA CC F0"), np.arange(8) / 2 - 1.75
    np.testing.assert_array_equal(decode_band(np.frombuffer(raw, "u1")[None], 8, 3)[0][0], elements)
    np.testing.assert_array_equal(codec.decode_band(Band(8, 3), np.frombuffer(raw, "u1")[None])[0], elements)
    assert xxhash.xxh3_64_intdigest(raw) == 0xE09CEA25323886C0


def test_integers_are_within_half_a_step(mixed_file):
    """Each is that close to the value or, where its group was clipped, to the last value in the range of the codes."""
    path, source = mixed_file
    reader, seen = Reader(path), set()
    for tier in range(2):
        for part, band, first, values, steps in reader.bands(tier):
            size, bits = band["size"], band["bits"]
            want = source.table[part["name"]][reader.tokens(tier)].astype(np.float64)
            if part["rotated"]:
                basis = bfloat16(reader.tensor(f"basis.{part['name']}")).astype(np.float64)
                want = want @ basis.T / np.square(basis).sum(1)
            want = want[:, first : first + size]
            largest = np.abs(want).max()
            if steps is None:
                np.testing.assert_allclose(values, want, rtol=2**-8 if bits == 16 else 1e-6, atol=1e-5 * largest)
                continue
            seen.add(bits)
            most = steps * 2 ** (bits - 1)
            error = np.abs(values - np.clip(want, -most, most))
            assert (error <= steps * (0.5 + 1e-3) + 1e-6 * largest).all(), (part, band)
            for start in range(0, size, 64):
                top = np.abs(want[:, start : start + 64]).max(1)
                assert (most[:, start] >= 0.49 * top).all() and (most[:, start] <= 1.01 * top).all(), (part, band)
    assert seen == {2, 3, 4, 5, 6, 7, 8}
    assert not reader.vectors()["ffn.2"][5].any()


def rotation_bounds(reader):
    """{rotated part: float64 [V, D]}, by how much a sum in float32 may differ from the exact one (docs/tol.md)."""
    bounds = {}
    for tier in range(2):
        for part, band, first, values, _ in reader.bands(tier):
            if part["rotated"]:
                rank = sum(band["size"] for band in part["bands"])
                basis = np.abs(bfloat16(reader.tensor(f"basis.{part['name']}"))[first : first + band["size"]])
                bound = bounds.setdefault(part["name"], np.zeros((VOCAB, DIM)))
                bound[reader.tokens(tier)] += rank * 2.0**-24 * np.abs(values) @ basis
    return bounds


def test_package_decodes_as_the_independent_reader(mixed_file):
    path, source = mixed_file
    tol = TolFile(path)
    theirs = FileSource(tol).vectors(np.arange(VOCAB, dtype=np.int32))
    ours = Reader(path).vectors()
    assert set(ours) == set(theirs) == set(source.table)
    bounds = rotation_bounds(Reader(path))
    assert set(bounds) == {"ffn.0", "ffn.3"}
    for name, rows in ours.items():
        assert (np.abs(np.float64(theirs[name]) - rows) <= bounds.get(name, 0)).all(), name
    assert not ours["ffn.4"].any() and ours["ffn.5"].any()
    np.testing.assert_array_equal(ours["ffn.6"].any(1), tol.row_of_token < 110)
    tol.close()
