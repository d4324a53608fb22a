"""The command `train`, as one process and as several."""

import itertools
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from lab import free_port, records, with_devices, write_untrained

from memoryllm_jax.common import config_files, hosts
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.config import resolve
from memoryllm_jax.training import loop

SMALL = {"seq_len": 32, "batch_size": 4, "log.every": 1, "eval.every": 10**6, "eval.batches": 1}
SMALL |= {"model.dim": 16, "model.layers": 1, "model.heads": 2, "data.epochs": 90}


class Command:
    """`train` with a tiny model, running in the background. Its output goes to the file `log`."""

    def __init__(self, folder, name, fields, *options, devices=1):
        arguments = [f"--config.{field}={value}" for field, value in (SMALL | fields).items()]
        line = [sys.executable, "-m", "memoryllm_jax.train", "--config=configs/tiny.py:memory", *arguments]
        line += [f"--workdir={folder}/w", *options]
        self.log = folder / f"{name}.log"
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(line, stdout=file, stderr=file, env=with_devices(devices))

    def end(self, seconds: float = 60) -> int:
        """Waits until the command ends. Returns: its exit code."""
        return self.process.wait(seconds)


def start_several(folder, count, fields, name="process"):
    """Starts the processes of one run, each with one device. Their output goes to the files NAME0.log, ..."""
    options = ["--multihost", f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    return [Command(folder, f"{name}{i}", fields, *options, f"--process_id={i}") for i in range(count)]


def wait_until(condition, *commands):
    """Waits until the condition holds. Fails if a command ends before, or after 150 seconds."""
    deadline = time.time() + 150
    while not condition():
        for command in commands:
            assert command.process.poll() is None and time.time() < deadline, command.log.read_text()
        time.sleep(0.1)


def newest_checkpoint(workdir):
    """The step of the newest complete checkpoint."""
    return max(int(path.name) for path in workdir.iterdir() if path.name.isdigit())


def train_here(folder, fields, devices):
    """Trains the model of `Command` in this process."""
    config = config_files.load("configs/tiny.py:memory")
    config.update_from_flattened_dict(SMALL | fields)
    return loop.train(resolve(config), str(folder), jax.devices()[:devices])


def test_sigterm_saves_and_one_workdir_takes_one_run(data_path, tmp_path):
    """A second run is refused; SIGTERM saves and exits with 143."""
    command = Command(tmp_path, "first", {"steps": 3000, "data.path": data_path, "checkpoint.every": 10**6})
    wait_until(lambda: "step 5/" in command.log.read_text(), command)
    with pytest.raises(UserError, match=rf"in use by another run \(process {command.process.pid}"):
        train_here(tmp_path / "w", {"data.path": data_path}, devices=1)
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == ExitCode.STOPPED
    (step,) = (int(path.name) for path in (tmp_path / "w").glob("[0-9]*"))
    text = command.log.read_text()
    assert f"stopped by a signal after step {step}" in text and "Traceback" not in text
    assert records(tmp_path / "w")[-1]["step"] == step


def test_a_start_from_another_model_leaves_the_devices_to_the_run(make_config, tmp_path):
    """Flags are parsed before the processes join and before the share of a GPU's memory is set."""
    workdir = write_untrained(make_config("memory"), str(tmp_path / "w"))
    code = """
import sys
import memoryllm_jax.train
from absl import flags
from jax._src import xla_bridge
from ml_collections import config_flags
config_flags.DEFINE_config_file("config")
flags.FLAGS(sys.argv)
memoryllm_jax.train.resolve(flags.FLAGS.config)
sys.exit(xla_bridge.backends_are_initialized())
"""
    command = [sys.executable, "-c", code, f"--config=configs/start.py:memory@{workdir}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_train_as_one(data_path, tmp_path, monkeypatch, shared_trainers):
    """One of two is killed; one process goes on and is stopped; two go on to the end.

    A signal to one of several processes stops all of them in tests/common/test_hosts.py and tests/launch/slurm.sh.
    """
    fields = {"steps": 60, "data.path": data_path, "checkpoint.every": 10, "sample.tokens": 3, "sample.every": 50}
    workdir = tmp_path / "w"
    processes = start_several(tmp_path, 2, fields, "killed")
    wait_until((workdir / "10").exists, *processes)
    processes[1].process.kill()
    assert processes[0].end() == ExitCode.LOST
    text = processes[0].log.read_text()
    assert "error: process 0 of 2: another process has ended, or cannot be reached: " in text
    assert "Traceback" not in text
    saved = newest_checkpoint(workdir)

    with monkeypatch.context() as patch:
        calls = itertools.count()  # `agreed` is called before the first step and after each
        patch.setattr(hosts.StopSignal, "agreed", lambda self: next(calls) >= 5)
        assert train_here(workdir, fields, devices=2) == ExitCode.STOPPED
    assert [record["step"] for record in records(workdir)] == list(range(1, saved + 6))

    processes = start_several(tmp_path, 2, fields, "finished")
    assert [p.end(seconds=200) for p in processes] == [0, 0]
    assert "sample at temperature" in processes[0].log.read_text()
    assert json.loads((workdir / "result.json").read_text())["steps"] == 60
    assert [record["step"] for record in records(workdir, "sample")] == [50, 60]
    without = {"sample.tokens": 0, "sample.every": 0, "checkpoint.every": 1000}
    train_here(tmp_path / "here", fields | without, devices=2)
    here, several = ([r["loss"] for r in records(folder)] for folder in (tmp_path / "here", workdir))
    assert len(several) == 60
    np.testing.assert_allclose(several[:20], here[:20], rtol=1e-5)
    np.testing.assert_allclose(several, here, rtol=1e-2)  # rounding grows from step to step
