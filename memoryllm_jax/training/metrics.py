"""Speed and MFU, and the writers of a run's records: metrics.jsonl, TensorBoard, trackers, and profiles.

`model_flops_per_second` and `mfu` use the formula of model/flops.py for the rows of token memory that were evaluated:
one for each distinct id, padding included. The `_plain` figures count a row for every position, which is the work of a
step without unique tokens. With config.data.document_mask, all of them count the pairs of attention inside documents
alone, whether or not the kernel skips the others.
"""

import contextlib
import glob
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

import jax
import msgspec

from memoryllm_jax.checkpoint.description import Description
from memoryllm_jax.common import devices, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.records import Count, Record, parse
from memoryllm_jax.config import Config
from memoryllm_jax.model.flops import train_flops
from memoryllm_jax.training import chips
from memoryllm_jax.training.goodput import GoodputRecord
from memoryllm_jax.training.tracking import Tracker, flat, open_trackers

# What a record is about: training, a validation, where the time went, norms by layer, scores on tasks, a sampled text
Kind = Literal["train", "validation", "goodput", "norms", "tasks", "sample"]
# Made again by a run that resumes at their step, even if they are there
_MADE_AGAIN = ("validation",)
_A_RECORD = "a record of an earlier run"
_SYNC_S = 60  # seconds between copies of the records to a workdir behind a URL


def peak_flops(config: Config) -> float | None:
    """Peak FLOP/s of all devices together; None if it is not known, as on a CPU."""
    of_one = config.log.peak_flops or chips.peak_flops(devices.find()[0].device_kind)
    return of_one * jax.device_count() if of_one else None


def speed(
    config: Config, peak: float | None, tokens: int, rows: int, seconds: float, attention_share: float = 1.0
) -> dict:
    """The speed of some steps: tokens/s, model FLOP/s and, if the peak is known, MFU.

    Args:
      peak: peak FLOP/s of all devices, or None.
      tokens: tokens of the steps.
      rows: rows of token memory that the steps evaluated. The `_plain` figures count one for each token instead.
      seconds: time of the steps.
      attention_share: mean share of causal attention's pairs that lie inside documents.
    """
    out = {"tokens_per_second": tokens / seconds}
    for suffix, counted_rows in (("", rows), ("_plain", tokens)):
        flops = train_flops(config, tokens, counted_rows, attention_share) / seconds
        out[f"model_flops_per_second{suffix}"] = flops
        if peak:
            out[f"mfu{suffix}"] = flops / peak
    return out


def peak_memory() -> dict:
    """{"peak_memory_bytes": the most that a device of this host has had in use}; {} on CPUs, which do not count it."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices.find_local()]
    known = [peak for peak in peaks if peak is not None]
    return {"peak_memory_bytes": max(known)} if known else {}


class Trace:
    """Writes a profile of some steps to WORKDIR/profile. Every host writes its own.

    Args:
      steps: number of steps in the profile; 0: no profile.
      say: prints a line.
    """

    SKIPPED = 5  # first steps of a process that the profile leaves out, as devices start to talk to each other in them

    def __init__(self, workdir: str, steps: int, say: Callable[[str], None]):
        self._folder = os.path.join(workdir, "profile")
        self._steps, self._say = steps, say
        # The profiler can write only to a disk; `_stop` uploads the files.
        self._scratch = tempfile.TemporaryDirectory(prefix="memoryllm_jax-") if storage.is_url(workdir) else None
        self._done = 0  # steps of this process
        self._first: int | None = None  # number of the first step in the profile
        self._on = False

    def before(self, step: int) -> None:
        """Call before each step: starts or ends the profile when it is due."""
        if self._steps and self._done == self.SKIPPED:
            self._on, self._first = True, step
            where = self._scratch.name if self._scratch else self._folder
            jax.profiler.start_trace(where, create_perfetto_trace=True)
        if self._done == self.SKIPPED + self._steps:
            self._stop()
        self._done += 1

    def close(self) -> None:
        """Ends a profile that is still on, because the run ended before all of its steps."""
        self._stop()
        if self._steps and self._first is None:
            self._say(f"no profile: it leaves out the first {self.SKIPPED} steps, and the run ended within them")

    def _stop(self) -> None:
        if not self._on:
            return
        self._on = False
        jax.profiler.stop_trace()
        if self._scratch:
            for path in glob.glob(f"{self._scratch.name}/**", recursive=True):
                if os.path.isfile(path):
                    storage.upload(path, f"{self._folder}/{os.path.relpath(path, self._scratch.name)}")
        self._say(
            f"profile from step {self._first + 1} on in {self._folder}: open the perfetto_trace.json.gz in it "
            "at ui.perfetto.dev, or the folder in TensorBoard with xprof"
        )


class TrainRecord(Record, tag_field="kind", tag="train"):
    """What later readers need of a record of training.

    step: steps done.
    tokens: tokens seen.
    tokens_per_second, model_flops_per_second: speed since the record before.
    """

    step: Count
    tokens: Count
    tokens_per_second: Annotated[float, msgspec.Meta(gt=0)]
    model_flops_per_second: Annotated[float, msgspec.Meta(ge=0)]


class ValidationRecord(Record, tag_field="kind", tag="validation"):
    """A validation after `step` steps: means over the held-out tokens."""

    step: Count
    loss: float
    perplexity: float
    bits_per_byte: float


class _Place(Record):
    """Where a record belongs in a run."""

    step: Count
    kind: Kind


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """Yields (a complete line of a metrics.jsonl, where it stands).

    A killed run may have left half a line at the end. Raises: UserError.
    """
    text = storage.read_bytes(path, "records of an earlier run").decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.endswith("\n"):
            yield line, f"{path}: line {number}"


def records(path: str) -> list[TrainRecord | ValidationRecord]:
    """The records of training and validation in a metrics.jsonl, in the order of the file.

    Raises: UserError that names a line.
    """
    found = []
    for line, where in _lines(path):
        if parse(_Place, line, where, _A_RECORD).kind in ("train", "validation"):
            found.append(parse(TrainRecord | ValidationRecord, line, where, _A_RECORD))
    return found


class _Earlier(NamedTuple):
    """What an earlier process of the run has recorded.

    Attributes:
      kept: the lines that the run keeps when it resumes.
      goodput: the records of goodput, also those that are not kept.
    """

    kept: list[str]
    goodput: list[GoodputRecord]


def _earlier(path: str, start: int) -> _Earlier:
    """Reads the records of a run that resumes from step `start`.

    Those past `start` are made again, and so is the validation at `start`.
    """
    kept, goodput = [], []
    for line, where in _lines(path) if storage.exists(path) else ():
        record = parse(_Place, line, where, _A_RECORD)
        if record.step < start or (record.step == start and record.kind not in _MADE_AGAIN):
            kept.append(line)
        if record.kind == "goodput":
            goodput.append(parse(GoodputRecord, line, where, _A_RECORD))
    return _Earlier(kept, goodput)


class Writer:
    """Appends the records of a run to WORKDIR/metrics.jsonl and, if configured, to TensorBoard and trackers.

    Object storage cannot append to a file. If the workdir is behind a URL, the files grow on this machine and are
    copied there whole, once a minute and by `sync`. The caller calls `sync` before it saves a checkpoint: a run that
    resumes from it then finds all records up to it.

    Args:
      description: of the run, for trackers.
      start: step that the run resumes from, 0 for a new one. Records past it, of a killed run, are dropped.
      enabled: False on every host but the first: nothing is written.
    Attributes:
      earlier_goodput: the records of goodput of the run's earlier processes, also those past `start`.
    Raises: UserError.
    """

    def __init__(self, config: Config, description: Description, workdir: str, start: int, enabled: bool):
        self._file = self._tensorboard = self._claim = None
        self._at_start: list[dict] = []  # the records of the step that the run resumes from
        self._trackers: list[Tracker] = []
        self.earlier_goodput: list[GoodputRecord] = []
        if not enabled:
            return
        self._workdir = folder = workdir
        if storage.is_url(workdir):
            self._claim = storage.Claim(workdir)
            self._synced = time.monotonic()
            self._scratch = tempfile.TemporaryDirectory(prefix="memoryllm_jax-")
            folder = self._scratch.name
        kept, self.earlier_goodput = _earlier(os.path.join(workdir, "metrics.jsonl"), start)
        self._at_start = [record for record in map(json.loads, kept) if record["step"] == start]
        self._path = os.path.join(folder, "metrics.jsonl")
        storage.write_bytes(self._path, "".join(kept).encode())
        self._file = open(self._path, "a", encoding="utf-8")
        if config.log.tensorboard:
            import tensorboardX  # here, as it is slow to import and optional

            # TensorBoard drops all values from `purge_step` on, as the validation at `start` is made again. The step's
            # other records are not, so they are written again.
            self._tensorboard = tensorboardX.SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=start)
            for record in self._at_start:
                self._add_to_tensorboard(start, record["kind"], _values(record))
        self._trackers = open_trackers(config.log, workdir, folder, description)

    def kept(self, kind: Kind) -> dict | None:
        """The values of the record of the step that the run resumes from; None if it has none, or not on this host."""
        return next((_values(record) for record in self._at_start if record["kind"] == kind), None)

    def write(self, step: int, kind: Kind, values: dict) -> None:
        """Appends one record.

        Args:
          step: steps done.
          kind: what the record is about.
          values: by name, as JSON holds them. TensorBoard gets the numbers, and the texts of a sample.
        Raises: UserError.
        """
        if self._file is None:
            return
        self._check_there()
        try:
            self._file.write(json.dumps({"step": step, "kind": kind} | values) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error
        if self._tensorboard is not None:
            self._add_to_tensorboard(step, kind, values)
        for tracker in self._trackers:
            tracker.write(step, kind, values)
        if self._claim is not None and time.monotonic() - self._synced > _SYNC_S:
            self.sync()

    def _add_to_tensorboard(self, step: int, kind: str, values: dict) -> None:
        for name, value in flat(kind, values):
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(name, value, step)
            elif name == f"{kind}/text":
                self._tensorboard.add_text(kind, _as_markdown(value), step)

    def sync(self) -> None:
        """Copies the records to a workdir behind a URL.

        Raises: UserError, also if another run now uses the workdir, or the records were removed.
        """
        if self._file is not None:
            self._check_there()
        if self._claim is None:
            return
        self._claim.check()
        if self._tensorboard is not None:
            self._tensorboard.flush()
        folder = os.path.dirname(self._path)
        for path in [self._path, *glob.glob(os.path.join(folder, "tensorboard", "*"))]:
            storage.upload(path, os.path.join(self._workdir, os.path.relpath(path, folder)))
        self._synced = time.monotonic()

    def _check_there(self) -> None:
        # Writing to a removed file succeeds, and is lost. The workdir may be there again: saving a checkpoint makes it.
        if not os.path.exists(self._path):
            raise UserError(f"{os.path.dirname(self._path)}: was removed while the run was using it")

    def close(self) -> None:
        """Closes all files, and copies them to a workdir behind a URL. Raises nothing: it may run after an error."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # `write` has raised the same error before
                self._file.close()
        for tracker in self._trackers:
            tracker.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._claim is not None:
            with contextlib.suppress(UserError):
                self.sync()
            self._scratch.cleanup()


def _values(record: dict) -> dict:
    """What a record holds beside its place in the run."""
    return {name: value for name, value in record.items() if name not in ("step", "kind")}


def _as_markdown(text: str) -> str:
    """Markdown that shows a text as it is, also its line breaks and white space."""
    return "\n".join(f"    {line}" for line in text.splitlines())
