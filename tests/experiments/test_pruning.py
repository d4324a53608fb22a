"""Pruned base beside models that were trained with its active parameters."""

import pytest
from lab import TOKENS, run_experiment

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.evaluation.measure import Measure, TextOptions
from memoryllm_jax.experiments import pruning
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.model import flops


def test_pruned_base_has_the_active_parameters_of_flex(lab, tmp_path):
    chosen = {"measure": Measure(TextOptions(lab.data_path, max_tokens=TOKENS)), "calibration": lab.data_path}
    models = Models([lab.workdir("base"), lab.workdir("memory")])
    methods = ("magnitude",)
    found, page = run_experiment(pruning.pruning, models, tmp_path, windows=24, methods=methods, **chosen)
    whole, *pruned, memory = found["points"]
    assert [p["model"] for p in (whole, memory)] == ["base", "memory"] and page.count("<img") == 1
    counts = {beta: flops.parameters(lab.run(name))["active"] for beta, name in ((0, "memory"), (3, "flex-3"))}
    assert pruned[0]["active"] == pytest.approx(counts[3], abs=8)
    assert pruned[-1]["active"] == counts[0] + 2 * 32 and memory["active"] == counts[0]  # norms that memory lacks stay
    assert [p["pattern"] for p in pruned if ":" in p["pattern"]] == ["2:4"]
    with pytest.raises(ArgumentError, match=r"expected one base among the models.*found 0"):
        pruning.pruning(Models([lab.workdir("memory")]), None, **chosen)
    with pytest.raises(ArgumentError, match="methods: expected some of magnitude, wanda, sparsegpt, found none"):
        pruning.pruning(models, None, methods=("none",), **chosen)
