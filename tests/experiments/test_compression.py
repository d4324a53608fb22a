"""Compressed rows against those of a written ToL file, and singular values against NumPy's."""

import numpy as np
import pytest
from lab import TOKENS, loss_on, run_experiment

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.evaluation.measure import Measure, TextOptions
from memoryllm_jax.experiments import compression
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.tol import compress
from memoryllm_jax.tol.sources import LiveSource


def test_stored_rows_are_those_of_a_file(lab, tmp_path):
    name = "flex-3"
    setting, path = compress.Options(bits="4"), str(tmp_path / "tol.safetensors")
    compress.precompute(lab.workdir(name), path, setting)
    with lab.model(name, path, "host") as model:
        expected = loss_on(model, lab.data_path)
    with lab.model(name) as model:
        live = loss_on(model, lab.data_path)
        source = LiveSource(model.trained)
        layout = compress.uniform(source, setting)
        model.rows = compression.StoredRows(source, layout, {}, np.zeros(source.vocab_size, np.int32))
        found = loss_on(model, lab.data_path)
    assert found == pytest.approx(expected, rel=1e-6) and abs(found - live) > 1e-4


def test_each_uniform_setting_is_followed_by_the_budget_of_its_size(lab, tmp_path):
    text = Measure(TextOptions(lab.data_path, "train", max_tokens=TOKENS))
    # One setting, as each compiles its own codec and that of its budget.
    choices = {"calibration": lab.data_path, "bits": (), "ranks": ("0.5",)}
    models = Models([lab.workdir("memory")])
    found, page = run_experiment(compression.compression, models, tmp_path, measure=text, **choices)
    full, rank, budget = found["settings"]
    assert (full["kind"], rank["kind"], budget["kind"]) == ("full", "rank", "budget")
    assert budget["setting"] == "budget of the size of 16 bits, rank 0.5"
    assert budget["bytes"] <= rank["bytes"] < full["bytes"]
    for values, rows_VD in zip(found["singular_values"], lab.memory("memory"), strict=True):
        expected = np.linalg.svd(rows_VD, compute_uv=False)
        np.testing.assert_allclose(values[:20], expected[:20] / expected[0], rtol=1e-3)
    assert page.count("<img") == 2
    source = LiveSource(TrainedModel(lab.workdir("memory")))
    layouts = {name: layout for _, name, layout in compression.uniform_layouts(source, ("4", "2"), ("0.5",))}
    assert list(layouts) == ["4 bits", "2 bits", "16 bits, rank 0.5"]
    assert layouts["2 bits"].total_bytes < layouts["4 bits"].total_bytes
    assert layouts["16 bits, rank 0.5"].total_bytes == rank["bytes"]
