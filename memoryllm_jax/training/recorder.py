"""Checks, records and prints a run's metrics, and measures its speed."""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from memoryllm_jax.checkpoint.description import Description
from memoryllm_jax.checkpoint.store import Checkpoints
from memoryllm_jax.common import hosts
from memoryllm_jax.common.errors import DivergedError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.config import Config
from memoryllm_jax.model.loss import quality
from memoryllm_jax.training import metrics, norms
from memoryllm_jax.training.batches import TrainBatches
from memoryllm_jax.training.during import Observer
from memoryllm_jax.training.feeder import Feed, Feeder
from memoryllm_jax.training.goodput import Activity, Goodput, earlier_seconds
from memoryllm_jax.training.sizes import Sizes


class _Unread(NamedTuple):
    """A step whose metrics are still on the devices."""

    step: int
    size: int
    values: dict[str, jax.Array]
    norms: dict | None


class Recorder:
    """Reads the metrics of each step one step late, checks them, and writes and prints them.

    Only the first host prints and writes records. Every host writes its own profile.

    Args:
      workdir: absolute path or URL.
      start: steps done before this process.
      batches: training batches, which know epochs and bytes per token.
      checkpoints: the error for a loss that is not finite names the newest good one.
      description: of the run, for trackers.
      sizes: of distinct ids; the steps of those planned are compiled.
      goodput: counts the run's time, since before the data was opened.
      skipped: number of steps skipped before this process; None if the run skips none.
      profile_steps: number of steps to profile; 0: none.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        start: int,
        batches: TrainBatches,
        checkpoints: Checkpoints,
        description: Description,
        sizes: Sizes,
        goodput: Goodput,
        skipped: int | None = None,
        profile_steps: int = 0,
    ):
        self._config, self._batches, self._checkpoints = config, batches, checkpoints
        self._writer = metrics.Writer(config, description, workdir, start, hosts.is_first())
        self._progress = Progress("train", config.steps, "step", initial=start, enabled=hosts.is_first())
        self._trace = metrics.Trace(workdir, profile_steps, self._progress.line)
        self._goodput = goodput
        self._goodput_at = -1  # step of the last record of goodput
        self._skipped = skipped
        self._first = start  # number of the first step of this process
        self._peak_flops = metrics.peak_flops(config)
        self._tokens_a_step = config.batch_size * config.seq_len
        self._bytes_a_token = batches.bytes_a_token
        self._compiled = set(sizes.planned)  # sizes of distinct ids whose step is compiled
        self._unread: _Unread | None = None
        self._steps = self._rows = 0  # steps, and rows of token memory that they evaluated, since the last record
        self._attention_shares = 0.0  # sum of these steps' shares of attention inside documents
        goodput.add_earlier(earlier_seconds(self._writer.earlier_goodput, start))
        if self._writer.earlier_goodput:
            # Those of steps that are trained again are dropped. If this process ended early, their time would be lost.
            self._record_goodput(start)

    def steps(self, feeder: Feeder) -> Iterator[Feed]:
        """Yields the feeds of all steps. The first one starts the clock."""
        self._goodput.begin("step")
        self._goodput.lap()
        yield from self._goodput.inputs(feeder)

    @contextlib.contextmanager
    def dispatching(self, step: int, size: int) -> Iterator[None]:
        """A context for the dispatch of a step.

        Raises: UserError if the loss of the step before is not finite and this step has to be compiled.
        """
        self._trace.before(step)
        # A dispatch returns at once, except where jit first compiles: seconds or minutes that say nothing of the speed.
        pause_if_compiling = contextlib.nullcontext()
        if size not in self._compiled:
            self._compiled.add(size)
            self._progress.line(
                f"step {step + 1}: more distinct ids than were planned for; compiling for {size:,} of them a shard"
            )
            pause_if_compiling = self.paused("compile")
        with pause_if_compiling, jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    @contextlib.contextmanager
    def paused(self, activity: Activity) -> Iterator[None]:
        """A context for work whose time does not count in the measured speed.

        Args:
          activity: what the time counts for in the goodput.
        Raises: UserError if the loss of the last step is not finite.
        """
        # Waits for the last step, which is counted: else the devices would compute it while the clock stands still, and
        # the speed of the record would be too high, once by a factor of 200.
        self.read()
        with self._goodput.during(activity):
            yield

    @contextlib.contextmanager
    def saving(self, done: int) -> Iterator[None]:
        """A context for saving a checkpoint after `done` steps, whose records it writes first.

        Raises: UserError if the loss of the last step is not finite, or the records cannot be written.
        """
        # To pause reads this step's metrics too: a state whose loss is not finite must not be saved.
        with self.paused("save"):
            # Records first: a run that goes on from this checkpoint would not make the missing ones again.
            if self._goodput_at != done:
                self._record_goodput(done)
            self._writer.sync()
            yield

    def add(self, step: int, size: int, values: dict[str, jax.Array]) -> None:
        """Keeps the metrics of a dispatched step, and reads those of the step before.

        Args:
          step: number of the step, from 0 on.
          size: number of ids that each batch shard's distinct ids were padded to.
          values: the step's metrics, on the devices.
        Raises: UserError if the loss of the step before is not finite.
        """
        self._goodput.dispatched(values["loss"])  # all results of a step are there at the same time
        self.read()
        self._unread = _Unread(step, size, values, values.pop("norms", None))

    def read(self) -> None:
        """Reads the metrics that `add` kept, if any, and records them when due. Waits for their step to end.

        Raises: UserError if the loss or the gradient's norm is not finite.
        """
        if self._unread is None:
            return
        step, size, on_devices, of_layers = self._unread
        self._unread = None
        # One `device_get` for all: to convert the arrays one by one would wait for a transfer each.
        values = {name: float(value) for name, value in jax.device_get(on_devices).items()}
        rows = size * self._batches.shards  # rows of token memory that the step evaluated
        self._steps += 1
        self._rows += rows
        self._attention_shares += values.get("attention_share", 1.0)
        if "skipped" in values:
            self._skipped = int(values["skipped"])
        loss = values.pop("loss")
        self._check(step, loss, values)
        done = step + 1
        if done % self._config.log.every == 0 or done == self._config.steps:
            self._record(done, rows, loss, values)
        if of_layers is not None and done % self._config.log.norms_every == 0:
            self._record_norms(done, of_layers)
        # In the first step devices start to talk to each other and kernels load: no time left follows from it.
        show = self._progress.restart if step == self._first else self._progress.update
        show(done, f"loss {loss:.3f}")

    def _check(self, step: int, loss: float, values: dict[str, float]) -> None:
        """Prints a step that was skipped, and takes what only this needs out of `values`.

        Raises: UserError if the step is not finite or a spike, and must not be skipped.
        """
        grad_norm = values["grad_norm"]
        limits = values.pop("loss_limit", math.inf), values.pop("grad_norm_limit", math.inf)
        is_skipped = bool(values.pop("is_skipped", False))
        # The gradient too: it can overflow where the loss is still finite. The sum is finite only if both are.
        if math.isfinite(loss + grad_norm) and not is_skipped:
            return
        first = step * self._config.batch_size
        last = first + self._config.batch_size - 1
        found = (
            f"step {step + 1}: the loss is {_limited(loss, limits[0])} and the gradient norm "
            f"{_limited(grad_norm, limits[1])}, on sequences {first} to {last} of the shuffled data "
            f"(epoch {self._batches.epoch(step):.3f})"
        )
        most = self._config.optimizer.max_skipped
        if is_skipped and values["skipped"] <= most:
            self._progress.line(f"{found}; skipped, {values['skipped']:.0f} of at most {most}")
            return
        if is_skipped:
            found += f"; expected at most config.optimizer.max_skipped = {most} such steps, found one more"
        raise DivergedError(f"{found}; {self._checkpoints.last_good()}")

    def _record(self, done: int, rows: int, loss: float, values: dict[str, float]) -> None:
        # The speed is that since the last record: an average over the whole run would hide a change.
        tokens, share = self._steps * self._tokens_a_step, self._attention_shares / self._steps
        record = {
            **quality(loss, 1, self._bytes_a_token),
            **values,
            "tokens": done * self._tokens_a_step,
            "epoch": self._batches.epoch(done),
            "rows": rows,
            **metrics.speed(self._config, self._peak_flops, tokens, self._rows, self._goodput.lap(), share),
            **metrics.peak_memory(),
        }
        self._steps = self._rows = 0
        self._attention_shares = 0.0
        # JSON has no NaN: the record of a skipped step lacks what is not finite.
        self._writer.write(done, "train", {name: value for name, value in record.items() if not _is_not_finite(value)})
        self._progress.line(f"{_train_text(done, self._config.steps, record)}  ETA {self._progress.eta()}")
        self._record_goodput(done)

    def _record_norms(self, done: int, of_layers: dict) -> None:
        record = norms.record(jax.device_get(of_layers))
        if record is not None:
            self._writer.write(done, "norms", record)

    def _record_goodput(self, done: int) -> dict:
        record = self._goodput.record()
        self._writer.write(done, "goodput", record)
        self._goodput_at = done
        return record

    def finish(self, done: int) -> dict:
        """Records where the time of the run went, once the last checkpoint is saved.

        Returns: what result.json has of the whole run: {"goodput": what `Goodput.record` returns}, with the peak memory
          where it is known, and with "skipped", the number of steps skipped, if the run may skip steps.
        """
        skipped = {} if self._skipped is None else {"skipped": self._skipped}
        return {"goodput": self._record_goodput(done)} | metrics.peak_memory() | skipped

    def observed(self, step: int, observer: Observer, result: dict) -> None:
        """Records and prints the result of an observer after `step` steps."""
        asked = {"asked": observer.asked} if observer.asked else {}
        self._writer.write(step, observer.kind, result | asked)
        self._progress.line(f"step {step}: {observer.text(result)}")

    def kept(self, observer: Observer) -> dict | None:
        """What an earlier process recorded of an observer at the step that this one resumes from.

        Returns: the result; None if there is none, if it was asked for something else, or on all hosts but the first.
        """
        record = self._writer.kept(observer.kind) or {}
        return record if record.pop("asked", None) == observer.asked else None

    def sync(self) -> None:
        """Copies the records to a workdir behind a URL; does nothing on a disk. Raises: UserError."""
        self._writer.sync()

    def line(self, text: str) -> None:
        """Prints a line."""
        self._progress.line(text)

    def end_progress(self) -> None:
        """Ends the progress bar, so that the result can be printed below it."""
        self._progress.close()

    def close(self) -> None:
        """Closes the files, also after an error. Metrics that are not read yet are dropped."""
        self._goodput.close()
        self._trace.close()
        self._progress.close()
        self._writer.close()


def _is_not_finite(value) -> bool:
    """Whether a value is infinite or not a number."""
    return isinstance(value, float) and not math.isfinite(value)


def _limited(value: float, limit: float) -> str:
    """The value as text; for a spike with the largest value that was none."""
    return f"{value:.6g}" + (f" (a spike, above {limit:.6g})" if value > limit else "")


def _train_text(done: int, steps: int, record: dict) -> str:
    """A training record as a line to print."""
    text = (
        f"step {done}/{steps}  loss {record['loss']:.4f}  bits/byte {record['bits_per_byte']:.3f}  "
        f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['model_flops_per_second'] / 1e9:,.0f} GFLOP/s"
    )
    if "skipped" in record:
        text += f"  skipped {record['skipped']:.0f}"
    if "mfu" in record:
        text += f"  MFU {100 * record['mfu']:.1f}% (plain {100 * record['mfu_plain']:.1f}%)"
    if "peak_memory_bytes" in record:
        text += f"  memory {record['peak_memory_bytes'] / 1e9:.1f} GB"
    return text
