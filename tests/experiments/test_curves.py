"""Comparisons of architectures: runs read from their folders and drawn, and the command that trains them."""

import copy
import json
import os
import subprocess
import sys
import types

import pytest
from lab import CONTEXT, with_devices

from memoryllm_jax import compare
from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.fields import flatten
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


def test_a_missing_matplotlib_ends_the_command_before_it_trains(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises ImportError
    given = {"config": types.SimpleNamespace(config_filename="configs/tiny.py")}
    monkeypatch.setattr(compare, "flags", types.SimpleNamespace(FLAGS=given))
    with pytest.raises(UserError, match=r"pictures: needs matplotlib: pip install 'memoryllm_jax\[analyze\]'"):
        compare.main(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_trains_with_its_overrides(lab, tmp_path):
    sizes = {"steps": 2, "batch_size": 8, "seq_len": 32, "model.dim": 16, "model.layers": 1, "model.heads": 2}
    sizes |= {"optimizer.warmup_steps": 1}
    sizes |= {"data.path": lab.data_path, "eval.batches": 1, "sample.tokens": 0}
    options = [f"--config.{field}={value}" for field, value in sizes.items()] + ["--noconfig.log.tensorboard"]
    command = [sys.executable, "-m", "memoryllm_jax.compare", f"--workdir={tmp_path}", "--config=configs/tiny.py"]
    command += ["--architectures=value-0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=with_devices(1))
    assert done.returncode == 0, done.stderr
    found = flatten(config_of(str(tmp_path / "value-0")))
    assert {field: found[field] for field in sizes} == sizes and not found["log.tensorboard"]
    assert json.load(open(tmp_path / "comparison.json"))["results"]["value-0"]["finished"]
