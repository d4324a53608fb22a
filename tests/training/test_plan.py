"""A run planned for devices that are not here: what it holds, and what to change where it does not fit."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import pytest
from lab import with_devices

from memoryllm_jax.training import chips, plan


def plan_on(tmp_path, devices):
    """What `train --dry_run` says of a small model on so many emulated devices."""
    small = {"model.dim": 128, "model.layers": 2, "model.heads": 8, "model.vocab_size": 1000, "seq_len": 64}
    small |= {"batch_size": devices, "mesh.data": 2, "mesh.tensor": 2, "mesh.fsdp": -1, "model.dtype": "float32"}
    command = [sys.executable, "-m", "memoryllm_jax.train", "--config=configs/tiny.py:flex-3", "--dry_run"]
    command += [f"--config.{name}={value}" for name, value in small.items()]
    command += [f"--devices={devices}", "--chip=h100", f"--plan={tmp_path}/{devices}.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=with_devices(1))
    assert done.returncode == 0, done.stderr
    with open(tmp_path / f"{devices}.json") as file:
        return json.load(file)


@pytest.mark.slow
def test_plan_places_state_and_activations_on_8_16_and_64_devices(tmp_path):
    plans = {n: plan_on(tmp_path, n) for n in (8, 16, 64)}
    D, L, V = 128, 2, 1000
    C, M = 128, 216  # FFN-C and FFN-M of width 344
    for n, p in plans.items():
        assert p["mesh"] == {"data": 2, "fsdp": n // 4, "tensor": 2}
        matrices = L * (4 * D * D + 3 * D * (C + M)) + 2 * V * D
        norms = L * 3 * D + D
        held = 4 * (matrices // (n // 4) // 2 + norms)
        assert p["memory"]["parameters"] == held  # by what the executable gives back
        assert p["memory"]["optimizer"] == 2 * held + 8  # moments, and two counts
        assert p["parameters"]["total"] == matrices + norms
    # Two sequences a shard everywhere: activations do not grow, and traffic only by (g - 1) / g.
    held = [p["memory"]["activations"] for p in plans.values()]
    assert max(held) < 1.2 * min(held)
    sent = [p["collective_bytes"] for p in plans.values()]
    assert sent[0] < sent[1] < sent[2] < 1.9 * sent[0]


def test_plan_says_what_to_change(make_config, monkeypatch):
    big = {"model.vocab_size": 1000, "model.layers": 1, "batch_size": 64, "mesh.data": 2, "data.path": "embedded"}

    def planned(memory, **more):
        monkeypatch.setitem(chips.CHIPS, "h100", dataclasses.replace(chips.get("h100"), memory=memory))
        return plan.plan(make_config("memory", **big, **more), "h100", jax.devices()[:4])

    p = planned(1e9)
    assert p["fits"] and p["memory"]["largest_sequences_a_device"] > 16 and "DOES NOT FIT" not in plan.text(p)
    room = p["memory"]["fixed"] + 10 * p["memory"]["each_sequence"]
    p = planned(room)
    assert not p["fits"] and p["memory"]["largest_sequences_a_device"] == 10 and "DOES NOT FIT" in plan.text(p)
    accumulate, size = re.match(r"--config.accumulate=(\d+): ([\d.]+) GB a device", p["advice"][0]).groups()
    assert accumulate in ("2", "4", "8", "16") and float(size) <= room / 1e9 + 0.005
