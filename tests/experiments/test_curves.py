"""Comparisons of architectures: runs read from their folders and drawn."""

import copy
import json
import os

import pytest
from lab import CONTEXT

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments import curves
from memoryllm_jax.model import flops

NAMES = ["base", "memory"]


def test_a_run_is_read_from_its_folder(lab, tmp_path):
    for name in NAMES:
        found, run = curves.run_of(lab.workdir(name)), lab.run(name)
        end = found["curve"][-1]
        assert found["finished"] and end["step"] == 16 and end["tokens"] == 16 * 8 * CONTEXT
        assert end["loss"] == json.load(open(f"{lab.workdir(name)}/result.json"))["validation"]["loss"]
        everywhere = flops.train_flops(run, end["tokens"], end["tokens"])  # FFN-M computed at every position
        if name == "base":
            assert end["flops"] == pytest.approx(everywhere)
        else:
            assert end["flops"] < everywhere
    assert curves.run_of(str(tmp_path / "none")) is None


def test_runs_are_drawn_if_their_recipes_agree(lab, tmp_path):
    for name in NAMES:
        os.symlink(lab.workdir(name), tmp_path / name)
    curves.compare("tiny.py", [*NAMES, "flex-9"], str(tmp_path))
    page, lines = (tmp_path / "comparison.html").read_text(), (tmp_path / "comparison-curves.csv").read_text()
    assert page.count("<img") == 4 and "<th>not finished</th><td>flex-9</td>" in page
    runs = {name: curves.run_of(lab.workdir(name)) for name in NAMES}
    assert lines.count("\n") == 1 + sum(len(run["curve"]) for run in runs.values())
    other = copy.deepcopy(runs["memory"])
    other["recipe"]["steps"] = 2
    with pytest.raises(UserError, match="memory: steps: expected 16 as in base, found 2"):
        curves.common_recipe(runs | {"memory": other})
    with pytest.raises(UserError, match="expected runs of flex-9, found none"):
        curves.compare("tiny.py", ["flex-9"], str(tmp_path))
