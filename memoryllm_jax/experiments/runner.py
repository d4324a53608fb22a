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
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator

from memoryllm_jax.checkpoint import description
from memoryllm_jax.common import provenance, storage
from memoryllm_jax.common.child import Children
from memoryllm_jax.common.errors import ArgumentError, UserError, one_line
from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.common.progress import Progress, duration
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.verification import Verification
from memoryllm_jax.experiments import outcomes
from memoryllm_jax.experiments.protocol import Protocol, Run
from memoryllm_jax.experiments.work import Selection, Work, read_work

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
    for path in sorted(glob.glob(os.path.join(glob.escape(workdir), "runs", "*", outcomes.DESCRIPTION))):
        of_run = json.loads(storage.read_bytes(path, "the description of a run"))
        expected = digests.get(of_run["vocabulary"], of_run["data"])
        if of_run["data"] != expected:
            raise UserError(
                f"{path}: data: expected {expected[:12]} as in {data_path(workdir, of_run['vocabulary'])}, found "
                f"{of_run['data'][:12]}: the run was trained on other data; use another --workdir"
            )


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
            work = self._read_work()
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
                    job = _Job(ready[0], outcomes.can_be_scored(ready[0], self._workdir), time.monotonic())
                    with self._named_failure(job.run):
                        running[self._start(children, job, lock)] = job
                    continue
                process, code = children.wait()
                job = running.pop(process)
                text = ""
                with self._named_failure(job.run):
                    text = self._end(job, code)
                work = self._read_work()
                if text:
                    progress.line(f"{len(work.done)} of {len(work.done) + len(work.left)} runs  {text}")
            stopped = children.stopped
            progress.close()
        return self._close(self._read_work(), stopped)

    def _read_work(self) -> Work:
        """What is done and left. Removes checkpoints that nothing needs any more."""
        found = read_work(self._selection, self._workdir, self._failed)
        for run in found.unneeded:
            _remove_checkpoints(run, self._workdir)
        for run in found.failed:
            self._failed.setdefault(run.key, "its loss is not finite")
        return found

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

    def _close(self, work: Work, stopped: bool) -> int:
        if stopped:
            print(f"stopped with {len(work.left)} runs left; run the same line again to go on", flush=True)
            return ExitCode.STOPPED
        for setting in work.without_rate:
            print(f"{setting}: has no rate, as all diverged or a run of its sweep failed", file=sys.stderr)
        for run in work.failed:
            print(f"failed: {run}: {self._failed[run.key]}", file=sys.stderr)
        if self._is_hopeless():
            print(f"no more runs were started, as several failed alike; {len(work.left)} are left", file=sys.stderr)
        return ExitCode.ERROR if work.failed or work.without_rate else ExitCode.DONE

    def _start(self, children: Children, job: _Job, lock) -> subprocess.Popen:
        run, folder = job.run, job.run.folder(self._workdir)
        os.makedirs(folder, exist_ok=True)
        if job.scores:
            command = score_command(run, self._workdir)
        else:
            command = train_command(self._protocol, run, self._workdir)
            about = _description(self._protocol, run, command, self._workdir) | {"data": self._digest(run.vocabulary)}
            storage.write_json(os.path.join(folder, outcomes.DESCRIPTION), about)
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
            return "" if job.scores else f"{run}: {outcomes.loss(run, self._workdir):.4f} nats a token in {took}"
        if code == ExitCode.STOPPED:
            return ""  # saved; goes on where it was
        if code == ExitCode.DIVERGED and not job.scores:
            storage.write_json(os.path.join(folder, outcomes.DIVERGED), {"seconds": time.monotonic() - job.begin})
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
