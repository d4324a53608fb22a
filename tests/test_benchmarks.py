"""Benchmarks at a small size: speed.py whole on a CPU, and the table of quality_by_size.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab import with_devices

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_speed_measures_training_decoding_and_the_tol_build(tmp_path):
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


def test_settings_smaller_than_every_budget_have_none_in_the_table(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_by_size

    rows = [
        {"kind": "bits", "setting": "2 bits", "bytes": 50, "perplexity": 9.0},
        {"kind": "bits", "setting": "4 bits", "bytes": 90, "perplexity": 8.0},
        {"kind": "budget", "setting": "budget of 90", "bytes": 88, "perplexity": 7.5, "budget": 90},
    ]
    _, _, _, small, large = quality_by_size.table(rows, 7.0).splitlines()
    assert small == "| 2 bits | 50 | 9.000 |  |  |" and large == "| 4 bits | 90 | 8.000 | 7.500 | 88 |"
    assert quality_by_size.compare(rows) == {"budget_better_than": 1, "budget_not_better_than": []}
