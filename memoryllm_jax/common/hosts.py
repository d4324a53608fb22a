"""Processes of one run: joining them, exit codes that launchers act on, and ending without the others."""

import os
import sys
import traceback

import jax
from absl import flags

from memoryllm_jax.common.errors import UserError

LOST = 134  # exit code where others are gone: 128 + SIGABRT, as when JAX itself ends a process for that
LOST_AFTER = 30  # seconds without a sign of life from a process, after which JAX ends the others


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


STOPPED = 143  # exit code after a signal: 128 + SIGTERM
