"""The processes of one run: joining them, stop signals, and exit codes that launchers act on."""

import dataclasses
import os
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import jax
from jax.experimental import multihost_utils

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError, UserError, one_line
from memoryllm_jax.common.options import Option

# Exit codes. 0: the run is complete. 1: another start would meet the same error, so launchers give up.
STOPPED = 143  # 128 + SIGTERM: stopped by a signal, and a checkpoint is saved; launchers start the run again
LOST = 134  # 128 + SIGABRT, with which JAX itself ends when it loses another process; launchers start the run again
INTERRUPTED = 130  # 128 + SIGINT: a second Ctrl-C, which does not wait for a checkpoint

# JAX takes a process for dead after this many seconds without its heartbeat, and ends the others.
LOST_AFTER_S = 30


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """How this process finds the other processes of its run."""

    multihost: Annotated[
        bool, Option("join the other processes of the run; SLURM, TPU pods and Kubernetes say where they are")
    ] = False
    coordinator: Annotated[str | None, Option("HOST:PORT of process 0, for --multihost without a scheduler")] = None
    num_processes: Annotated[
        int | None, Option("number of processes, for --multihost without a scheduler", least=1)
    ] = None
    process_id: Annotated[
        int | None, Option("number of this process, from 0 on, for --multihost without a scheduler", least=0)
    ] = None

    def __post_init__(self):
        options.check(self)

    def join(self) -> None:
        """With `multihost`, connects to the other processes. Call it before JAX is used. Raises: ArgumentError."""
        if not self.multihost:
            return
        try:
            jax.distributed.initialize(
                self.coordinator, self.num_processes, self.process_id, heartbeat_timeout_seconds=LOST_AFTER_S
            )
        except (ValueError, RuntimeError) as error:
            raise ArgumentError("multihost", one_line(error)) from error


class StopSignal:
    """Notices signals that ask the run to stop.

    A single process handles SIGTERM and SIGINT itself. With several processes JAX handles SIGTERM: if one of them gets
    it, all stop after the same step. SIGINT to one of them becomes a SIGTERM.
    """

    def __init__(self):
        self._seen = False
        self._handlers_before = {}
        self._several = jax.process_count() > 1
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            self._handlers_before[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt  # the user pressed Ctrl-C twice and does not want to wait for a checkpoint
        self._seen = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_step(self, step: int) -> bool:
        """Whether to stop after `step`. All processes get the same answer."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._seen

    def now(self) -> bool:
        """Whether to stop now, between steps. False with several processes, which agree only after a step."""
        return self._seen and not self._several

    def restore(self) -> None:
        """Restores the signal handlers from before."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)


def is_first() -> bool:
    """Whether this process is the one that prints and writes for the run."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until all processes of the run have called this.

    Args:
      what: names the place in the code; all processes give the same text.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def is_lost_peer(error: Exception) -> bool:
    """Whether the error means that another process of the run has ended."""
    # JAX has no error of its own for this: each collective fails with another message.
    return isinstance(error, jax.errors.JaxRuntimeError) and not is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error means that a device has too little memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def abandon(error: BaseException) -> NoReturn:
    """Prints the error and ends this process of several without cleanup: closing files could block on dead peers."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    reason = one_line(error, 600)
    lost = is_lost_peer(error)
    if lost:
        reason = f"another process has ended, or cannot be reached: {reason}"
    elif not isinstance(error, UserError | OSError):
        traceback.print_exception(error)
        reason = f"{type(error).__name__}: {reason}"
    where = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"error: {where}: {reason}; start all processes again to go on", file=sys.stderr, flush=True)
    os._exit(LOST if lost else 1)
