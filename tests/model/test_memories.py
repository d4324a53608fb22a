"""Rows of every kind of token memory, a token's own and those of the controls, wherever they are computed."""

import contextlib
import functools

import jax
import numpy as np
import pytest
import reference
from lab import opened, random_params, write_untrained
from tol_files import file_rows

from memoryllm_jax.checkpoint.trained import TrainedModel, for_serving
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.hf import config_json
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.model import flops, memories, sharding, transformer
from memoryllm_jax.tol import compress

IDS = np.array([[3, 0, 500, 7], [7, 511, 3, 1]], np.int32)


def expected_rows(params, m, ids):
    return [reference.memory_rows(params, layer, ids, m) for layer in range(m.layers)]


@pytest.mark.parametrize("architecture, rows", [("flex-3", "shared"), ("value-3", "permuted"), ("bov-3", "frozen")])
def test_controls_are_the_same_in_training_and_after_it(make_config, architecture, rows):
    """On two batch shards."""
    config = make_config(architecture, **{"model.vocab_size": 512, "model.rows": rows})
    m, mesh = config.model, sharding.make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    placed, params = random_params(m, mesh)
    assert flops.parameters(config)["total"] == sum(x.size for x in jax.tree.leaves(params))
    expected = expected_rows(params, m, IDS)
    with jax.set_mesh(mesh):
        rows_of = functools.partial(transformer.LanguageModel(m).apply, method="token_rows")
        in_training = rows_of({"params": placed}, IDS).rows_LSUP
    live = LiveRows(m, for_serving(placed, m), mesh).fetch(IDS.reshape(-1)).rows_LSUP
    for layer, row_SUP in enumerate(expected):
        if row_SUP is None:
            assert live[layer] is None
            continue
        largest = np.abs(row_SUP).max()
        np.testing.assert_allclose(in_training[layer - m.row_layers.start], row_SUP, atol=1e-5 * largest)
        np.testing.assert_allclose(live[layer][0], row_SUP.reshape(IDS.size, -1), atol=1e-5 * largest)


@pytest.mark.parametrize("architecture, rows", [("flex-3", "permuted"), ("memory", "frozen")])
def test_a_tol_file_holds_the_rows_that_the_model_reads(make_config, tmp_path, architecture, rows):
    config = make_config(architecture, **{"model.rows": rows})
    workdir, path = write_untrained(config, str(tmp_path / "run")), str(tmp_path / "tol")
    compress.precompute(workdir, path, compress.Options(bits="32"))
    with contextlib.closing(TrainedModel(workdir)) as trained:
        m, tokenizer_digest = trained.config, trained.tokenizer.digest
        _, params = random_params(m, trained.mesh, std=0.2)  # as `write_untrained` draws them
    with opened(path) as tol:
        assert tol.metadata["architecture"] == m.architecture
        found = file_rows(tol)
        tol.check_model(m, tokenizer_digest, None)
        other = make_config(architecture, **{"model.rows": "shared", "model.vocab_size": m.vocab_size}).model
        with pytest.raises(UserError, match=f"architecture {m.architecture} in the file, "):
            tol.check_model(other, tokenizer_digest, None)
    every_id = np.arange(m.vocab_size)
    for layer, row_VD in enumerate(expected_rows(params, m, every_id)):
        np.testing.assert_allclose(found[f"ffn.{layer}"], row_VD, atol=1e-5 * np.abs(row_VD).max())


def test_controls_are_refused_where_they_mean_nothing(make_config):
    for architecture in ("base", "no-memory-3"):
        with pytest.raises(
            UserError, match=r"config\.model\.rows: expected own, as the layers look up no rows, found "
        ):
            make_config(architecture, **{"model.rows": "shared"})
    with pytest.raises(UserError, match=r"config\.optimizer\.train: expected all, as no parameters make frozen rows"):
        make_config("rows-3", **{"model.rows": "frozen", "optimizer.train": "memory"})
    m = make_config("memory", **{"model.rows": "frozen", "model.vocab_size": 8}).model
    assert (m.memory_dim, m.row_dim, m.architecture) == (0, 32, "memory with frozen rows")
    with pytest.raises(UserError, match=r"config\.model\.rows: expected own to export, found frozen"):
        config_json.to_json(m, 32, "float32", {})


def test_the_permutation_and_frozen_rows_never_change(make_config):
    """Checkpoints and ToL files depend on them. JAX promises the bits of Threefry, but not those of a normal draw."""
    m = make_config("memory", **{"model.rows": "permuted", "model.vocab_size": 8}).model
    assert memories.row_ids(m, np.arange(8)).tolist() == [7, 0, 1, 6, 3, 4, 2, 5]
    m = make_config("memory", **{"model.rows": "frozen", "model.vocab_size": 8}).model
    rows = memories.layer_rows(m, memories.by_layer(m, {})[1], np.array([3, 5]), None)[0]
    np.testing.assert_allclose(rows[1, :3], [-7.8219e-4, 4.16362e-3, 2.15341e-3], rtol=1e-5)
