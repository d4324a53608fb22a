"""What is made of a run's metrics: checks, records, lines for people, and speed without compilation and saving."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from memoryllm_jax.checkpoint.store import Checkpoints
from memoryllm_jax.common import hosts
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.config import Config
from memoryllm_jax.model.loss import quality
from memoryllm_jax.training import metrics
from memoryllm_jax.training.batches import TrainBatches


class Clock:
    """Seconds of training between laps, without what is paused: compilation, evaluation and saving."""

    def __init__(self):
        self._start, self._paused = time.monotonic(), 0.0

    def lap(self) -> float:
        """Seconds since the last lap, which is where the next one begins."""
        now = time.monotonic()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return max(seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start


class _Unread(NamedTuple):
    """A step whose metrics are still on the devices."""

    step: int
    size: int
    values: dict[str, jax.Array]


class Recorder:
    """Reads the metrics of each step one step late, checks them, and writes and prints them.

    It prints and writes on the first host only, but for a profile, of which each host leaves its own.

    Args:
      start: step the run goes on from.
      batches: of the training: they know the epoch.
      checkpoints: to name the last good one where a loss is not finite.
      description: of the run, for Weights & Biases.
      profile_steps: steps to leave a profile of in the workdir; 0: none.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        start: int,
        batches: TrainBatches,
        checkpoints: Checkpoints,
        description: dict,
        profile_steps: int = 0,
    ):
        self._config, self._batches, self._checkpoints = config, batches, checkpoints
        self._writer = metrics.Writer(config, description, workdir, start, hosts.is_first())
        self._progress = Progress("train", config.steps, "step", initial=start, enabled=hosts.is_first())
        self._trace = metrics.Trace(workdir, profile_steps, self._progress.line)
        self._clock = Clock()
        self._peak_flops = metrics.peak_flops(config)
        self._tokens_a_step = config.batch_size * config.seq_len
        self._bytes_a_token = batches.tokens.bytes / batches.tokens.tokens
        self._compiled: set[int] = set()  # sizes whose step is compiled
        self._unread: _Unread | None = None
        self._steps = self._rows = 0  # since the last record

    def start(self) -> None:
        """Starts the clock: the first step comes next."""
        self._clock.lap()

    @contextlib.contextmanager
    def dispatching(self, step: int, size: int) -> Iterator[None]:
        """Around the dispatch of a step, which compiles it when its size is new."""
        self._trace.before(step)
        compiling = size not in self._compiled
        self._compiled.add(size)
        pause_if_compiling = self.paused() if compiling else contextlib.nullcontext()
        with pause_if_compiling, jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def paused(self) -> contextlib.AbstractContextManager:
        """Around work that speed does not count."""
        return self._clock.paused()

    def add(self, step: int, size: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was dispatched, and reads those of the step before. Raises: UserError."""
        self.read()
        self._unread = _Unread(step, size, values)

    def read(self) -> None:
        """Reads the metrics of the last step, which waits for it. Raises: UserError for a loss that is not finite."""
        if self._unread is None:
            return
        step, size, on_devices = self._unread
        self._unread = None
        values = {name: float(value) for name, value in jax.device_get(on_devices).items()}
        rows = size * self._batches.shards  # of token memory that the step evaluated
        self._steps += 1
        self._rows += rows
        loss = values.pop("loss")
        self._check_finite(step, loss, values["grad_norm"])
        done = step + 1
        if done % self._config.log.every == 0 or done == self._config.steps:
            self._record(done, rows, loss, values)
        self._progress.update(done, f"loss {loss:.3f}")

    def _check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss + grad_norm):
            return
        first = step * self._config.batch_size
        last = first + self._config.batch_size - 1
        raise UserError(
            f"step {step + 1}: the loss is {loss} and the gradient norm {grad_norm}, on sequences {first} to {last} "
            f"of the shuffled data (epoch {self._batches.epoch(step):.3f}); {self._checkpoints.last_good()}"
        )

    def _record(self, done: int, rows: int, loss: float, values: dict[str, float]) -> None:
        tokens = self._steps * self._tokens_a_step
        record = {
            **quality(loss, 1, self._bytes_a_token),
            **values,
            "tokens": done * self._tokens_a_step,
            "epoch": self._batches.epoch(done),
            "rows": rows,
            **metrics.speed(self._config, self._peak_flops, tokens, self._rows, self._clock.lap()),
        }
        self._steps = self._rows = 0
        self._writer.write(done, "train", record)
        self._progress.line(f"{_train_text(done, self._config.steps, record)}  ETA {self._progress.eta()}")

    def validated(self, step: int, result: dict) -> None:
        """Writes and prints a validation after `step` steps."""
        self._writer.write(step, "validation", result)
        self._progress.line(f"step {step}: validation {quality_text(result)}, {result['tokens']:,} tokens")

    def sync(self) -> None:
        """Brings the records to where checkpoints are. Raises: UserError."""
        self._writer.sync()

    def line(self, text: str) -> None:
        """Prints a line."""
        self._progress.line(text)

    def end_progress(self) -> None:
        """Ends the progress bar: what is printed next is the result."""
        self._progress.close()

    def close(self) -> None:
        """Closes the files, also after an error. Metrics that are not read yet are left."""
        self._trace.close()
        self._progress.close()
        self._writer.close()


def quality_text(result: dict) -> str:
    """Loss, perplexity and bits per byte, for people."""
    return (
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )


def _train_text(done: int, steps: int, record: dict) -> str:
    text = (
        f"step {done}/{steps}  loss {record['loss']:.4f}  bits/byte {record['bits_per_byte']:.3f}  "
        f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['model_flops_per_second'] / 1e9:,.0f} GFLOP/s"
    )
    if "mfu" in record:
        text += f"  MFU {100 * record['mfu']:.1f}% (plain {100 * record['mfu_plain']:.1f}%)"
    return text
