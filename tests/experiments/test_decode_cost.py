"""Memory and time of decode steps, live and with looked-up rows."""

import pytest
from lab import run_experiment

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.experiments import decode_cost
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.inference.rows import LiveRows


def test_sides_are_measured_in_turns(lab, tmp_path):
    models = Models([lab.workdir("base"), lab.workdir("memory")])
    chosen = {"data": lab.data_path, "steps": 4, "rounds": 2, "cache": "64KiB"}
    found, page = run_experiment(decode_cost.decode_cost, models, tmp_path, **chosen)
    base, live, disk = found["sides"]
    with lab.model("memory") as model:
        row = 3 * 32 * 4
        assert isinstance(model.rows, LiveRows) and model.rows.weights_bytes > 512 * 32 * 4
        assert live["decoder, MB"] == disk["decoder, MB"] == model.decoder.weights_bytes / 1e6
        assert live["FFN-M and embedding, MB"] == model.rows.weights_bytes / 1e6
    assert disk["FFN-M and embedding, MB"] == 0 and 0 < disk["rows, MB"] <= 65536 / 1e6 + row
    assert base["time over the first side's"] == 1 and min(side["ms a token"] for side in found["sides"]) > 0
    assert [len(seconds) for seconds in found["seconds"].values()] == [2, 2, 2] and page.count("<img") == 1
    with pytest.raises(ArgumentError, match="places: expected some of device, host, disk, found tape"):
        decode_cost.decode_cost(models, None, data=lab.data_path, places=("tape",))
