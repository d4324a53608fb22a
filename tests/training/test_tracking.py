"""The trackers of a run: the real trackio, and the calls that Weights & Biases gets."""

import socket
import sys
import types

import pytest
from lab import DESCRIPTION

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import LogConfig
from memoryllm_jax.training import loop, plan
from memoryllm_jax.training.metrics import Writer
from memoryllm_jax.training.tracking import open_trackers


def test_a_resumed_run_is_one_run_of_trackio_and_nothing_leaves_the_machine(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is first imported
    monkeypatch.setenv("HF_TOKEN", "hf_of_another_purpose")
    storage = pytest.importorskip("trackio.sqlite_storage", reason="needs the extra trackio").SQLiteStorage
    asked = []
    monkeypatch.setattr(socket, "create_connection", lambda address, *_, **__: asked.append(address))
    config = make_config("memory", **{"log.trackio": True})
    for folder, start, losses in (("a/run", 0, {1: 3.0, 2: 2.5}), ("b/run", 0, {1: 9.0}), ("a/run", 2, {3: 2.0})):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        writer = Writer(config, DESCRIPTION, str(tmp_path / folder), start, enabled=True)
        for step, loss in losses.items():
            writer.write(step, "train", {"loss": loss})
        writer.write(3, "sample", {"text": "def f():"})
        writer.close()
    runs = storage.get_runs("memoryllm_jax")
    assert all(name.startswith("run-") for name in runs)
    logs = [storage.get_logs("memoryllm_jax", name) for name in runs]
    found = [[(entry["step"], entry["train/loss"]) for entry in of_run if "train/loss" in entry] for of_run in logs]
    assert sorted(found) == [[(1, 3.0), (2, 2.5), (3, 2.0)], [(1, 9.0)]]
    assert logs[0][-1]["sample/text"] == "def f():"
    assert not asked


def test_weights_and_biases_gets_the_same_run_again(tmp_path, monkeypatch):
    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **more: calls.append((name, args, more))

    def init(**more):
        calls.append(("init", (), more))
        return Run()

    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=init, finish=lambda: calls.append(("finish", (), {})))
    )
    (tmp_path / "w").mkdir()
    for step in (1, 2):
        (tracker,) = open_trackers(LogConfig(wandb=True), f"{tmp_path}/w", str(tmp_path), DESCRIPTION)
        tracker.write(step, "validation", {"loss": 2.0})
        tracker.close()
    names = ["init", "define_metric", "log", "finish"] * 2
    assert [name for name, *_ in calls] == names
    first, again = (more for name, _, more in calls if name == "init")
    assert first == again and first["name"] == "w" and first["resume"] == "allow"
    assert calls[2][1] == ({"validation/loss": 2.0, "step": 1},)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_opened(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(plan.chips, "emulate", lambda count: None)
    config = make_config("memory", **{"log.trackio": True, "data.path": str(tmp_path / "missing")})
    for start in (lambda: loop.train(config, str(tmp_path / "w")), lambda: plan.dry_run(config, "h100", 1, 0, "")):
        with pytest.raises(UserError, match=r"^config.log.trackio: needs trackio: pip install 'memoryllm_jax.trackio"):
            start()
    assert not list(tmp_path.iterdir())
