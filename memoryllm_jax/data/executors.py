"""Runs one function over many tasks: in worker processes of this machine, or on a Dask cluster of several machines.

Both go through the interface of concurrent.futures.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import functools
import logging
import multiprocessing
import os
import queue
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from memoryllm_jax.common.errors import ArgumentError, UserError, one_line, require

T = TypeVar("T")
R = TypeVar("R")
Report = Callable[..., None]  # a function for progress; its arguments can be pickled

_POLL_S = 0.2  # seconds between two looks at progress while no task is finished
_CONNECT_S = 30  # seconds in which a scheduler must answer
_ADDRESS = re.compile(r"[a-z]+://.+:\d+")


def in_processes(
    work: Callable[[T, Report], R], tasks: Iterable[T], count: int, report: Report
) -> Iterator[tuple[T, R]]:
    """Yields (task, result) of `work(task, report)`, as tasks are finished in worker processes.

    Args:
      work: a function of a module. What it reports reaches `report` in this process.
      count: processes; with 1, this process does the work.
    Raises: UserError of the first task that fails; the others are not started then.
    """
    if count == 1:
        for task in tasks:
            yield task, work(task, report)
        return
    # Not "fork", which would copy JAX's locks but not the threads that hold them.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    # Not an Event, whose lock a killed worker could hold.
    stopped = context.RawValue("b", False)
    with concurrent.futures.ProcessPoolExecutor(count, context, _start_worker, (reports, stopped)) as pool:
        try:
            yield from _finished(pool, functools.partial(_in_worker, work), tasks, lambda: _drain(reports, report))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"a worker process was killed, perhaps for lack of memory; try fewer workers than {count}"
            ) from error
        finally:
            stopped.value = True  # after an error or Ctrl-C, no worker goes on to the end of its task


@contextlib.contextmanager
def connected(scheduler: str) -> Iterator:
    """Yields a connection to a Dask cluster, a distributed.Client; None for "".

    Args:
      scheduler: address of the cluster's scheduler, such as tcp://HOST:8786.
    Raises: UserError if the scheduler cannot be reached.
    """
    if not scheduler:
        yield None
        return
    distributed = require("distributed", "dask", "scheduler")
    # Clients with an address that Dask cannot parse are not closed for a minute.
    if not _ADDRESS.fullmatch(scheduler):
        raise ArgumentError("scheduler", f"expected tcp://HOST:PORT, found {scheduler!r}")
    for name in ("distributed.client", "distributed.utils"):
        # They log tracebacks of errors that they also raise, and that become one sentence here.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = distributed.Client(scheduler, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = one_line(error, 200) or type(error).__name__
        raise ArgumentError("scheduler", f"expected a Dask scheduler at {scheduler}: {reason}") from error
    with client:
        yield client


def on_cluster(work: Callable[[T, Report], R], tasks: Iterable[T], client) -> Iterator[tuple[T, R]]:
    """Yields (task, result) of `work(task, report)`, as tasks are finished by the workers of a Dask cluster.

    A worker that is lost is replaced by another one: `work` may run several times, even at the same time, for one task.

    Args:
      work: a function of a module of this package, which is installed on the workers. What it reports is dropped.
      client: of `connected`.
    Raises: UserError of the first task that fails, or if the connection is lost.
    """
    distributed = require("distributed", "dask", "scheduler")
    where = client.scheduler.address
    threads = client.nthreads()
    found = f"{len(threads)} workers with {sum(threads.values())} threads, one file each"
    print(f"{where}: {found if threads else 'waits for workers'}", flush=True)
    # pure=False: the results of an earlier run with equal arguments are not reused, as its files may be gone.
    with client.get_executor(pure=False) as pool:
        try:
            yield from _finished(pool, functools.partial(_on_host, work), tasks, lambda: None)
        except distributed.KilledWorker as error:
            problem = "several workers were killed at the same input file, perhaps for lack of memory"
            raise UserError(f"{where}: {problem}: {one_line(error, 200)}") from error
        except (concurrent.futures.CancelledError, distributed.CancelledError) as error:
            raise UserError(f"{where}: the connection was lost; run the same line again to go on") from error
        except (RuntimeError, ImportError) as error:
            if isinstance(error, RuntimeError) and "deserializ" not in str(error):
                raise
            problem = "expected this version of memoryllm_jax in the environment of the scheduler and of all workers"
            raise UserError(f"{where}: {problem}: {one_line(error, 200)}") from error


def _finished(pool: concurrent.futures.Executor, work, tasks, while_waiting: Callable[[], None]) -> Iterator[tuple]:
    """Yields (task, result) as tasks are finished. On an error or an interrupt, tasks that wait are cancelled."""
    # A queue that the futures fill: concurrent.futures.wait would look at all futures again for each that is finished.
    done: queue.SimpleQueue = queue.SimpleQueue()
    futures = {}
    try:
        for task in tasks:
            future = pool.submit(work, task)
            futures[future] = task
            future.add_done_callback(done.put)
        waiting = len(futures)
        while waiting:
            # The timeout lets progress be shown while no task is finished.
            try:
                future = done.get(timeout=_POLL_S)
            except queue.Empty:
                while_waiting()
                continue
            while_waiting()
            waiting -= 1
            yield futures[future], future.result()
    finally:
        # Leaving the executor's `with` block would first run all tasks that have not been started.
        for future in futures:
            future.cancel()


def _drain(reports: multiprocessing.Queue, report: Report) -> None:
    """Passes on all progress reports that the workers have sent."""
    while True:
        try:
            report(*reports.get_nowait())
        except queue.Empty:
            return


# In a worker process: the multiprocessing.Queue for progress, and the shared value that says whether to stop.
_reports = _stopped = None


def _start_worker(reports: multiprocessing.Queue, stopped) -> None:
    """Sets up a worker process, before it gets any task."""
    global _reports, _stopped

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    # A parent that is killed cannot stop its workers.
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent stops its workers
    # A worker normally waits at its end until its reports are read. A parent that fails no longer reads them.
    reports.cancel_join_thread()
    _reports, _stopped = reports, stopped


def _in_worker(work: Callable, task):
    """Runs a task in a worker process. It ends at its next report after the parent has failed or was interrupted."""

    def report(*progress):
        if _stopped.value:
            raise UserError("stopped")  # which nobody waits for
        _reports.put(progress)

    return work(task, report)


def _on_host(work: Callable, task):
    """Runs a task on a machine of the cluster. Its errors name the machine, which may lack a file that others have."""
    try:
        return work(task, lambda *progress: None)
    except UserError as error:
        raise UserError(f"{error} (worker on {socket.gethostname()})") from None
