"""Comparisons of architectures: what runs leave, and the command that trains and draws them."""

import json
import os
import subprocess
import sys

import pytest
from lab import CONTEXT, with_devices

from memoryllm_jax.checkpoint import trained
from memoryllm_jax.config import flatten
from memoryllm_jax.experiments import curves
from memoryllm_jax.model import flops


def test_comparison_reads_what_runs_leave(lab, tmp_path):
    names = ["base", "memory"]
    runs = {name: curves.run_of(lab.workdir(name)) for name in names}
    for name in names:
        end, run = runs[name]["curve"][-1], lab.run(name)
        assert runs[name]["finished"] and end["step"] == 16 and end["tokens"] == 16 * 8 * CONTEXT
        assert end["loss"] == json.load(open(f"{lab.workdir(name)}/result.json"))["validation"]["loss"]
        plain = flops.train_flops(run, end["tokens"], end["tokens"])
        assert end["flops"] == pytest.approx(plain) if name == "base" else end["flops"] < plain
    curves.draw(runs, str(tmp_path), {})
    page, lines = (tmp_path / "comparison.html").read_text(), (tmp_path / "comparison-curves.csv").read_text()
    assert page.count("<img") == 4 and lines.count("\n") == 1 + sum(len(run["curve"]) for run in runs.values())
    assert curves.run_of(str(tmp_path / "none")) is None


@pytest.mark.slow
def test_the_comparison_trains_what_its_options_say(lab, tmp_path):
    sizes = {"steps": 2, "batch_size": 8, "seq_len": 32, "model.dim": 16, "model.layers": 1, "model.heads": 2}
    sizes |= {"data.path": lab.data_path, "eval.batches": 1, "sample.tokens": 0}
    options = [f"--config.{field}={value}" for field, value in sizes.items()] + ["--noconfig.log.tensorboard"]

    def command(*arguments):
        line = [sys.executable, "-m", "memoryllm_jax.compare", f"--workdir={tmp_path}", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=240, env=with_devices(1))

    done = command("--config=configs/tiny.py", "--architectures=value-0", *options)
    assert done.returncode == 0, done.stderr
    found = flatten(trained.config_of(str(tmp_path / "value-0")))
    assert {field: found[field] for field in sizes} == sizes and not found["log.tensorboard"]
    assert json.load(open(tmp_path / "comparison.json"))["results"]["value-0"]["finished"]
    os.symlink(lab.workdir("memory"), tmp_path / "memory")
    refused = command("--config=configs/tiny.py", "--architectures=value-0,memory", "--report")
    assert refused.returncode == 1 and "memory: steps: expected 2 as in value-0, found 16" in refused.stderr
