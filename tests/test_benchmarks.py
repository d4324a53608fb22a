"""The GPU benchmark, run on a CPU at a small size: training, decoding and the ToL build."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab import with_devices

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_speed_runs_whole(tmp_path):
    shape = {"dim": 32, "layers": 1, "heads": 2, "seq_len": 64, "batch_size": 2, "vocab_size": 600, "loss_chunk": 64}
    command = [sys.executable, BENCHMARKS / "speed.py", "--platform=cpu", "--rounds=1", "--decode", "--capacity=128"]
    command += [f"--{name}={value}" for name, value in shape.items()]
    command += ["--sides=base,memory/accumulate=2", f"--output={tmp_path}/speed.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=with_devices(1))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["results"]["memory/accumulate=2"]["speed_over"]["base"]["predicted"] > 1
    assert record["tol_build"]["bytes"] > 600 * 32 * 4 and len(record["decode"]["results"]) == 5
    table = [sys.executable, BENCHMARKS / "speed.py", f"--table={tmp_path}/speed.json"]
    printed = subprocess.run(table, capture_output=True, text=True, check=True).stdout
    assert "| memory/accumulate=2 |" in printed and "ToL build: 0.0 GB" in printed
