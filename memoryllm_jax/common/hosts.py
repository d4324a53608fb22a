"""The processes of one run: how they join, how a signal stops all of them, and how an error ends all of them.

A process that fails tells the others why before it ends, and all end with its exit code within seconds. JAX alone would
leave the others in a collective until they miss its heartbeats, and end them with another code.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Annotated, NoReturn

import jax
import numpy as np
from jax._src import clusters, distributed  # jax has no public way to the address and the store of all processes
from jax.experimental import multihost_utils

from memoryllm_jax.common import devices, exit_codes, options
from memoryllm_jax.common.errors import (
    ArgumentError,
    CompilationError,
    LostError,
    OutOfMemoryError,
    UserError,
    one_line,
)
from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.common.options import Option

# JAX takes a process for dead after this many seconds without its heartbeat, and ends the others.
LOST_AFTER_S = 30
# A process that ends waits at most so long for the others to learn why.
_GOODBYE_S = 5.0
_DETECTION_S = 300  # to find the coordinator's address, as in jax.distributed.initialize
_ENDING, _TOLD = "memoryllm_jax/ending", "memoryllm_jax/told"  # folders of the shared store
_POLL_S = 1.0  # between two looks into the store
_SENTENCE_S = 2 * _POLL_S  # so long a process that lost another one waits for its reason
_one_ends = threading.Lock()  # the thread that holds it prints the sentence and ends this process


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

    def join(self, lost_after_s: int = LOST_AFTER_S) -> None:
        """With `multihost`, connects to the other processes. Call it before JAX is used.

        Args:
          lost_after_s: seconds without a heartbeat after which a process counts as dead.
        Raises: ArgumentError; UserError if this is the only process and its accelerator cannot be used.
        """
        if self.multihost:
            self._connect(lost_after_s)
        with ending_all():
            devices.find()

    def _connect(self, lost_after_s):
        self._check_port()
        # JAX handles SIGTERM from the moment that it starts this service; see `StopSignal.begin`.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                self.coordinator, self.num_processes, self.process_id, heartbeat_timeout_seconds=lost_after_s
            )
        except (ValueError, RuntimeError) as error:
            if exit_codes.of_lost_peer(error):
                raise LostError(f"the other processes cannot be reached: {one_line(error, 600)}") from error
            raise ArgumentError("multihost", one_line(error)) from error
        if _several():
            _watch_others()

    def _check_port(self):
        """Raises: ArgumentError if this is process 0 and cannot listen at the coordinator's port.

        JAX may crash there. If the port belongs to the coordinator of another run, it may even share it.
        """
        address, process_id = self.coordinator, self.process_id
        if address is None or process_id is None:
            with contextlib.suppress(Exception):  # `initialize` meets the same error, and says what is missing
                address, _, process_id, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                    address, self.num_processes, process_id, None, None, _DETECTION_S
                )
        port = (address or "").rpartition(":")[2]
        if process_id != 0 or not port.isdecimal():
            return
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ArgumentError(
                "coordinator", f"expected a free port of this machine, found {address}: {os.strerror(error.errno)}"
            ) from error


class StoppedEarly(BaseException):
    """A signal came to one of several processes before the first step, when there is nothing to save."""

    exit_code = ExitCode.STOPPED

    def __str__(self):
        return "stopped by a signal before the first step of this start, with nothing to save"


class StopSignal:
    """Notices signals that ask the run to stop.

    A single process handles SIGTERM and SIGINT itself. Of several, a signal to one stops all: before `begin` at once,
    by an exception in the process that gets it. After `begin` JAX handles SIGTERM, and SIGINT becomes a SIGTERM: all
    stop at the same call of `agreed`.
    """

    def __init__(self):
        self._seen = False
        self._several = _several()
        self._begun = False
        self._agreed = False
        self._calls = 0
        self._handlers_before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number, frame):
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt  # the user pressed Ctrl-C twice and does not want to wait for a checkpoint
        self._seen = True
        if self._several and not self._begun:
            raise StoppedEarly
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def begin(self) -> None:
        """Says that the first step comes next: from now on a signal must let all processes save the same step."""
        if self._several:
            jax.config.update("jax_enable_preemption_service", True)
            distributed.global_state.initialize_preemption_sync_manager()  # which takes SIGTERM over
        self._begun = True

    def agreed(self) -> bool:
        """Whether to stop here. All processes call it at the same places, and get the same answer."""
        if not self._several:
            return self._seen
        self._calls += 1  # JAX finds the first call that no process has made yet, and says True at this one alone
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(self._calls)
        return self._agreed

    def now(self) -> bool:
        """Whether this process should stop. False with several, which stop together: by an exception, or `agreed`."""
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


def as_the_first(flag: bool) -> bool:
    """The flag of the first host, on all of them: for what only that host can know. All processes call it."""
    if not _several():
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error, or what caused it, means that another process of the run has ended."""
    return _several() and exit_codes.of_lost_peer(error) is not None


@contextlib.contextmanager
def compiling(what: str, memory_hint: str = "") -> Iterator[None]:
    """Turns an error of XLA's compiler into an error that a restart would meet again.

    Args:
      what: is compiled: "the training step".
      memory_hint: what the user can do if it needs too much memory.
    Raises: CompilationError; OutOfMemoryError.
    """
    try:
        yield
    except Exception as error:
        if exit_codes.is_out_of_memory(error):
            raise OutOfMemoryError(f"{what}: out of memory: {one_line(error, 300)}{memory_hint}") from error
        # Processes exchange results of autotuning while they compile, so that a lost one can be noticed here.
        if exit_codes.is_of_jax(error) and not is_lost_peer(error):
            raise CompilationError(f"{what} does not compile: {one_line(error, 600)}") from error
        raise


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """An error in this context ends all processes of the run (`fail`)."""
    try:
        yield
    except (Exception, KeyboardInterrupt, StoppedEarly) as error:
        fail(error)


def fail(error: BaseException, memory_hint: str = "") -> NoReturn:
    """Ends all processes of the run for an error in this one: see `exit_codes` for the code.

    Several processes end without cleanup, as closing files could block on dead ones.

    Args:
      memory_hint: what the user can do if a device has too little memory.
    Raises: the error, as a UserError where it is of a known kind, if this is the only process.
    """
    error = _explained(error, memory_hint)
    if not _several():
        raise error
    code = exit_codes.of(error)
    if code == ExitCode.INTERRUPTED:
        reason = "interrupted by a second Ctrl-C"
    elif isinstance(error, UserError | OSError | StoppedEarly):
        reason = one_line(error)
    else:
        traceback.print_exception(error)
        reason = f"{type(error).__name__}: {one_line(error, 600)}"
    _end(code, reason)


def _explained(error: BaseException, memory_hint: str) -> BaseException:
    """A UserError for an error of a device or of another process; others as they are."""
    lost = exit_codes.of_lost_peer(error) if _several() else None
    if lost:  # also where code that does not know of processes blames a file
        return LostError(f"another process has ended, or cannot be reached: {one_line(lost, 600)}")
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return error
    if exit_codes.is_out_of_memory(error):
        return OutOfMemoryError(f"out of memory: {one_line(error, 300)}{memory_hint}")
    if exit_codes.is_of_jax(error):
        return LostError(f"a device has failed: {one_line(error, 600)}")
    return error


def _several() -> bool:
    """Whether this is one of several processes. `jax.process_count()` would first initialise the devices."""
    return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def _end(code: ExitCode, reason: str) -> NoReturn:
    """Prints why this process ends, tells the others, and exits with the code of the process that failed first."""
    number = distributed.global_state.process_id
    if code == ExitCode.LOST:
        time.sleep(_SENTENCE_S)  # if the other process has told why it ended, `_end_with_others` ends this one
    _one_ends.acquire()
    _say(code, f"{_name(number)}: {reason}")
    with contextlib.suppress(Exception):  # the store is lost with process 0
        client = distributed.global_state.client
        try:
            client.key_value_set(f"{_ENDING}/first", json.dumps([code, number, reason]))
        except jax.errors.JaxRuntimeError:  # another process was first
            code, *_ = _told(client)
        _wait_until_told(client, number)
    os._exit(code)


def _watch_others() -> None:
    """Starts a thread that ends this process with the others."""
    left = threading.Event()
    thread = threading.Thread(target=_end_with_others, args=(left,), name="ending", daemon=True)
    thread.start()

    def leave():
        # Python ends threads when they return from C++ after its exit has begun, and C++ aborts the process for that.
        left.set()
        thread.join()

    atexit.register(leave)


def _end_with_others(left: threading.Event) -> None:
    """Waits until another process tells why it ends, then ends this one with the same code. Runs in a thread."""
    client, number = distributed.global_state.client, distributed.global_state.process_id
    told = None
    while not told:
        if left.wait(_POLL_S):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX itself ends the process if the store is lost
            told = _told(client)
    code, failed, reason = told
    if failed == number:
        return
    _one_ends.acquire()
    code = ExitCode(code)
    _say(code, f"{_name(number)}: {_name(failed)} has ended: {reason}")
    with contextlib.suppress(Exception):
        _wait_until_told(client, number)
    os._exit(code)


def _told(client) -> tuple[int, int, str] | None:
    """(exit code, number of the process that failed first, reason); None if none has."""
    entries = client.key_value_dir_get(_ENDING)
    return tuple(json.loads(entries[0][1])) if entries else None


def _wait_until_told(client, number: int) -> None:
    """Says that this process knows why the run ends. Process 0 waits for the others, as the store is lost with it."""
    client.key_value_set(f"{_TOLD}/{number}", "", allow_overwrite=True)
    if number:
        return
    deadline = time.monotonic() + _GOODBYE_S
    while time.monotonic() < deadline and len(client.key_value_dir_get(_TOLD)) < distributed.global_state.num_processes:
        time.sleep(0.05)
    time.sleep(0.2)  # until the others have ended: JAX would abort them without process 0


def _say(code: ExitCode, text: str) -> None:
    kind = "" if code in (ExitCode.STOPPED, ExitCode.INTERRUPTED) else "error: "
    again = "; start all processes again to go on" if code.restarts else ""
    print(f"{kind}{text}{again}", file=sys.stderr, flush=True)


def _name(number: int) -> str:
    return f"process {number} of {distributed.global_state.num_processes}"
