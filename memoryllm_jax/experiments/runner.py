"""Trains the runs of a protocol, several side by side, and scores them.

    WORKDIR/data/VOCABULARY     prepared data
    WORKDIR/runs/KEY            the workdir of a run, with run.json (which run it is), log.txt (what `train` printed),
                                what `train` writes, and heldout.npz (scoring.py)

A run is done when it is scored; then its checkpoint is removed. What is done follows from the files alone, so a runner
can be killed at any time, and the next one goes on.
"""

import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from memoryllm_jax.checkpoint import description
from memoryllm_jax.common import provenance, storage
from memoryllm_jax.common.child import Children
from memoryllm_jax.common.errors import ArgumentError, UserError, one_line
from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.common.fields import did_you_mean
from memoryllm_jax.common.progress import Progress, duration
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.verification import Verification
from memoryllm_jax.experiments import rates, scoring
from memoryllm_jax.experiments.protocol import Protocol, Run, Setting

DESCRIPTION, RESULT, DIVERGED = "run.json", "result.json", "diverged.json"
_ALIKE = 3  # runs of several variants that fail in a row for the same reason, after which no other is started


def data_path(workdir: str, vocabulary: str) -> str:
    """The folder of the prepared data of a vocabulary."""
    return os.path.join(workdir, "data", vocabulary)


def prepare(protocol: Protocol, workdir: str, texts: str, vocabularies: Collection[str]) -> None:
    """Prepares the data of the vocabularies, as far as it is not there.

    Args:
      texts: folder with train-* and validation-* files; "": the data must be there.
    Raises: UserError.
    """
    if storage.is_url(workdir):
        raise ArgumentError("workdir", f"expected a folder on a disk, found {workdir}")
    for vocabulary in vocabularies:
        path = data_path(workdir, vocabulary)
        if storage.exists(os.path.join(path, "dataset.json")):
            continue
        if not texts:
            raise ArgumentError("texts", f"expected a folder of texts, as {path} is not prepared yet, found none")
        train, validation = os.path.join(texts, "train-*"), os.path.join(texts, "validation-*")
        print(f"preparing {path}", flush=True)
        shards.prepare(train, protocol.vocabularies[vocabulary], path, validation_pattern=validation)


def check_same_data(workdir: str, vocabularies: Collection[str]) -> None:
    """Checks that the runs in the workdir were trained on its data.

    Raises: UserError that names a run of other data.
    """
    digests = {vocabulary: Dataset(data_path(workdir, vocabulary)).digest for vocabulary in vocabularies}
    for path in sorted(glob.glob(os.path.join(glob.escape(workdir), "runs", "*", DESCRIPTION))):
        of_run = json.loads(storage.read_bytes(path, "the description of a run"))
        expected = digests.get(of_run["vocabulary"], of_run["data"])
        if of_run["data"] != expected:
            raise UserError(
                f"{path}: data: expected {expected[:12]} as in {data_path(workdir, of_run['vocabulary'])}, found "
                f"{of_run['data'][:12]}: the run was trained on other data; use another --workdir"
            )


class Selection:
    """The part of a protocol that is run: all of it, or what --only names.

    Args:
      only: names of experiments, variants, sizes and vocabularies. Of each kind of which one is named, only the named
        ones are selected.
    Raises: ArgumentError for an unknown name.
    """

    def __init__(self, protocol: Protocol, only: Collection[str] = ()):
        kinds = {
            "experiments": [experiment.name for experiment in protocol.experiments],
            "variants": [variant.name for variant in protocol.variants],
            "sizes": list(protocol.sizes),
            "vocabularies": list(protocol.vocabularies),
        }
        known = [name for names in kinds.values() for name in names]
        for name in only:
            if name not in known:
                raise ArgumentError("only", f"expected names of the protocol, found {name}{did_you_mean(name, known)}")
        self._chosen = {kind: [name for name in names if name in only] or names for kind, names in kinds.items()}
        self.protocol = protocol
        settings = self.settings()
        if not settings:
            raise ArgumentError("only", f"expected names that share runs, found {', '.join(only)}")
        for setting in settings:  # a config that is not valid is refused before any run
            protocol.sweep_run(setting, protocol.sweep.rates[0])

    @property
    def experiments(self) -> list[str]:
        return self._chosen["experiments"]

    @property
    def vocabularies(self) -> list[str]:
        return list(dict.fromkeys(setting.vocabulary for setting in self.settings()))

    def settings(self, experiment: str = "") -> list[Setting]:
        """The selected settings of an experiment; "": of all that are selected."""
        found = self.protocol.settings([experiment] if experiment else self.experiments)
        return [setting for setting in found if self._takes(setting)]

    def swept(self, experiment: str = "") -> list[Setting]:
        """The settings whose sweeps these need."""
        return list(dict.fromkeys(map(self.protocol.swept, self.settings(experiment))))

    def takes(self, run: Run) -> bool:
        """Whether a run of an experiment is selected."""
        return self._takes(run.setting) and not set(self.experiments).isdisjoint(run.experiments)

    def _takes(self, setting: Setting) -> bool:
        return (
            setting.variant in self._chosen["variants"]
            and setting.size in self._chosen["sizes"]
            and setting.vocabulary in self._chosen["vocabularies"]
        )


def can_be_scored(run: Run, workdir: str) -> bool:
    """Whether the run's last step is done and its checkpoint is there."""
    folder = run.folder(workdir)
    return storage.exists(os.path.join(folder, RESULT)) and bool(description.steps(folder))


def has_diverged(run: Run, workdir: str) -> bool:
    """Whether the run ended because its loss was not finite."""
    return storage.exists(os.path.join(run.folder(workdir), DIVERGED))


def loss(run: Run, workdir: str) -> float | None:
    """The loss of the run's last validation in nats a token; infinite if it diverged, None if it is not trained yet."""
    if has_diverged(run, workdir):
        return math.inf
    path = os.path.join(run.folder(workdir), RESULT)
    if not storage.exists(path):
        return None
    return json.loads(storage.read_bytes(path, "the result of a run"))["validation"]["loss"]


def sweep_choice(protocol: Protocol, workdir: str, setting: Setting) -> rates.Choice:
    """What the sweep of a setting says so far."""
    found: dict[float, float] = {}
    while True:
        choice = rates.choose(protocol.sweep, found)
        losses = {rate: loss(protocol.sweep_run(setting, rate), workdir) for rate in choice.missing}
        new = {rate: value for rate, value in losses.items() if value is not None}
        if not new:
            return choice
        found |= new


def chosen_rates(protocol: Protocol, workdir: str, settings: Iterable[Setting] | None = None) -> dict[Setting, float]:
    """The peak rates that are chosen already.

    Args:
      settings: swept settings; None: those of all experiments.
    """
    if settings is None:
        settings = dict.fromkeys(protocol.swept(setting) for setting in protocol.settings())
    choices = {setting: sweep_choice(protocol, workdir, setting).rate for setting in settings}
    return {setting: rate for setting, rate in choices.items() if rate is not None}


def finished(protocol: Protocol, workdir: str) -> list[Run]:
    """The runs of the experiments that are scored, in the protocol's order. `run.folder(workdir)` has their files."""
    runs = protocol.experiment_runs(chosen_rates(protocol, workdir))
    return [run for run in runs if scoring.is_scored(run.folder(workdir))]


class _Work(NamedTuple):
    """The selected runs by their state.

    Attributes:
      to_do: what can be trained or scored now, in this order.
      waiting: runs whose rate is not chosen yet, with the middle rate of the sweep in its place.
      without_rate: settings for which no rate can be chosen.
    """

    to_do: list[Run]
    waiting: list[Run]
    done: list[Run]
    failed: list[Run]
    without_rate: list[Setting]

    @property
    def left(self) -> list[Run]:
        return [*self.to_do, *self.waiting]


@dataclasses.dataclass
class _Job:
    """A process that trains or scores a run."""

    run: Run
    scores: bool
    begin: float


class Runner:
    """Trains and scores the selected runs.

    Args:
      jobs: number of processes at a time.
      cost: estimates the work of a run in FLOPs, for the time left.
    """

    def __init__(self, selection: Selection, workdir: str, jobs: int, cost: Callable[[Run], float]):
        self._cost = lambda runs: int(sum(map(cost, runs)))
        self._selection, self._protocol = selection, selection.protocol
        self._workdir, self._places = storage.absolute(workdir), jobs
        self._failed: dict[str, str] = {}  # {key of a run: why}
        self._failures: list[tuple[str, str]] = []  # (variant, why) since a run last ended well
        # One thread of XLA's CPU backend for each process: the order of sums then does not depend on --jobs or cores.
        self._environment = {"NPROC": "1", **os.environ}
        self._digest = functools.cache(lambda vocabulary: Dataset(data_path(self._workdir, vocabulary)).digest)

    def run(self) -> int:
        """Returns: the exit code: 0 if all selected runs are done, 1 if some failed, that of a stop after a signal."""
        with contextlib.closing(storage.lock_folder(self._workdir)) as lock, Children() as children:
            work = self._work()
            progress = Progress("compare", 0, "FLOPs", self._cost(work.done), every_s=60)
            running: dict[subprocess.Popen, _Job] = {}
            while not children.stopped:
                done = self._cost(work.done)
                progress.total = done + self._cost(work.left)  # a sweep that is extended adds to it
                progress.update(done)
                busy = [job.run.key for job in running.values()]
                ready = [run for run in work.to_do if run.key not in busy and run.key not in self._failed]
                if self._is_hopeless():
                    ready = []
                if not ready and not running:
                    break
                if ready and len(running) < self._places:
                    job = _Job(ready[0], can_be_scored(ready[0], self._workdir), time.monotonic())
                    with self._named_failure(job.run):
                        running[self._start(children, job, lock)] = job
                    continue
                process, code = children.wait()
                job = running.pop(process)
                text = ""
                with self._named_failure(job.run):
                    text = self._end(job, code)
                work = self._work()
                if text:
                    progress.line(f"{len(work.done)} of {len(work.done) + len(work.left)} runs  {text}")
            stopped = children.stopped
            progress.close()
        return self._close(self._work(), stopped)

    @contextlib.contextmanager
    def _named_failure(self, run: Run) -> Iterator[None]:
        """Turns an error of this process, such as a full disk, into a failure of the run."""
        try:
            yield
        except (UserError, OSError) as error:
            self._fail(run, one_line(error))

    def _fail(self, run: Run, reason: str, where: str = "") -> None:
        self._failed[run.key] = f"{reason}{where}"
        self._failures.append((run.variant, reason))

    def _is_hopeless(self) -> bool:
        """Whether the next runs would fail as the last ones did, such as on a full disk."""
        alike = [variant for variant, reason in self._failures if reason == self._failures[-1][1]]
        return len(alike) >= _ALIKE and len(set(alike)) > 1

    def _close(self, work: _Work, stopped: bool) -> int:
        if stopped:
            print(f"stopped with {len(work.left)} runs left; run the same line again to go on", flush=True)
            return ExitCode.STOPPED
        unstarted = {run.setting for run in work.to_do if not run.experiments}
        for setting in work.without_rate:
            if setting not in unstarted:
                print(f"{setting}: has no rate, as all diverged or a run of its sweep failed", file=sys.stderr)
        for run in work.failed:
            print(f"failed: {run}: {self._failed[run.key]}", file=sys.stderr)
        if self._is_hopeless():
            print(f"no more runs were started, as several failed alike; {len(work.left)} are left", file=sys.stderr)
        return ExitCode.ERROR if work.failed or work.without_rate else ExitCode.DONE

    def _work(self) -> _Work:
        """Reads from the files what is done. Removes checkpoints that nothing needs any more."""
        choices = {setting: sweep_choice(self._protocol, self._workdir, setting) for setting in self._selection.swept()}
        chosen = {setting: choice.rate for setting, choice in choices.items() if choice.rate is not None}
        of_experiments = self._protocol.experiment_runs(chosen)
        needed = {run.key for run in of_experiments}  # also by experiments that are not selected
        to_do, done, failed = [], [], []
        for run in self._runs(choices, of_experiments):
            if run.key in self._failed:
                failed.append(run)
            elif not run.experiments:
                is_done = loss(run, self._workdir) is not None
                if is_done and not choices[run.setting].missing and run.key not in needed:
                    _remove_checkpoints(run, self._workdir)
                (done if is_done else to_do).append(run)
            elif scoring.is_scored(run.folder(self._workdir)):
                if not set(run.experiments) & set(self._protocol.keep):
                    _remove_checkpoints(run, self._workdir)
                done.append(run)
            elif has_diverged(run, self._workdir):
                self._failed[run.key] = "its loss is not finite"
                failed.append(run)
            else:
                to_do.append(run)
        without_rate = [setting for setting, choice in choices.items() if choice.rate is None]
        known = {run.key for run in (*to_do, *done, *failed)}
        waiting = [run for run in self._waiting(choices) if run.key not in known]
        return _Work(to_do, waiting, done, failed, without_rate)

    def _waiting(self, choices: Mapping[Setting, rates.Choice]) -> Iterable[Run]:
        """The selected runs whose rate is not chosen yet, with the middle rate of the sweep in its place."""
        row = self._protocol.sweep.rates
        expected = {setting: row[len(row) // 2] for setting, choice in choices.items() if choice.missing}
        return filter(self._selection.takes, self._protocol.experiment_runs(expected))

    def _runs(self, choices: Mapping[Setting, rates.Choice], of_experiments: list[Run]) -> Iterable[Run]:
        """The selected runs, each once: experiment by experiment, the sweeps that it needs first.

        Args:
          of_experiments: all runs of experiments that are known so far.
        """
        of_experiments = [run for run in of_experiments if self._selection.takes(run)]
        found = {}
        for name in self._selection.experiments:
            for setting in self._selection.swept(name):
                for rate in (*choices[setting].losses, *choices[setting].missing):
                    run = self._protocol.sweep_run(setting, rate)
                    found.setdefault(run.key, run)
            found |= {run.key: run for run in of_experiments if name in run.experiments}
        return found.values()

    def _start(self, children: Children, job: _Job, lock) -> subprocess.Popen:
        run, folder = job.run, job.run.folder(self._workdir)
        os.makedirs(folder, exist_ok=True)
        if job.scores:
            command = score_command(run, self._workdir)
        else:
            command = train_command(self._protocol, run, self._workdir)
            about = _description(self._protocol, run, command, self._workdir) | {"data": self._digest(run.vocabulary)}
            storage.write_json(os.path.join(folder, DESCRIPTION), about)
            # All runs of a vocabulary read the same data, which only the first of them needs to verify.
            Verification(folder).remember_from([self._workdir])
        with open(os.path.join(folder, "log.txt"), "ab") as log:
            # The lock stays until the last child has ended, even if this process is killed.
            return children.start(command, stdout=log, stderr=log, pass_fds=(lock.fileno(),), env=self._environment)

    def _end(self, job: _Job, code: int) -> str:
        """Notes how a process ended. Returns: a line about it, or "" if there is nothing to tell."""
        run, folder = job.run, job.run.folder(self._workdir)
        took = duration(time.monotonic() - job.begin)
        if not job.scores:
            Verification(self._workdir).remember_from([folder])
        if code == ExitCode.DONE:
            self._failures.clear()
            return "" if job.scores else f"{run}: {loss(run, self._workdir):.4f} nats a token in {took}"
        if code == ExitCode.STOPPED:
            return ""  # saved; goes on where it was
        if code == ExitCode.DIVERGED and not job.scores:
            storage.write_json(os.path.join(folder, DIVERGED), {"seconds": time.monotonic() - job.begin})
            return f"{run}: diverged after {took}"
        self._fail(run, f"exit code {code}: {_last_line(folder)}", f" ({folder}/log.txt)")
        return f"{run}: failed: {self._failed[run.key]}"


def train_command(protocol: Protocol, run: Run, workdir: str) -> list[str]:
    """The command line that trains a run."""
    given = {**run.fields, "data.path": data_path(workdir, run.vocabulary)}
    return [
        sys.executable,
        "-m",
        "memoryllm_jax.train",
        f"--config={protocol.config}:{run.architecture}",
        f"--workdir={run.folder(workdir)}",
        *(f"--config.{name}={value}" for name, value in given.items()),
    ]


def score_command(run: Run, workdir: str) -> list[str]:
    """The command line that scores a run."""
    return [sys.executable, "-m", "memoryllm_jax.experiments.scoring", run.folder(workdir)]


def _description(protocol: Protocol, run: Run, command: list[str], workdir: str) -> dict:
    """The contents of run.json."""
    return {
        **dataclasses.asdict(run.setting),
        "tokens": run.tokens,
        "seed": run.seed,
        "rate": run.rate,
        "architecture": run.architecture,
        "tokenizer": protocol.vocabularies[run.vocabulary],
        "fields": dict(run.fields),
        # A description is part of a record, which names no path of this machine.
        "command": [part.replace(workdir, "DIR") for part in command[1:]],
        "commit": provenance.commit(),
        "versions": provenance.versions() | {"Python": platform.python_version()},
        "cores": os.cpu_count(),
    }


def _last_line(folder: str) -> str:
    """What a process that failed wrote last into a run's log: its error if it named one."""
    with open(os.path.join(folder, "log.txt"), "rb") as file:
        file.seek(max(0, os.path.getsize(file.name) - 10_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    # JAX prints a note below an exception.
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["it printed nothing"])[-1]


def _remove_checkpoints(run: Run, workdir: str) -> None:
    folder = run.folder(workdir)
    for step in description.steps(folder):
        shutil.rmtree(os.path.join(folder, str(step)), ignore_errors=True)
