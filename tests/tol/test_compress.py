"""Uniform compression: how much the rows err, and options that are refused."""

import dataclasses
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from lab import opened, some_tokens, step_logits
from tol_files import content, file_rows, relative, rows_of

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol import build, codec, compress
from memoryllm_jax.tol.codec import Band, Part
from memoryllm_jax.tol.sources import FileSource, LiveSource


def errors_of(lab, path, name="flex-3"):
    """{part: error over norm}, and the rows."""
    with opened(path) as tol:
        rows = file_rows(tol)
    exact = {f"ffn.{layer}": y for layer, y in enumerate(lab.memory(name))}
    return {part: relative(rows[part], y) for part, y in exact.items() if part in rows}, rows


def test_uniform_compression_errs_as_little_as_it_should(lab):
    for bits, low, high in (("8", 1e-4, 0.01), ("4", 0.01, 0.15), ("4,1:8", 1e-4, 0.15)):
        found, rows = errors_of(lab, lab.tol("flex-3", bits=bits))
        assert all(low < error < high for error in found.values()), (bits, found)
        assert relative(rows["x0"], lab.params("flex-3")[0]["embedding"]) < 0.01  # at least 8 bits
    assert found["ffn.1"] < 0.01 < found["ffn.0"]


def test_low_rank_keeps_the_largest_singular_values(lab):
    path = lab.tol("flex-3", bits="32", rank="0.5,1:1.0")
    found, _ = errors_of(lab, path)
    with opened(path) as tol:
        assert tol.layout.rotated == {"ffn.0": 16}
    values = np.linalg.svd(lab.memory("flex-3")[0].astype(np.float64), compute_uv=False)
    tail = np.sqrt(np.square(values[16:]).sum() / np.square(values).sum())
    assert tail > 1e-3 and found["ffn.0"] == pytest.approx(tail, rel=0.01)
    assert found["ffn.1"] < 1e-6


def test_rotated_coefficients_lose_no_more_to_few_bits_than_the_vectors():
    rng = np.random.default_rng(0)
    sizes = np.geomspace(100, 0.1, 64)
    sizes[-2:] = 0  # directions that no row has
    rotation = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    rows = jnp.asarray(rng.standard_normal((512, 64)) * sizes @ rotation, jnp.float32)
    bases = {"ffn.0": jnp.asarray(build._eigenvectors(np.asarray(rows.T @ rows)).stored)}
    found = {}
    for rotated in (False, True):
        part = Part("ffn.0", (Band(64, 3),), rotated)
        raw = codec.encode((part,), {"ffn.0": rows}, bases)
        found[rotated] = relative(codec.decode((part,), raw, bases)["ffn.0"], rows)
    assert found[True] < 1.05 * found[False], found


def test_basis_of_rows_that_are_all_zero_is_finite():
    basis = build._eigenvectors(np.zeros((8, 8), np.float32)).stored
    np.testing.assert_array_equal(np.square(basis.astype(np.float32)).sum(1), 1)


def test_dropped_layers_are_zero(lab):
    path = lab.tol("flex-3", drop_layers=("1",))
    found, rows = errors_of(lab, path)
    assert set(rows) == {"x0", "ffn.0"} and max(found.values()) < 1e-6
    with opened(path) as tol:
        assert json.loads(tol.metadata["dropped_layers"]) == [1] and not rows_of(tol)[:, 1].any()
    tokens = some_tokens(8)
    with lab.model("flex-3", path, cache=1 << 10) as dropped, lab.model("flex-3") as live:
        dropped_layer = live.decoder.scaled(np.array([1.0, 0.0]), np.ones(2))
        expected = step_logits(dropped_layer, live.rows, tokens)
        found = step_logits(dropped.decoder, dropped.rows, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_compressed_file_equals_precompute_with_the_same_options(lab, tmp_path):
    choices = {"bits": "4,1:16", "drop_layers": ("0",)}
    out = str(tmp_path / "t")
    with opened(lab.tol("flex-3", data=lab.data_path)) as tol:  # order and counts come along
        compress.compress_file(tol, compress.Options(**choices), out)
    with opened(out) as tol, opened(lab.tol("flex-3", data=lab.data_path, **choices)) as direct:
        assert tol.layout == direct.layout and tol.metadata == direct.metadata
        assert relative(rows_of(tol), rows_of(direct)) < 1e-4
        with pytest.raises(UserError, match="expected a file of 16 or 32 bits with all layers, found bfloat16"):
            compress.compress_file(tol, compress.Options(), str(tmp_path / "again"))


def test_a_file_with_integers_or_dropped_layers_in_any_tier_is_not_compressed(lab, tmp_path):
    with opened(lab.tol("flex-3")) as tol:
        (tier,) = tol.layout.tiers
        integers = tuple(dataclasses.replace(part, bands=(Band(32, 4),)) for part in tier.parts)
        for second, found in (
            (integers, "float32.int4, with 0 of 2"),
            (tier.parts[:-1], "float32, with 1 of 2 layers"),
        ):
            other = dataclasses.replace(tier, parts=second)
            tol.layout = dataclasses.replace(tol.layout, tiers=(tier, other))
            with pytest.raises(UserError, match=f"expected a file of 16 or 32 bits with all layers, found {found}"):
                compress.compress_file(tol, compress.Options(), str(tmp_path / "t"))


def test_a_rank_alone_keeps_the_bits_of_the_file(lab):
    with opened(lab.tol("flex-3", bits="16")) as tol:
        (tier,) = compress.uniform(FileSource(tol), compress.Options(rank="0.5")).tiers
    assert [part.bands for part in tier.parts] == [(Band(32, 16),), (Band(16, 16),), (Band(16, 16),)]


def test_only_a_tol_file_of_the_same_weights_is_replaced(lab, tmp_path):
    out, source = str(tmp_path / "t.safetensors"), LiveSource(TrainedModel(lab.workdir("memory")))
    with (
        opened(lab.tol("memory")) as tol,
        pytest.raises(UserError, match="another file than the one that is compressed"),
    ):
        compress.compress_file(tol, compress.Options(), tol.path)
    for there, found in (
        (b"a text", "found another file: .* expected a ToL file"),
        (content(lab.tol("flex-3")), r"found a file of other weights or with edits \(flex-3 at step 16\)"),
    ):
        with open(out, "wb") as file:
            file.write(there)
        with pytest.raises(UserError, match=f"output: expected a name that is free, or .*{found}"):
            compress.write(source, compress.Options(bits="8"), out)
        assert content(out) == there
    for nowhere, found in (("gs://b/t", "a path on a disk, found the URL"), (f"{out}.d/t", "a folder that can be wri")):
        with pytest.raises(UserError, match=f"output: expected .*{found}.*{nowhere}"):
            compress.write(source, compress.Options(bits="8"), nowhere)
    shutil.copy(lab.tol("memory"), out)
    compress.write(source, compress.Options(bits="8"), out)
    with opened(out) as tol:
        assert tol.layout.codec() == "int8"


def test_bad_options_are_refused_and_leave_nothing(lab, tmp_path):
    out, source = str(tmp_path / "t.safetensors"), LiveSource(TrainedModel(lab.workdir("memory")))
    for choices, found in [
        ({"bits": "9"}, "bits: expected one of 32, 16, 8, .*, found '9'"),
        ({"bits": "4,7:8"}, "bits: expected layers from 0 to 1, .* found '7'"),
        ({"bits": "0:8"}, "bits: expected a value for all layers first"),
        ({"bits": "4,1:8,1:2"}, r"bits: expected one value for ffn\.1, found another: 1:2"),
        ({"drop_layers": ("99",)}, "drop_layers: expected layers from 0 to 1, .* found '99'"),
        ({"drop_layers": ("0", "1")}, "drop_layers: expected at least one layer to stay"),
        ({"rank": "1.5"}, "rank: expected a share up to 1.0 .*found '1.5'"),
        ({"rank": "0"}, "rank: expected a share"),
        ({"rank": "many"}, "rank: expected a share"),
        ({"rank": "0.5,x0:1"}, "rank: expected layers, found x0"),
        ({"total_size": "20KB"}, "total_size: expected data too"),
        ({"total_size": "20KB", "data": lab.data_path}, "total_size: expected workdir too"),
        ({"total_size": "20KB", "bits": "4", "data": lab.data_path}, "total_size: expected no bits too"),
        ({"total_size": "20KB", "bytes_per_token": "1KB"}, "bytes_per_token: expected no total_size too"),
        ({"data": lab.other_data()}, "made with another tokenizer"),
    ]:
        with pytest.raises(UserError, match=found):
            compress.write(source, compress.Options(**choices), out)
    assert compress.uniform(source, compress.Options(bits="4,x0:2")).tiers[0].parts[0].bands == (Band(32, 2),)
    with pytest.raises(UserError, match=r"expected a memory, flex or rows model, .*, found base"):
        compress.precompute(lab.workdir("base"), out, compress.Options())
    assert os.listdir(tmp_path) == []
