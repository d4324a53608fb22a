"""The runner of a protocol: what it trains and scores, in which order, and what it goes on with after a failure."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lab import CONTEXT, with_devices

from memoryllm_jax.common.child import Children
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import outcomes, runner, scoring
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.plan import Plan
from memoryllm_jax.experiments.protocol import Experiment, Protocol, Setting, Sweep, Variant
from memoryllm_jax.experiments.work import Selection, read_work
from memoryllm_jax.model.flops import train_flops

PROTOCOL = Protocol(
    config="configs/tiny.py",
    fields={"batch_size": 2, "seq_len": 16},
    sizes={"S": {"model.dim": 64}},
    vocabularies={"512": "sentencepiece:train:512"},
    variants=(Variant("base"), Variant("memory"), Variant("wide", "memory", {"model.ffn_dim": 256}, "memory")),
    sweep=Sweep({"512": 640}, (0.001, 0.002, 0.004), {"S": "S"}, most=4),
    experiments=(
        Experiment("first", ("base",), ("S",), ("512",), (640, 1280)),
        Experiment("second", ("memory", "wide"), ("S",), ("512",), (1280,)),
        Experiment("third", ("base", "memory"), ("S",), ("512",), (640,)),
    ),
    keep=("second",),
)
BASE, MEMORY = Setting("base", "S", "512"), Setting("memory", "S", "512")


def train(folder, rate, code) -> int:
    """Writes the files of a finished run unless the code is an error. The loss is the distance of the rate to 0.002."""
    if code == "0":
        os.makedirs(f"{folder}/40")
        loss = abs(math.log(float(rate) / 0.002))
        Path(folder, "result.json").write_text(json.dumps({"validation": {"loss": loss}}))
    return int(code)


def score(folder) -> int:
    Path(folder, "heldout.npz").touch()
    return 0


class Processes:
    """Takes the place of `Children`: a command does its work when it is waited for, the last one first."""

    stopped = False

    def __init__(self):
        self.running = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert not self.running

    def start(self, command, stdout, **_):
        assert command[1] not in [folder for _, folder, *_ in self.running]
        stdout.write(b"error: no space\n")
        self.running.append(tuple(command))
        return self.running[-1]

    def wait(self):
        name, *arguments = process = self.running.pop()
        return process, {"train": train, "score": score}[name](*arguments)


class Stubs:
    """Takes the place of the processes, and notes which run they are for."""

    def __init__(self, monkeypatch, workdir, only=(), jobs=1):
        self.started: list[tuple[str, str, int, float]] = []
        self.codes: dict[str, int] = {}  # {variant: exit code of its trainings}
        self.workdir, self.only, self.jobs = str(workdir), only, jobs
        monkeypatch.setattr(runner, "Children", Processes)
        monkeypatch.setattr(runner, "train_command", self.train)
        monkeypatch.setattr(runner, "score_command", self.score)
        monkeypatch.setattr(runner, "Dataset", lambda path: SimpleNamespace(digest=path))

    def train(self, protocol, run, workdir):
        self.started.append(("train", run.variant, run.tokens, run.rate))
        return ["train", run.folder(workdir), str(run.rate), str(self.codes.get(run.variant, 0))]

    def score(self, run, workdir):
        self.started.append(("score", run.variant, run.tokens, run.rate))
        return ["score", run.folder(workdir)]

    def run(self) -> int:
        self.started.clear()
        selection = Selection(PROTOCOL, self.only)
        return runner.Runner(selection, self.workdir, self.jobs, lambda run: run.tokens).run()


def test_sweeps_come_first_and_what_is_done_stays_done(monkeypatch, tmp_path):
    stubs = Stubs(monkeypatch, tmp_path, ["first", "second"])
    assert stubs.run() == 0
    sweep = (0.001, 0.002, 0.004)
    assert stubs.started == [
        *(("train", "base", 640, rate) for rate in sweep),
        ("score", "base", 640, 0.002),  # the sweep trained it
        ("train", "base", 1280, 0.002),
        ("score", "base", 1280, 0.002),
        *(("train", "memory", 640, rate) for rate in sweep),
        ("train", "memory", 1280, 0.002),
        ("score", "memory", 1280, 0.002),
        ("train", "wide", 1280, 0.002),
        ("score", "wide", 1280, 0.002),
    ]
    finished = outcomes.finished(PROTOCOL, str(tmp_path))
    assert [(run.variant, run.tokens) for run in finished] == [
        ("base", 640),
        ("base", 1280),
        ("memory", 1280),
        ("wide", 1280),
    ]
    kept = {run.key for run in finished if run.variant != "base"}
    kept.add(PROTOCOL.sweep_run(MEMORY, 0.002).key)  # which the third experiment will need
    assert {path.parent.name for path in tmp_path.glob("runs/*/40")} == kept
    assert stubs.run() == 0 and stubs.started == []
    stubs.only = []
    assert stubs.run() == 0 and stubs.started == [("score", "memory", 640, 0.002)]


def test_two_at_a_time_make_what_one_by_one_makes(monkeypatch, tmp_path):
    started = []
    for jobs in (1, 2):
        stubs = Stubs(monkeypatch, tmp_path / str(jobs), jobs=jobs)
        assert stubs.run() == 0
        started.append(stubs.started)
    one, two = started
    assert one != two and sorted(one) == sorted(two)  # and no run is two processes at once, as `Processes` checks


def test_a_run_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capfd):
    stubs = Stubs(monkeypatch, tmp_path, ["second", "first"])
    stubs.codes = {"base": 1}
    assert stubs.run() == 1
    assert [run.variant for run in outcomes.finished(PROTOCOL, str(tmp_path))] == ["memory", "wide"]
    assert len(stubs.started) == 3 + 3 + 2 * 2
    error = capfd.readouterr().err
    assert "base S 512: has no rate, as all diverged or a run of its sweep failed\n" in error
    assert "rate 0.001, seed 0: exit code 1: error: no space (" in error and "log.txt)" in error
    stubs.codes = {"base": 1, "memory": 1}
    for folder in tmp_path.glob("runs/*"):
        shutil.rmtree(folder)
    assert stubs.run() == 1 and len(stubs.started) == 4  # as on a full disk
    assert "no more runs were started, as several failed alike; " in (error := capfd.readouterr().err)
    assert (
        "base S 512: has no rate" in error and "memory S 512: has no rate" not in error
    )  # whose sweep may still go well
    stubs.codes = {}
    blocked = Path(PROTOCOL.sweep_run(BASE, 0.004).folder(str(tmp_path)))
    blocked.rename(tmp_path / "elsewhere")
    blocked.touch()  # an error of the runner itself, as a full disk would be
    assert stubs.run() == 1 and "rate 0.004, seed 0: [Errno 17] File exists" in capfd.readouterr().err
    blocked.unlink()
    assert stubs.run() == 0 and {variant for _, variant, *_ in stubs.started} == {"base"}


def test_a_rate_that_diverges_is_a_result(monkeypatch, tmp_path):
    stubs = Stubs(monkeypatch, tmp_path, ["first"])
    stubs.codes = {"base": 72}
    assert stubs.run() == 1 and len(stubs.started) == PROTOCOL.sweep.most
    assert outcomes.sweep_choice(PROTOCOL, str(tmp_path), BASE).losses.keys() == {0.0005, 0.001, 0.002, 0.004}
    assert stubs.run() == 1 and not stubs.started  # it would diverge again


def test_a_signal_stops_the_runs_and_the_next_start_goes_on(monkeypatch, tmp_path, capfd):
    """With real processes."""
    stubs = Stubs(monkeypatch, tmp_path, ["first"])

    def sleep(*run):
        stubs.train(*run)
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        return [sys.executable, "-S", "-c", "import time; time.sleep(60)"]

    with monkeypatch.context() as patch:
        patch.setattr(runner, "Children", Children)
        patch.setattr(runner, "train_command", sleep)
        assert stubs.run() == 143 and len(stubs.started) == 1
    assert "stopped with 4 runs left" in capfd.readouterr().out
    assert stubs.run() == 0 and len(stubs.started) == 6


def test_the_plan_counts_runs_and_the_flops_of_those_that_are_left(lab, tmp_path):
    (tmp_path / "data").mkdir()
    os.symlink(lab.data_path, tmp_path / "data/512")
    selection = Selection(PROTOCOL, ["second", "third", "memory"])
    plan = Plan(selection, str(tmp_path))
    run = PROTOCOL.sweep_run(MEMORY, 0.002)
    ids = Dataset(lab.data_path).train.read(0, 16 * 32).reshape(16, 32)
    rows = np.mean([len(set(batch)) for batch in ids.tolist()])
    model = dataclasses.replace(run.config.model, vocab_size=512)
    flops = 20 * train_flops(dataclasses.replace(run.config, model=model), 32, rows)
    assert plan.cost(run) == pytest.approx(flops)

    def table(jobs=2) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """{part: (runs, left)}, and the lines behind the table."""
        lines = plan.text(read_work(selection, str(tmp_path)), jobs, speed=1e3).splitlines()
        parts = {line.split()[0]: tuple(map(int, line.split()[3:5])) for line in lines[1:] if " S 512  " in line}
        return parts, lines[1 + len(parts) :]

    def hours(runs: int, jobs=2) -> str:
        return f"{runs * flops / 1e3 / jobs / 3600:.1f} hours for {jobs} processes of 1e-06 GFLOP/s each"

    parts, (last,) = table()  # three of 640 tokens and one of 1,280
    assert parts == {"sweep": (3, 3), "second": (1, 1)} and last.startswith(hours(5))
    train(run.folder(str(tmp_path)), "0.002", "0")
    parts, (last,) = table(jobs=1)
    assert parts == {"sweep": (3, 2), "second": (1, 1)} and last.startswith(hours(4, jobs=1))
    for rate in (0.001, 0.004):
        train(PROTOCOL.sweep_run(MEMORY, rate).folder(str(tmp_path)), str(rate), "0")
    parts, (last,) = table()  # the third has the best run of the sweep, and only scores it
    assert parts == {"sweep": (2, 0), "second": (1, 1), "third": (1, 0)} and last.startswith(hours(2))
    longer = PROTOCOL.run(MEMORY, 1280, 0, 0.002)
    os.makedirs(longer.folder(str(tmp_path)))
    Path(longer.folder(str(tmp_path)), outcomes.DIVERGED).write_text("{}")
    parts, (diverged, last) = table()
    assert diverged == f"has diverged: {longer}" and last.startswith(hours(0)) and parts["second"] == (1, 0)


def test_the_plan_names_what_has_no_rate(lab, tmp_path):
    (tmp_path / "data").mkdir()
    os.symlink(lab.data_path, tmp_path / "data/512")
    selection = Selection(PROTOCOL, ["first"])
    for rate in (0.0005, 0.001, 0.002, 0.004):
        folder = Path(PROTOCOL.sweep_run(BASE, rate).folder(str(tmp_path)))
        assert "no rate" not in Plan(selection, str(tmp_path)).text(read_work(selection, str(tmp_path)), 1, 1e3)
        folder.mkdir(parents=True)
        (folder / outcomes.DIVERGED).write_text("{}")
    text = Plan(selection, str(tmp_path)).text(read_work(selection, str(tmp_path)), 1, 1e3)
    assert "\nhas no rate, as all diverged: base S 512\n0.0 hours" in text


def test_only_selects_and_names_what_it_does_not_know():
    def settings(*only):
        return [str(setting) for setting in Selection(PROTOCOL, only).settings()]

    assert settings() == ["base S 512", "memory S 512", "wide S 512"]
    assert settings("third", "512") == ["base S 512", "memory S 512"] and settings("wide") == ["wide S 512"]
    with pytest.raises(UserError, match="only: expected names of the protocol, found widde; did you mean wide"):
        settings("widde")
    with pytest.raises(UserError, match="only: expected names that share runs, found first, wide"):
        settings("first", "wide")


@pytest.mark.slow
def test_the_command_trains_and_scores(lab, tmp_path):
    texts = """
from memoryllm_jax.experiments.protocol import *
FIELDS = {"batch_size": 2, "seq_len": %d, "model.layers": 1, "model.heads": 2, "log.tensorboard": False}
FIELDS |= {"eval.batches": 1, "sample.tokens": 0}
def get_protocol():
    return Protocol(config="configs/tiny.py", fields=FIELDS, sizes={"S": {"model.dim": 16}}, vocabularies={"512": ""},
        variants=(Variant("value-0"),), sweep=Sweep({"512": 64}, (0.001, 0.002, 0.004), {"S": "S"}),
        experiments=(Experiment("one", ("value-0",), ("S",), ("512",), (64,)),))
"""
    (tmp_path / "protocol.py").write_text(texts % CONTEXT)
    (tmp_path / "data").mkdir()
    os.symlink(lab.data_path, tmp_path / "data/512")
    command = [sys.executable, "-m", "memoryllm_jax.compare", f"--protocol={tmp_path}/protocol.py"]
    command.append(f"--workdir={tmp_path}")
    # Of the sweep only the best rate is left to be trained.
    protocol = protocol_lib.load(f"{tmp_path}/protocol.py")
    for rate in (0.001, 0.004):
        folder = Path(protocol.sweep_run(protocol.settings()[0], rate).folder(str(tmp_path)))
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"validation": {"loss": 99.0}}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=with_devices(1))
    assert done.returncode == 0, done.stderr + done.stdout
    (run,) = outcomes.finished(protocol, str(tmp_path))
    folder = Path(run.folder(str(tmp_path)))
    assert run.rate == 0.002 and scoring.is_scored(str(folder)) and not [*folder.glob("[0-9]*")]
    described = json.loads((folder / "run.json").read_text())
    assert described["data"] == Dataset(lab.data_path).digest and described["versions"]["jax"]
    (folder / "run.json").write_text(json.dumps(described | {"data": "0" * 64}))
    with pytest.raises(UserError, match=r"run\.json: data: expected .*, found 0{12}: the run was trained on"):
        runner.check_same_data(str(tmp_path), ["512"])
    assert described["tokens"] == 64 and described["command"][:2] == ["-m", "memoryllm_jax.train"]
    assert f"--workdir=DIR/runs/{run.key}" in described["command"]
