"""What all commands share: one error type for bad input, flag parsing, and progress for a terminal or a log."""

import os
import sys
import time
import traceback

import jax
import tqdm
from absl import app, flags, logging

LOST = 134  # exit code where others are gone: 128 + SIGABRT, as when JAX itself ends a process for that
LOST_AFTER = 30  # seconds without a sign of life from a process, after which JAX ends the others

flags.disclaim_key_flags()  # flags that are defined here are the command's: --help lists them


class UserError(Exception):
    """Bad input. Its text is one sentence for the person who gave it."""


def run(main, positional: bool = False) -> None:
    """Runs `main()` as an absl command; a `UserError` becomes one line on stderr and exit code 1.

    With `positional`, `main` is given the arguments that are not options.
    """

    def wrapped(argv):
        if not any(argument.startswith(("--verbosity", "-v")) for argument in sys.argv):
            logging.set_verbosity(logging.FATAL)  # Orbax logs every file, and every error that it also raises
        try:
            if positional:
                return main(argv[1:])
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; options are written --name=value")
            return main()
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    def parse_flags(argv):
        from memoryllm_jax import config

        try:
            config.check_flags(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        return app.parse_flags_with_usage(argv)

    try:
        app.run(wrapped, flags_parser=parse_flags)
    except SystemExit:
        if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv):
            sys.exit(0)  # absl's is 1
        raise


def define_model_flags() -> None:
    """What `generate.model_from_flags` reads."""
    flags.DEFINE_string("workdir", None, "folder with the trained model's checkpoints", required=True)
    flags.DEFINE_string("tol", "", "ToL file; without it rows are computed from the weights")
    flags.DEFINE_string("rows", "disk", "where the ToL file's rows are served from: device, host or disk")
    flags.DEFINE_string(
        "cache", "256MiB", "rows kept on the device, for host and disk; least recently used leave first"
    )
    flags.DEFINE_string("overlay", "", "edits of the rows, that `tol edit` wrote")
    flags.DEFINE_float("alpha", 1.0, "factor of what FFN-M adds, live or from a ToL file; in base, the FFN")
    flags.DEFINE_float("alpha_compute", 1.0, "factor of what FFN-C adds, in flex")
    flags.DEFINE_list("drop_layers", [], "layers whose FFN-M, in base whose FFN, adds nothing, such as 0,5")
    flags.DEFINE_list("drop_compute", [], "layers whose FFN-C adds nothing, in flex")
    flags.DEFINE_integer("step", None, "checkpoint to read; by default the newest")
    flags.DEFINE_string("dtype", "", "float32 or bfloat16, of the computation; by default that of the training")


def define_quality_flags() -> None:
    """The text and the tasks that say how good a model is."""
    flags.DEFINE_string("data", "", "prepared data (folder or URL) or text files (globs, comma-separated)")
    flags.DEFINE_enum("split", "validation", ["train", "validation"], "of prepared data")
    flags.DEFINE_integer("max_tokens", 0, "predict so many tokens at most, from the start; 0: all", lower_bound=0)
    flags.DEFINE_list("tasks", [], "names of the harness's tasks, groups or tags, or of task files; may have * in them")
    flags.DEFINE_integer("num_fewshot", None, "examples in a prompt; by default as the task says", lower_bound=0)
    flags.DEFINE_float("limit", 0, "documents of each task, or a share of them below 1, for trials; 0: all", 0)
    flags.DEFINE_string("task_path", "", "folder with task files (.yaml) of your own")
    flags.DEFINE_string("task_data", "", "folder with lambada.jsonl and piqa.jsonl, for lambada_local and piqa_local")


def define_multihost_flags() -> None:
    flags.DEFINE_bool("multihost", False, "join the run's other processes, which SLURM, TPU pods or Kubernetes tell of")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no scheduler tells of it")
    flags.DEFINE_integer("num_processes", None, "number of processes, likewise")
    flags.DEFINE_integer("process_id", None, "number of this process, likewise")


def is_lost_peer(error: Exception) -> bool:
    """Whether this comes of another process of the run that is gone: of what JAX raises, all but a lack of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and not is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def abandon(error: Exception) -> None:
    """Ends this process of several at once: to close what it has open would be to wait for others that may be gone."""
    reason, lost = " ".join(str(error).split())[:600], is_lost_peer(error)
    if lost:
        reason = f"another process has ended, or cannot be reached: {reason}"
    elif not isinstance(error, UserError | OSError):
        traceback.print_exception(error)
        reason = f"{type(error).__name__}: {reason}"
    where = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"error: {where}: {reason}; start all processes again to go on", file=sys.stderr, flush=True)
    os._exit(LOST if lost else 1)


def join_hosts() -> None:
    """Joins the other processes if the flags say so. Raises: UserError."""
    if flags.FLAGS.multihost:
        where = (flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id)
        try:
            jax.distributed.initialize(*where, heartbeat_timeout_seconds=LOST_AFTER)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--multihost: {' '.join(str(error).split())}") from error


class Progress:
    """Progress with rate and ETA: a bar on a terminal, a plain line every `every_s` seconds in a log.

    Args:
      total: amount of work, in `unit`s.
      initial: amount already done when this process starts; it does not count towards the rate.
      enabled: False on every host but the first.
      stream: where plain lines go, by default stdout.
    """

    def __init__(
        self, label: str, total: int, unit: str, initial: int = 0, every_s: float = 10.0, enabled=True, stream=None
    ):
        self.stream = stream
        self.label, self.total, self.every_s, self.enabled = label, total, every_s, enabled
        self.done = self.initial = initial
        self.start = self.last_line = time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            scale = unit == "B"
            self.bar = tqdm.tqdm(
                total=total, initial=initial, unit=unit, unit_scale=scale, desc=label, dynamic_ncols=True
            )

    def update(self, done: int, note: str = "") -> None:
        """Sets the amount done so far and what to show beside it."""
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self.enabled and self.bar is None and now - self.last_line >= self.every_s:
            self.line(f"{self.label} {100 * done / max(self.total, 1):.1f}%  {note}  ETA {self.eta()}")

    def eta(self) -> str:
        new = self.done - self.initial
        if new <= 0:
            return "unknown"
        return duration((time.monotonic() - self.start) / new * (self.total - self.done))

    def line(self, text: str) -> None:
        """Prints a line without breaking the bar; in a log it stands in for the next progress line."""
        self.last_line = time.monotonic()
        if self.enabled and self.bar is not None:
            self.bar.write(text)
        elif self.enabled:
            print(text, flush=True, file=self.stream)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
