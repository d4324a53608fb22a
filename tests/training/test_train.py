"""Whole runs: resuming, stopping, meshes, and what ends a run early."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from lab import free_port, with_devices

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common import hosts
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import load, resolve
from memoryllm_jax.data import dataset, shards
from memoryllm_jax.model import flops, sharding
from memoryllm_jax.training import loop
from memoryllm_jax.training.batches import TrainBatches, place
from memoryllm_jax.training.step import Trainer


def run(config, workdir, devices=1):
    return loop.train(config, str(workdir), jax.devices()[:devices])


def final_state(config, workdir, devices=1):
    """The newest checkpoint's arrays, on the host."""
    config = loop.complete(config, dataset.Dataset(config.data.path))
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
    checkpoints = store.Checkpoints(str(workdir), keep=10)
    state = checkpoints.restore(checkpoints.latest(), trainer.state_shape)
    checkpoints.close()
    return jax.tree.map(np.asarray, state)


def records(workdir, kind="train"):
    with open(f"{workdir}/metrics.jsonl") as file:
        return [r for r in map(json.loads, file) if r["kind"] == kind]


def stop_after(monkeypatch, step):
    """As if SIGTERM came during this step."""
    monkeypatch.setattr(loop.StopSignal, "requested", lambda self, done: done is not None and done >= step)


def test_resumed_is_bitwise_uninterrupted(make_config, tmp_path, monkeypatch):
    config = make_config("flex-3", steps=6, **{"checkpoint.every": 2, "accumulate": 2})
    assert run(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run(config, tmp_path / "parts") == hosts.STOPPED
    assert sorted(p.name for p in (tmp_path / "parts").glob("[0-9]*")) == ["2", "3"]
    # A run that was killed leaves records past its checkpoint; they are dropped, not doubled.
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "kind": "train", "loss": 0.0}) + '\n{"step": 5, "ki')
    assert run(config, tmp_path / "parts") == 0
    whole, parts = (final_state(config, tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert whole["step"] == 6
    losses = [[(r["step"], r["loss"]) for r in records(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]
    for name in ("whole", "parts"):
        result = json.load(open(tmp_path / name / "result.json"))
        assert result["validation"]["loss"] == records(tmp_path / "whole", "validation")[-1]["loss"]
    # The same line once more: nothing left to train, and no record twice.
    assert run(config, tmp_path / "parts") == 0
    assert len(records(tmp_path / "parts", "validation")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, mesh", [("memory", (1, 8, 1)), ("flex-3", (2, 2, 2)), ("base", (2, 2, 2)), ("ple-3", (2, 2, 2))]
)
def test_eight_devices_train_as_one(make_config, tmp_path, architecture, mesh):
    names = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh))
    run(make_config(architecture), tmp_path / "one")
    run(make_config(architecture, **names), tmp_path / "eight", devices=8)
    one, eight = ([r["loss"] for r in records(tmp_path / name)] for name in ("one", "eight"))
    assert one[0] != pytest.approx(one[-1], rel=1e-2)  # it trained
    np.testing.assert_allclose(eight, one, rtol=2e-5)


def test_resuming_on_four_devices_what_eight_saved(make_config, tmp_path, monkeypatch):
    config = make_config("flex-3", steps=4)
    run(config, tmp_path / "whole", devices=8)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run(config, tmp_path / "parts", devices=8)
    run(config, tmp_path / "parts", devices=4)
    whole, parts = (final_state(config, tmp_path / name)["params"] for name in ("whole", "parts"))
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole)):
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


def test_parameters_moments_and_rows_lie_as_the_table_says(make_config):
    """On data 2 x fsdp 2 x tensor 2: placement of the state, and of the step's output."""
    config = make_config("flex-3", **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    config = loop.complete(config, dataset.Dataset(config.data.path))
    trainer = Trainer(config, sharding.make_mesh(config.mesh))
    state = trainer.init(jax.random.key(0))
    P = jax.sharding.PartitionSpec
    expected = {
        ("embedding",): P("tensor", "fsdp"),
        ("layers", "attention", "q"): P(None, "fsdp", "tensor", None),
        ("layers", "ffn", "down"): P(None, "tensor", "fsdp"),
        ("memory", "ffn", "gate"): P(None, "fsdp", "tensor"),
        ("memory", "norm", "scale"): P(),
    }
    adam = state["opt_state"][1][0]
    for path, spec in expected.items():
        for tree in (state["params"], adam.mu, adam.nu):
            leaf = tree
            for key in path:
                leaf = leaf[key]
            named = jax.sharding.NamedSharding(trainer.mesh, spec)
            assert leaf.sharding.is_equivalent_to(named, leaf.ndim), path
    batches = TrainBatches(config, dataset.Dataset(config.data.path), 4, range(4))
    batch = place(batches[0], batches.sizes()[-1], trainer.batch_sharding)
    assert {s.data.shape[0] for s in batch.index_SAN.addressable_shards} == {1}
    before = jax.tree.map(lambda x: x.sharding, state)
    after, _ = trainer.train(state, batch)
    jax.tree.map(lambda x, s: None if x.sharding == s else pytest.fail(f"{x.sharding} is not {s}"), after, before)
    assert all(x.is_deleted() for x in jax.tree.leaves(state["params"]))  # donated


def test_other_config_data_or_tokenizer_is_refused_with_the_fields(make_config, tmp_path, corpus):
    run(make_config("memory", steps=1), tmp_path / "w")
    with pytest.raises(UserError) as error:
        run(make_config("flex-1", steps=1, seed=3), tmp_path / "w")
    assert "seed: 0 in the checkpoint, 3 in this run" in str(error.value)
    assert "model.beta: 0.0 in the checkpoint, 1.0 in this run" in str(error.value)

    shards.prepare(corpus, "sentencepiece:train:500", str(tmp_path / "other"), validation_fraction=0.05)
    with pytest.raises(UserError, match=r"model.vocab_size: 512 .* 500 .*tokenizer: .*data: "):
        run(make_config("memory", steps=1, **{"data.path": str(tmp_path / "other")}), tmp_path / "w")
    # Where and how fast may change.
    assert run(make_config("memory", steps=1, **{"model.remat": "full", "mesh.fsdp": 2}), tmp_path / "w", 2) == 0


def test_non_finite_loss_names_step_data_and_checkpoint(make_config, tmp_path, monkeypatch):
    config = make_config("memory", steps=8, **{"checkpoint.every": 2})
    compiled = Trainer.__init__

    def poisoned(self, *args):
        compiled(self, *args)
        step = self.train

        def train_step(state, batch):
            state, values = step(state, batch)
            bad = jax.device_get(state["step"]) == 4
            return state, values | {"loss": values["loss"] * (np.nan if bad else 1)}

        self.train = train_step

    monkeypatch.setattr(Trainer, "__init__", poisoned)
    with pytest.raises(UserError) as error:
        run(config, tmp_path / "w")
    message = str(error.value)
    assert message.startswith("step 4: the loss is nan") and "sequences 24 to 31 of the shuffled data" in message
    assert message.endswith(f"the last good checkpoint is {tmp_path}/w/2")
    assert not (tmp_path / "w" / "4").exists()


def test_kept_checkpoints_and_a_failing_save(make_config, tmp_path, monkeypatch):
    config = make_config("memory", steps=7, **{"checkpoint.every": 1, "checkpoint.keep": 2, "checkpoint.keep_every": 3})
    run(config, tmp_path / "w")
    assert sorted(p.name for p in (tmp_path / "w").glob("[0-9]*")) == ["3", "6", "7"]

    # A background write that fails, as on a full disk, ends the run; what was saved before stays.
    import orbax.checkpoint as ocp

    handler = ocp.JsonCheckpointHandler
    monkeypatch.setattr(handler, "_save_fn", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError) as error:
        run(make_config("memory", steps=2), tmp_path / "full")
    assert "saving a checkpoint failed: no space left on the device; there is no checkpoint yet" in str(error.value)
    assert not [p for p in (tmp_path / "full").iterdir() if p.name.isdigit()]


def test_sigterm_saves_and_one_workdir_takes_one_run(data_path, tmp_path):
    """The command itself: a second run is refused, SIGTERM saves and exits with 143, the same line goes on."""
    command = [
        sys.executable,
        "-m",
        "memoryllm_jax.train",
        "--config=configs/tiny.py:memory",
        f"--workdir={tmp_path}/w",
    ]
    small = {"steps": 3000, "seq_len": 32, "batch_size": 2, "log.every": 1, "eval.every": 10_000, "eval.batches": 1}
    small |= {"model.dim": 16, "model.layers": 1, "model.heads": 2, "data.path": data_path, "data.epochs": 9}
    command += [f"--config.{name}={value}" for name, value in small.items()]
    env = with_devices(1)
    log = open(tmp_path / "log", "w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    deadline = time.time() + 120
    while "step 5/" not in open(tmp_path / "log").read():
        assert process.poll() is None and time.time() < deadline, open(tmp_path / "log").read()
        time.sleep(0.1)
    second = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert second.returncode == 1 and f"in use by another run (process {process.pid}" in second.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == hosts.STOPPED
    text = open(tmp_path / "log").read()
    steps = [int(p.name) for p in (tmp_path / "w").glob("[0-9]*")]
    assert f"stopped by a signal after step {max(steps)}" in text and "Traceback" not in text
    assert records(tmp_path / "w")[-1]["step"] == max(steps)


def test_step_is_dispatched_before_the_last_ones_metrics_are_read(make_config, tmp_path, monkeypatch):
    order = []
    compiled, get = Trainer.__init__, jax.device_get

    def watched(self, *args):
        compiled(self, *args)
        step = self.train

        def train_step(state, batch):
            state, values = step(state, batch)
            order.append(f"train {len([o for o in order if o.startswith('train')])}")
            self.seen = [*getattr(self, "seen", []), values]
            return state, values

        def device_get(values):
            if isinstance(values, dict):
                order.append(f"read {next(i for i, v in enumerate(self.seen) if v is values)}")
            return get(values)

        self.train = train_step
        monkeypatch.setattr(jax, "device_get", device_get)

    monkeypatch.setattr(Trainer, "__init__", watched)
    run(make_config("memory", steps=4), tmp_path / "w")
    assert order == ["train 0", "train 1", "read 0", "train 2", "read 1", "train 3", "read 2", "read 3"]


@pytest.mark.slow
def test_two_processes_train_as_one_and_sigterm_to_one_saves_both(data_path, tmp_path):
    port = free_port()
    small = {"steps": 120, "seq_len": 32, "batch_size": 4, "log.every": 1, "eval.every": 1000, "eval.batches": 1}
    small |= {"model.dim": 16, "model.layers": 1, "model.heads": 2, "data.path": data_path, "data.epochs": 9}
    small |= {"checkpoint.every": 1000, "sample.tokens": 3}
    command = [sys.executable, "-m", "memoryllm_jax.train", "--config=configs/tiny.py:memory"]
    command += [f"--config.{name}={value}" for name, value in small.items()]
    two = ["--multihost", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]

    def start(name, devices, *more):
        log = open(tmp_path / f"log{name}{more[-1:]}", "w")
        env = with_devices(devices)
        return subprocess.Popen([*command, f"--workdir={tmp_path}/{name}", *more], stdout=log, stderr=log, env=env)

    alone = start("alone", 2)
    processes = [start("both", 1, *two, f"--process_id={i}") for i in range(2)]
    deadline = time.time() + 150
    while not os.path.exists(tmp_path / "both" / "metrics.jsonl") or len(records(tmp_path / "both")) < 20:
        assert all(p.poll() is None for p in processes) and time.time() < deadline
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    assert [p.wait(60) for p in processes] == [hosts.STOPPED] * 2
    saved = max(int(p.name) for p in (tmp_path / "both").glob("[0-9]*"))
    assert saved == records(tmp_path / "both")[-1]["step"] < 120
    processes = [start("both", 1, *two, f"--process_id={i}") for i in range(2)]
    assert [p.wait(120) for p in (alone, *processes)] == [0, 0, 0]
    one, both = ([r["loss"] for r in records(tmp_path / name)] for name in ("alone", "both"))
    assert len(both) == 120
    np.testing.assert_allclose(both[:50], one[:50], rtol=1e-5)
    np.testing.assert_allclose(both[-1], one[-1], rtol=1e-2)


def test_four_processes_train_as_one_and_end_when_one_is_killed(data_path, tmp_path):
    """What is left ends within a minute and says why; one process goes on from what four have saved."""
    port = free_port()
    small = {"steps": 4000, "seq_len": 32, "batch_size": 4, "log.every": 1, "eval.every": 10**6, "eval.batches": 1}
    small |= {"model.dim": 16, "model.layers": 1, "model.heads": 2, "data.path": data_path, "data.epochs": 90}
    command = [sys.executable, "-m", "memoryllm_jax.train", "--config=configs/tiny.py:memory"]
    command += [f"--workdir={tmp_path}/w", "--config.checkpoint.every=20"]
    command += [f"--config.{name}={value}" for name, value in small.items()]
    logs = [open(tmp_path / f"log{i}", "w+") for i in range(4)]
    env = with_devices(1)
    several = [*command, "--multihost", f"--coordinator=127.0.0.1:{port}", "--num_processes=4"]
    processes = [
        subprocess.Popen([*several, f"--process_id={i}"], stdout=log, stderr=log, env=env) for i, log in enumerate(logs)
    ]
    deadline = time.time() + 150
    while not (tmp_path / "w" / "40").exists():
        assert all(p.poll() is None for p in processes) and time.time() < deadline, open(tmp_path / "log0").read()
        time.sleep(0.1)
    processes[2].kill()
    assert all(processes[i].wait(60) == hosts.LOST for i in (0, 1, 3))
    for i in (0, 1, 3):
        text = open(tmp_path / f"log{i}").read()
        assert f"error: process {i} of 4: another process has ended" in text and "Traceback" not in text
    several = records(tmp_path / "w")
    saved = max(int(p.name) for p in (tmp_path / "w").glob("[0-9]*[0-9]"))

    config = load("configs/tiny.py:memory")
    config.update_from_flattened_dict(small | {"checkpoint.every": saved + 5, "steps": 4000})
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, saved + 5)
        assert run(resolve(config), tmp_path / "w", devices=4) == hosts.STOPPED
        stop_after(patch, 30)
        assert run(resolve(config), tmp_path / "one") == hosts.STOPPED
    one = [r["loss"] for r in records(tmp_path / "one")]
    np.testing.assert_allclose([r["loss"] for r in several[:30]], one, rtol=1e-5)
    assert [r["step"] for r in records(tmp_path / "w")] == list(range(1, saved + 6))


def test_vocabulary_larger_than_the_data_trains_and_samples(make_config, tmp_path, capfd):
    config = make_config("memory", steps=1, **{"model.vocab_size": 640, "sample.tokens": 30})
    assert run(config, tmp_path / "w") == 0
    assert "sample at temperature" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"config.model.vocab_size: expected at least the 512 ids of .* found 500"):
        run(make_config("memory", steps=1, **{"model.vocab_size": 500}), tmp_path / "other")


def test_profile_leaves_a_trace_of_the_steps_asked_for(make_config, tmp_path, capfd):
    assert loop.train(make_config("memory", steps=8), str(tmp_path / "w"), jax.devices()[:1], profile=2) == 0
    (trace,) = (tmp_path / "w" / "profile").rglob("perfetto_trace.json.gz")
    events = json.load(gzip.open(trace))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})}
    assert steps == {"5", "6"} and "profile from step 6 on in" in capfd.readouterr().out


def test_unwritable_workdir(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        run(make_config(), tmp_path / "file" / "w")


def test_flops_formula_against_xla(make_config):
    """Matrix products dominate at this width, so XLA's own count of a forward pass agrees but for half the scores."""
    overrides = {"model.dim": 128, "model.heads": 2, "model.layers": 1, "seq_len": 512, "model.attention": "plain"}
    config = make_config(
        "flex-3", batch_size=2, **overrides, **{"model.loss_chunk": 10_000, "model.unique_tokens": False}
    )
    config = loop.complete(config, dataset.Dataset(config.data.path))
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    batches = TrainBatches(config, dataset.Dataset(config.data.path), 1, [0])
    tokens = config.batch_size * config.seq_len
    batch = place(batches[0], tokens, trainer.batch_sharding)
    counted = trainer.evaluate.lower(trainer.params_shape, batch).compile().cost_analysis()["flops"]
    scores = 2 * tokens * config.model.dim * config.seq_len  # the masked half, which XLA's plain attention computes
    formula = flops.train_flops(config, tokens, tokens) / 3 + scores
    assert counted == pytest.approx(formula, rel=0.04)
    unique = flops.train_flops(config, tokens, tokens // 4)
    plain = flops.train_flops(config, tokens, tokens)
    assert plain - unique == 3 * (tokens - tokens // 4) * 6 * config.model.dim * config.model.memory_dim


def test_exit_codes_of_processes_that_are_left(capfd, monkeypatch):
    """134 only for what JAX raises when another process is gone; a lack of memory is the run's own."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    for error in (
        jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"),
        OSError(28, "No space left on device"),
        ValueError("a bug"),
        UserError("config.steps: expected at least 1, found 0"),
    ):
        hosts.abandon(error)
    assert codes == [134, 1, 1, 1, 1]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: process 0 of 1: ")]
    assert len(lines) == 5 and "another process has ended" in lines[0] and "No space left" in lines[2]
