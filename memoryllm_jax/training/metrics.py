"""What a run reports: FLOPs and MFU by formula, and records to JSON lines, TensorBoard and Weights & Biases.

`model_flops_per_second` and `mfu` count model/flops.py's formula for the rows of token memory that were evaluated:
distinct ids, padding included. The `_plain` figures count a row for every position, which is the work that a step
without unique tokens would do for the same result.
"""

import contextlib
import glob
import json
import os
import tempfile
import time
import uuid

import jax

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.model.flops import train_flops
from memoryllm_jax.training.chips import PEAK_FLOPS

_SYNC_S = 60  # between copies of the records to a workdir behind a URL


def peak_flops(config: Config) -> float | None:
    """FLOP/s of all devices at their best, or None where this is not known, as on a CPU."""
    kind = jax.devices()[0].device_kind
    known = config.log.peak_flops or next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)
    return known and known * jax.device_count()


def speed(config: Config, peak: float | None, tokens: int, rows: int, seconds: float) -> dict:
    """tokens/s, model FLOP/s and MFU over some steps, FFN-M counted as done and as it would have been."""
    out = {"tokens_per_second": tokens / seconds}
    for suffix, count in (("", rows), ("_plain", tokens)):
        out[f"model_flops_per_second{suffix}"] = train_flops(config, tokens, count) / seconds
        if peak:
            out[f"mfu{suffix}"] = out[f"model_flops_per_second{suffix}"] / peak
    return out


class Trace:
    """Leaves a profile of some steps in WORKDIR/profile, of every host its own; brings it to a workdir behind a URL.

    Args:
      steps: how many; 0: none. The first steps of a process, which compile, are not among them.
      say: prints a line.
    """

    SKIPPED = 5

    def __init__(self, workdir: str, steps: int, say):
        self._folder, self._steps, self._say = os.path.join(workdir, "profile"), steps, say
        self._scratch = tempfile.TemporaryDirectory(prefix="memoryllm_jax-") if storage.is_url(workdir) else None
        self._on, self._first = False, None

    def step(self, step: int, done: int) -> None:
        """Before a step, the process's `done`-th."""
        if self._steps and done == self.SKIPPED:
            self._on, self._first = True, step
            where = self._scratch.name if self._scratch else self._folder
            jax.profiler.start_trace(where, create_perfetto_trace=True)
        if done == self.SKIPPED + self._steps:
            self.close()

    def close(self) -> None:
        if self._steps and self._first is None:
            self._first = -1
            self._say(f"no profile: the run ended within its first {self.SKIPPED} steps, which are left out")
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            if self._scratch:
                for path in filter(os.path.isfile, glob.glob(f"{self._scratch.name}/**", recursive=True)):
                    storage.upload(path, f"{self._folder}/{os.path.relpath(path, self._scratch.name)}")
            self._say(
                f"profile from step {self._first + 1} on in {self._folder}: open the perfetto_trace.json.gz in it "
                "at ui.perfetto.dev, or the folder in TensorBoard with xprof"
            )


def _lines(path):
    """[(line, record)]; a last line that is not whole is left out. Raises: UserError."""
    text = storage.read_bytes(path, "records of an earlier run").decode("utf-8", errors="replace")
    out = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            record["step"], record["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: line {number}: expected a record of an earlier run, found {line[:40]!r}"
            ) from error
        out.append((line, record))
    return out


def records(path: str) -> list[dict]:
    """What a `Writer` has appended so far. Raises: UserError."""
    return [record for _, record in _lines(path)]


def _kept_lines(path: str, start: int) -> list[str]:
    """Records of a run that goes on from `start`: none past it, and not its evaluation, which is made again."""
    if not storage.exists(path):
        return []
    return [
        line
        for line, record in _lines(path)
        if record["step"] < start or (record["step"] == start and record["kind"] == "train")
    ]


class Writer:
    """Appends records of a run to WORKDIR/metrics.jsonl and, as configured, TensorBoard and Weights & Biases.

    Behind a URL files cannot grow, so they grow on this machine and are brought there whole, once a minute and by
    `sync`. A run that goes on drops what lies past its checkpoint, so with a `sync` before each nothing is missing.

    Args:
      start: step the run goes on from; records past it, of a run that was killed, are dropped.
      enabled: False on every host but the first.
    """

    def __init__(self, config: Config, description: dict, workdir: str, start: int, enabled: bool):
        self._file = self._tensorboard = self._wandb = self._claim = None
        if not enabled:
            return
        self._workdir, folder = workdir, workdir
        if storage.is_url(workdir):
            self._claim, self._synced = storage.Claim(workdir), time.monotonic()
            self._scratch = tempfile.TemporaryDirectory(prefix="memoryllm_jax-")
            folder = self._scratch.name
        kept = _kept_lines(os.path.join(workdir, "metrics.jsonl"), start)
        self._path = os.path.join(folder, "metrics.jsonl")
        storage.write_bytes(self._path, "".join(kept).encode())
        self._file = open(self._path, "a", encoding="utf-8")
        if config.log.tensorboard:
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(os.path.join(folder, "tensorboard"), purge_step=start + 1)
        if config.log.wandb:
            try:
                import wandb
            except ImportError as error:
                raise UserError("config.log.wandb: needs wandb: pip install 'memoryllm_jax[wandb]'") from error
            id_path = os.path.join(workdir, "wandb_id")
            if not storage.exists(id_path):
                storage.write_bytes(id_path, uuid.uuid4().hex.encode())
            self._wandb = wandb.init(
                project="memoryllm_jax",
                name=os.path.basename(workdir),
                id=storage.read_bytes(id_path, "the id of the run").decode(),
                resume="allow",
                dir=folder,
                config=description["config"],
            )
            self._wandb.define_metric("*", step_metric="step")

    def write(self, step: int, kind: str, values: dict) -> None:
        """One record; `kind` is train or validation."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, "kind": kind} | values) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error
        named = {f"{kind}/{name}": value for name, value in values.items()}
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(named | {"step": step})
        if self._claim is not None and time.monotonic() - self._synced > _SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Brings the records to a workdir behind a URL. Raises: UserError, also if another run has it now."""
        if self._claim is None:
            return
        self._claim.check()
        if self._tensorboard is not None:
            self._tensorboard.flush()
        folder = os.path.dirname(self._path)
        for path in [self._path, *glob.glob(os.path.join(folder, "tensorboard", "*"))]:
            storage.upload(path, os.path.join(self._workdir, os.path.relpath(path, folder)))
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the write that failed has been told of
                self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._claim is not None:
            with contextlib.suppress(UserError):  # likewise
                self.sync()
            self._scratch.cleanup()
