"""The processes of one run: joining them, stop signals, and exit codes that launchers act on."""

import dataclasses
import os
import signal
import sys
import traceback
from typing import Annotated

import jax
from jax.experimental import multihost_utils

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option

# Exit codes. Code 0: the run is complete. Code 1: another start would meet the same error, so launchers give up.
STOPPED = 143  # 128 + SIGTERM: stopped by a signal, a checkpoint is saved; launchers start the run again
LOST = 134  # 128 + SIGABRT, JAX's own code when a peer is lost: the error is in another process; launchers start again

LOST_AFTER_S = 30  # seconds without a heartbeat after which JAX takes a process for dead and ends the others


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """How this process finds the others of its run."""

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
        """Connects to the other processes of a run of several, before JAX is used. Raises: UserError."""
        if not self.multihost:
            return
        try:
            jax.distributed.initialize(
                self.coordinator, self.num_processes, self.process_id, heartbeat_timeout_seconds=LOST_AFTER_S
            )
        except (ValueError, RuntimeError) as error:
            raise ArgumentError("multihost", _one_line(error)) from error


class StopSignal:
    """Notices SIGTERM and SIGINT. On several hosts JAX notices SIGTERM to any of them, for all at the same step."""

    def __init__(self):
        self._seen = False
        self._handlers_before = {}
        self._several = jax.process_count() > 1
        if not self._several:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers_before[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: do not wait for the checkpoint
        self._seen = True

    def after_step(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer on all hosts."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._seen

    def now(self) -> bool:
        """Whether to stop between steps. Never on several hosts, which agree on a stop after a step only."""
        return self._seen

    def restore(self) -> None:
        """Sets the signal handlers that were there before."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)


def is_first() -> bool:
    """Whether this process is the one that prints and writes for the run."""
    return jax.process_index() == 0


def is_lost_peer(error: Exception) -> bool:
    """Whether another process is gone: JAX says so by any of its runtime errors but a lack of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and not is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def abandon(error: Exception) -> None:
    """Ends one process of several without cleanup: closing files could block on peers that are gone."""
    reason, lost = _one_line(error)[:600], is_lost_peer(error)
    if lost:
        reason = f"another process has ended, or cannot be reached: {reason}"
    elif not isinstance(error, UserError | OSError):
        traceback.print_exception(error)
        reason = f"{type(error).__name__}: {reason}"
    where = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"error: {where}: {reason}; start all processes again to go on", file=sys.stderr, flush=True)
    os._exit(LOST if lost else 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
