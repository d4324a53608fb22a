"""Whole runs in this process: resuming, stopping, meshes, and what ends a run early.

Runs of four steps share their compiled steps: the number of steps is a constant in them, by the learning rate.
"""

import dataclasses
import gzip
import itertools
import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax._src import compilation_cache
from lab import read_all, records

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common import config_files, hosts, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.config import StartConfig, resolve
from memoryllm_jax.data import document_starts, shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import flops, sharding
from memoryllm_jax.training import loop, metrics
from memoryllm_jax.training.recorder import Recorder
from memoryllm_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("shared_trainers")


def run(config, workdir, devices=1):
    return loop.train(config, str(workdir), jax.devices()[:devices])


def final_state(config, workdir):
    """The newest checkpoint's arrays, on the host."""
    config = loop.complete(config, Dataset(config.data.path))
    trainer = loop.Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    checkpoints = store.Checkpoints(str(workdir), keep=10)
    state = checkpoints.restore(checkpoints.latest(), trainer.state_shape)
    checkpoints.close()
    return jax.tree.map(np.asarray, state)


def saved_steps(workdir):
    """Steps of complete checkpoints: a folder that is still being written is not named by its step alone."""
    return sorted(int(path.name) for path in workdir.iterdir() if path.name.isdigit())


def losses(workdir):
    return [record["loss"] for record in records(workdir)]


def stop_after(monkeypatch, step):
    """Acts as if SIGTERM came during this step of a new run."""
    calls = itertools.count()  # `agreed` is called before the first step and after each
    monkeypatch.setattr(hosts.StopSignal, "agreed", lambda self: next(calls) >= step)


def test_resumed_is_bitwise_uninterrupted(make_config, data_path, swapped, tmp_path, monkeypatch):
    fields = {"checkpoint.every": 2, "accumulate": 2, "log.norms_every": 2}
    config = make_config("flex-3", **fields, **{"data.path": f"{data_path}:3,{swapped}:1"})
    assert run(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run(config, tmp_path / "parts") == ExitCode.STOPPED
    assert saved_steps(tmp_path / "parts") == [2, 3]
    # A run that was killed leaves records past its checkpoint; they are dropped, not doubled.
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "kind": "train", "loss": 0.0}) + '\n{"step": 5, "ki')
    with monkeypatch.context() as patch:
        # The workdir remembers that the data is verified: only the tokenizer's file is read, which shows no progress.
        sha256 = storage.sha256
        patch.setattr(storage, "sha256", lambda path: sha256(path))
        assert run(config, tmp_path / "parts") == 0
    whole, parts = (final_state(config, tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert whole["step"] == 4
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [record["step"] for record in records(tmp_path / "parts")] == [1, 2, 3, 4]
    norms = records(tmp_path / "parts", "norms")
    assert norms == records(tmp_path / "whole", "norms") and [record["step"] for record in norms] == [2, 4]
    *stopped, gone_on, _, _ = records(tmp_path / "parts", "goodput")
    assert (stopped[-1]["step"], gone_on["step"]) == (3, 3)
    assert gone_on["seconds"] == stopped[-1]["seconds"] | gone_on["seconds"]


def test_a_branch_ends_where_the_run_that_decays_there_ends(make_config, tmp_path):
    """A run that trains on at a constant rate keeps the checkpoint from which another one decays."""
    kept = {"checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 2}
    run(make_config("memory", **{"optimizer.schedule": "constant"}, **kept), tmp_path / "stable")
    assert saved_steps(tmp_path / "stable") == [2, 4]
    c = config_files.load(f"configs/start.py:decay@{tmp_path}/stable")
    c.optimizer.decay_share, c.start.step = 0.5, 2
    config = resolve(c)
    assert config.steps == 4
    run(config, tmp_path / "branch")
    straight = dataclasses.replace(config, start=StartConfig())
    run(straight, tmp_path / "straight")
    branch, whole = (final_state(straight, tmp_path / name) for name in ("branch", "straight"))
    jax.tree.map(np.testing.assert_array_equal, branch, whole)
    assert losses(tmp_path / "branch") == losses(tmp_path / "straight")[2:]
    assert losses(tmp_path / "stable")[-1] != losses(tmp_path / "branch")[-1]  # the decay does something


def test_a_run_that_is_complete_is_evaluated_once_more_and_recorded_once(make_config, tmp_path):
    config = make_config("memory")
    for _ in range(2):
        assert run(config, tmp_path) == 0
        (validation,) = records(tmp_path, "validation")
        assert json.loads((tmp_path / "result.json").read_text())["validation"]["loss"] == validation["loss"]
    assert len(records(tmp_path)) == 4


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(make_config, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hosts.StopSignal, "now", lambda self: True)
    assert run(make_config("memory"), tmp_path / "run") == ExitCode.STOPPED
    assert not (tmp_path / "run").exists()  # not even with a record of verified data, whose reading the signal ended
    assert "stopped by a signal after step 0; nothing to save yet; run the same line to go on" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, mesh",
    [
        ("memory", (1, 8, 1)),
        ("ple-3", (2, 2, 2)),
        ("bigram-3", (2, 2, 2)),
    ],
)
def test_eight_devices_train_as_one(make_config, tmp_path, monkeypatch, architecture, mesh):
    """ple-3 attends inside documents, of about 20 tokens: the most frequent id takes the part of bos."""
    # See compile_cache._EMULATED_DEVICES: an earlier session of the tests may have filled the cache.
    monkeypatch.setattr(compilation_cache, "get_executable_and_time", lambda *_, **__: (None, None))
    names = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh))
    fields = {"model.vocab_size": 512, "data.document_mask": architecture == "ple-3"}
    config = make_config(architecture, **fields)
    frequent = int(np.bincount(read_all(Dataset(config.data.path))).argmax())
    monkeypatch.setattr(document_starts, "first_id", lambda *_: frequent)
    run(config, tmp_path / "one")
    run(make_config(architecture, **fields, **names), tmp_path / "eight", devices=8)
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert one[0] != pytest.approx(one[-1], rel=1e-2)  # it trained
    np.testing.assert_allclose(eight, one, rtol=2e-5)
    for record in records(tmp_path / "eight"):
        share = record.get("attention_share", 1)
        assert (share < 1) == config.data.document_mask
        assert record["model_flops_per_second_plain"] / record["tokens_per_second"] == pytest.approx(
            flops.train_flops(config, 1, 1, share)
        )


def test_resuming_on_four_devices_what_eight_saved(make_config, tmp_path, monkeypatch):
    config = make_config("flex-3")
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run(make_config("flex-3", **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), tmp_path / "parts", devices=8)
    run(config, tmp_path / "parts", devices=4)
    whole, parts = (final_state(config, tmp_path / name)["params"] for name in ("whole", "parts"))
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole)):
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


def test_other_config_data_or_tokenizer_is_refused_with_the_fields(make_config, data_path, swapped, tmp_path, corpus):
    """And a mixture with other weights, where its folders may lie elsewhere."""
    run(make_config("memory", **{"data.path": f"{data_path}:0.7,{swapped}:0.3"}), tmp_path / "w")
    with pytest.raises(UserError) as error:
        run(make_config("flex-1", seed=3), tmp_path / "w")
    assert "seed: 0 in the checkpoint, 3 in this run" in str(error.value)
    assert "model.beta: 0.0 in the checkpoint, 1.0 in this run" in str(error.value)

    shards.prepare(corpus, "sentencepiece:train:500", str(tmp_path / "other"), validation_fraction=0.05)
    with pytest.raises(UserError, match=r"model.vocab_size: 512 .* 500 .*tokenizer: .*data: "):
        run(make_config("memory", **{"data.path": str(tmp_path / "other")}), tmp_path / "w")
    message = "of another run: weights of the data: '7/10, 3/10' in the checkpoint, '1/2, 1/2' in this run; use"
    with pytest.raises(UserError, match=message):
        run(make_config("memory", **{"data.path": f"{data_path}:1,{swapped}:1"}), tmp_path / "w")
    # Fields that decide where and how fast a run trains may change.
    moved = {"data.path": f"{data_path}:7,{swapped.rename(tmp_path / 'moved')}:3"}
    assert run(make_config("memory", **{"model.remat": "full", "mesh.fsdp": 2} | moved), tmp_path / "w", 2) == 0
    (validation,) = records(tmp_path / "w", "validation")
    assert list(validation["sources"]) == ["prepared", "moved"]
    assert json.loads((tmp_path / "w" / "result.json").read_text())["validation"]["sources"] == validation["sources"]


def test_a_save_that_fails_in_the_background_ends_the_run(make_config, tmp_path, monkeypatch):
    """The error of a full disk."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full)
    with pytest.raises(UserError) as error:
        run(make_config("memory", **{"checkpoint.every": 2}), tmp_path / "w")
    assert "saving a checkpoint failed: no space left on the device; there is no checkpoint yet" in str(error.value)
    assert saved_steps(tmp_path / "w") == []


def test_a_step_is_dispatched_before_the_metrics_of_the_step_before_are_read(make_config, tmp_path, monkeypatch):
    order, seen = [], []
    make, get = loop.Trainer, jax.device_get

    def watched(*args):
        trainer = make(*args)
        step = trainer.train

        def train_step(state, batch):
            state, values = step(state, batch)
            order.append(f"train {len(seen)}")
            seen.append(values)
            return state, values

        trainer.train = train_step
        return trainer

    def device_get(values):
        order.extend(f"read {number}" for number, known in enumerate(seen) if known is values)
        return get(values)

    monkeypatch.setattr(loop, "Trainer", watched)
    monkeypatch.setattr(jax, "device_get", device_get)
    run(make_config("memory"), tmp_path / "w")
    assert order == ["train 0", "train 1", "read 0", "train 2", "read 1", "train 3", "read 2", "read 3"]


def test_steps_are_compiled_before_the_clock_starts(make_config, tmp_path, monkeypatch):
    """Those of training and of validation, each once."""
    order = []

    def note(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            order.extend(name for name in ("_train", "_evaluate") if name in fun_name)

    monkeypatch.setattr(loop, "Trainer", Trainer)  # one that shares nothing
    steps = Recorder.steps
    monkeypatch.setattr(Recorder, "steps", lambda *args: order.append("start") or steps(*args))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        run(make_config("memory", **{"eval.every": 2, "checkpoint.every": 2}), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert sorted(order[:2]) == ["_evaluate", "_train"] and order[2:] == ["start"]


def test_records_of_a_run(make_config, tmp_path):
    """Which steps are recorded, and what rows, tokens and epochs count."""
    config = make_config("memory", **{"log.every": 3, "log.peak_flops": 1e9})
    run(config, tmp_path)
    third, last = records(tmp_path)
    assert (third["step"], last["step"]) == (3, 4)  # the last step is always recorded
    assert last["tokens"] == 4 * 8 * 32 and third["epoch"] == pytest.approx(last["epoch"] * 3 / 4)
    assert 0 < last["rows"] <= 8 * 32 and last["rows"] % 8 == 0  # distinct ids, padded
    assert 0 < last["mfu"] < last["mfu_plain"]  # fewer rows than tokens were evaluated


def test_what_a_signal_cut_off_is_made_again_and_nothing_else(make_config, tmp_path, monkeypatch, capfd):
    """Validation, samples and tasks after step 2. The vocabulary is larger than the data's."""
    workdir = tmp_path / "w"
    during = {"sample.tokens": 30, "sample.every": 2, "eval.tasks": "some", "eval.tasks_every": 2, "eval.every": 2}
    config = make_config("memory", **{"model.vocab_size": 640, "data.verify": False}, **during)
    asked = []

    class Tasks:
        def check(self, model, limit):
            asked.append("check")

        def all_scores(self, model, limit, stopped):
            asked.append("scores")
            return None if asked.count("scores") == 1 else {"some": {"acc": 0.5, "n": 2}}

    def run_with_tasks():
        return loop.train(config, str(workdir), jax.devices()[:1], open_tasks=lambda chosen: Tasks())

    def recorded():
        kinds = ("validation", "sample", "tasks")
        return [[record["step"] for record in records(workdir, kind)] for kind in kinds]

    with monkeypatch.context() as patch:
        calls = []
        # `agreed` is called before the first step, after each step, and before each batch of the first validation.
        patch.setattr(hosts.StopSignal, "agreed", lambda self: calls.append(0) or len(calls) == 5)
        assert run_with_tasks() == ExitCode.STOPPED
    assert saved_steps(workdir) == [2] and recorded() == [[], [], []]
    assert run_with_tasks() == ExitCode.STOPPED and recorded() == [[2], [2], []]
    assert run_with_tasks() == 0 and recorded() == [[2, 4]] * 3
    assert asked == ["check", "check", "scores", "check", "scores", "scores"]
    output = capfd.readouterr().out
    for step, sample in zip((2, 4), records(workdir, "sample"), strict=True):
        assert output.count(f"step {step}: sample at temperature 0.8:\n{sample['text']}\n") == 1
    assert "step 4: tasks\n  some: acc 0.5000 (2 examples)" in output
    assert json.loads((workdir / "result.json").read_text())["tasks"] == {"some": {"acc": 0.5, "n": 2}}
    kinds = {type(record) for record in metrics.records(str(workdir / "metrics.jsonl"))}
    assert kinds == {metrics.TrainRecord, metrics.ValidationRecord}
    assert run_with_tasks() == 0 and recorded() == [[2, 4]] * 3 and len(asked) == 6  # all is there
    with pytest.raises(UserError, match=r"config.eval.tasks: expected none, as nothing here opens tasks, found some"):
        run(config, workdir)
    with pytest.raises(UserError, match=r"config.model.vocab_size: expected at least the 512 ids of .* found 500"):
        run(make_config("memory", steps=1, **{"model.vocab_size": 500}), tmp_path / "other")


def test_profile_leaves_a_trace_of_the_steps_asked_for(make_config, tmp_path, capfd):
    assert loop.train(make_config("memory", steps=8), str(tmp_path / "w"), jax.devices()[:1], profile=2) == 0
    (trace,) = (tmp_path / "w" / "profile").rglob("perfetto_trace.json.gz")
    events = json.load(gzip.open(trace))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})}
    assert steps == {"5", "6"} and "profile from step 6 on in" in capfd.readouterr().out


def test_a_failed_start_leaves_no_workdir(make_config, tmp_path):
    with pytest.raises(UserError, match=r"config.model.vocab_size: expected at least"):
        run(make_config("memory", **{"model.vocab_size": 500}), tmp_path / "w")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("again", [False, True])
def test_a_workdir_that_is_removed_ends_the_run(make_config, tmp_path, monkeypatch, again):
    """Also where a folder of this name is there again, as saving a checkpoint would make one.

    A save in the background, which then fails too, does not hide this error.
    """

    def fail(self):
        close(self)
        raise FileNotFoundError("state.orbax-checkpoint-tmp")

    close = ocp.CheckpointManager.close
    monkeypatch.setattr(ocp.CheckpointManager, "close", fail)

    def remove(self):
        if next(calls) != 1:
            return  # not after the first step
        shutil.rmtree(tmp_path / "w")
        if again:
            os.mkdir(tmp_path / "w")

    calls = itertools.count()
    monkeypatch.setattr(hosts.StopSignal, "agreed", remove)
    with pytest.raises(UserError, match=f"^{tmp_path}/w: was removed while the run was using it$"):
        run(make_config("memory", **{"log.every": 1000, "checkpoint.every": 1}), tmp_path / "w")
    assert not list(tmp_path.rglob("*/*"))


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(make_config, tmp_path):
    """Damage in the optimizer's state, which no reader of parameters would see."""
    config = make_config("memory", **{"checkpoint.every": 2})
    assert run(config, tmp_path) == 0
    path = tmp_path / "4/description/metadata"
    tree = json.loads(path.read_text())
    tree["digests"]["opt_state/1/0/nu/embedding"] = "0" * 16
    del tree["checksum"]
    path.write_text(json.dumps(tree))
    message = (
        rf"^{tmp_path}/4: array opt_state/1/0/nu/embedding is damaged: .*; the newest good checkpoint is {tmp_path}/2: "
        rf"to use it, move away {tmp_path}/4$"
    )
    with pytest.raises(UserError, match=message):
        run(config, tmp_path)


def test_unwritable_workdir(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        run(make_config(), tmp_path / "file" / "w")
