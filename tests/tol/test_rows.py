"""The three places that rows are served from, on files that no model is needed for."""

import jax.numpy as jnp
import numpy as np
import pytest
from lab import opened
from tol_files import VOCAB, Source, relative, uniform

from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.tol import build, codec, edit
from memoryllm_jax.tol import rows as rows_lib
from memoryllm_jax.tol.cached_rows import CachedRows
from memoryllm_jax.tol.edit_spec import Swap
from memoryllm_jax.tol.edited_rows import EditedRows, EditedSource
from memoryllm_jax.tol.layout import Layout, Tier
from memoryllm_jax.tol.memory import FileMemory
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.rows import DeviceRows, HostTable
from memoryllm_jax.tol.sources import FileSource


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_every_place_gives_the_rows_of_the_file(mixed_file, place):
    """The file has two tiers and edits, and the cache has room for only seven rows."""
    with opened(mixed_file[0]) as tol:
        overlay = Overlay(FileMemory(tol))
        edit.Editor(overlay).add(Swap(token=3, by=9))
        mesh, source = mixed_file[1].mesh, EditedSource(FileSource(tol), overlay)
        expected = source.vectors(np.arange(VOCAB, dtype=np.int32))
        if place == "device":
            rows = DeviceRows(tol, mesh)
        else:
            table = HostTable(tol) if place == "host" else RowReader(tol)
            rows = CachedRows(table, mesh, 7 * tol.layout.stride)
        rows = EditedRows(rows, overlay, mesh)
        tokens = np.random.default_rng(0)
        for ids in [[5], [5], [3, 9], [9, 3, 5, 5], *(tokens.integers(0, VOCAB, 16) for _ in range(8))]:
            ids = np.array(ids, np.int32)
            found = rows.fetch(ids)
            np.testing.assert_allclose(found.x0_SUD[0], expected["x0"][ids], rtol=1e-6)
            for layer, y_SUD in enumerate(found.rows_LSUP):
                if y_SUD is None:
                    assert not np.asarray(expected[f"ffn.{layer}"]).any()
                else:
                    np.testing.assert_allclose(y_SUD[0], expected[f"ffn.{layer}"][ids], rtol=1e-5, atol=1e-5)


def test_least_recently_used_row_leaves_first(tokenizer, tmp_path):
    path = str(tmp_path / "t.safetensors")
    build.build(Source(tokenizer), uniform(16), path, np.arange(VOCAB))
    with opened(path) as tol:
        rows = CachedRows(RowReader(tol), Source(tokenizer).mesh, 2 * tol.layout.stride)
        for ids, misses in [([1, 2], 2), ([1], 2), ([3], 3), ([1], 3), ([2], 4), ([3], 5), ([2, 3], 5)]:
            rows.fetch(np.array(ids, np.int32))
            assert rows.misses == misses, ids
        assert (rows.requests, rows.hits) == (9, 4) and rows.stats()["hit_rate"] == 4 / 9


@pytest.mark.parametrize("place", ["device", "host"])
def test_many_short_rows_are_loaded(tokenizer, tmp_path, place):
    """More rows in a run than one system call takes buffers (1,024 on Linux)."""
    source, vocab = Source(tokenizer, has_x0=False), 20_000
    layout = Layout(8, 1, False, (Tier(vocab, (codec.Part("ffn.0", (codec.Band(8, 8),), rotated=False),)),))
    table = np.random.default_rng(0).normal(size=(vocab, 8)).astype(np.float32)
    source.vocab_size, source.dim, source.layers = vocab, 8, 1
    source.vectors = lambda ids: {"ffn.0": jnp.asarray(table)[ids]}
    path = str(tmp_path / "t.safetensors")
    build.build(source, layout, path, np.arange(vocab))
    with opened(path) as tol:
        embedding = jnp.zeros((vocab, 8))
        if place == "host":
            rows = CachedRows(HostTable(tol), source.mesh, 1 << 10, embedding)
        else:
            rows = DeviceRows(tol, source.mesh, embedding)
        ids = np.array([3, 19_999], np.int32)
        assert relative(rows.fetch(ids).rows_LSUP[0][0], table[ids]) < 0.01


def test_what_does_not_fit_is_refused(mixed_file, monkeypatch):
    mesh = mixed_file[1].mesh
    with opened(mixed_file[0]) as tol:
        row, table = tol.layout.stride, RowReader(tol)
        for size in (0, row - 1):
            with pytest.raises(ArgumentError, match=f"cache: expected at least one row of .*, {row:,} bytes, found"):
                CachedRows(table, mesh, size)
        monkeypatch.setattr(rows_lib, "host_memory", lambda: 100 * row)
        CachedRows(table, mesh, 100 * row)
        with pytest.raises(ArgumentError, match=f"cache: expected at most {100 * row:,} bytes, free on the device"):
            CachedRows(table, mesh, 101 * row)
        needed = f"needs {tol.layout.row_bytes:,} bytes, found {100 * row:,}"
        with pytest.raises(UserError, match=f"rows in host memory: {needed}"):
            HostTable(tol)
        with pytest.raises(UserError, match=f"rows on the device: {needed}"):
            DeviceRows(tol, mesh)
