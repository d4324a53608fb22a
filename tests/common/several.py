"""Runs of several processes that end in different ways, for test_hosts.py: prints [exit code, output] of each process.

Processes are forked before JAX is used, so that only one of them pays for the imports.

    python tests/common/several.py FOLDER
"""

import errno
import json
import os
import pathlib
import signal
import socket
import sys
import time

import jax
from lab import free_port

from memoryllm_jax.common import cli, hosts, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.hosts import HostOptions, StopSignal
from memoryllm_jax.config import default, resolve
from memoryllm_jax.training import loop

FOLDER = pathlib.Path(sys.argv[1])
WORKDIR = str(FOLDER / "w")
LOCK = storage.lock_folder(WORKDIR)
TAKEN = socket.create_server(("127.0.0.1", 0))


def fail_with(error):
    """A run whose last process fails while the others wait for it."""

    def run(is_last, stop):
        if is_last:
            raise error
        hosts.wait_for_all("a place that the last process does not reach")

    return run


def workdir_in_use(is_last, stop):
    loop.train(resolve(default("memory")), WORKDIR)


def compile_error(is_last, stop):
    with hosts.compiling("the training step"):
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with non-zero error code 2")


def killed(is_last, stop):
    hosts.wait_for_all("all are there")
    if is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    hosts.wait_for_all("a place that the last process does not reach")


def signal_at_once(is_last, stop):
    if is_last:
        signal.raise_signal(signal.SIGTERM)
    hosts.wait_for_all("a place that the last process does not reach")


def ctrl_c_in_steps(is_last, stop):
    stop.begin()
    for step in range(1, 1000):
        hosts.wait_for_all(f"step {step}")
        if is_last and step == 3:
            signal.raise_signal(signal.SIGINT)
        if stop.agreed():
            print(f"saved step {step}", flush=True)
            sys.exit(hosts.ExitCode.STOPPED)
        time.sleep(0.05)


def ctrl_c_twice(is_last, stop):
    stop.begin()
    hosts.wait_for_all("all are there")
    if is_last:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    hosts.wait_for_all("a place that the last process does not reach")


RUNS = {  # name: (number of processes, what each of them does)
    "user error": (4, fail_with(UserError("config.steps: expected at least 1, found 0"))),
    "workdir in use": (2, workdir_in_use),
    "compile error": (2, compile_error),
    "out of memory": (2, fail_with(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))),
    "storage": (2, fail_with(OSError(errno.ESTALE, "Stale file handle"))),
    "killed": (3, killed),
    "signal at once": (2, signal_at_once),
    "Ctrl-C in steps": (4, ctrl_c_in_steps),
    "Ctrl-C twice": (2, ctrl_c_twice),
    "port taken": (1, None),
}


def process(run, number: int, count: int, address: str, output: pathlib.Path) -> None:
    """One process of a run, from joining to its end, as a command."""
    file = os.open(output, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[1:] = []

    def main():
        HostOptions(True, address, count, number).join(lost_after_s=10)
        with hosts.ending_all():
            run(number == count - 1, StopSignal())

    cli.run(main)


def start(name: str) -> list[tuple[int, pathlib.Path]]:
    """Forks the processes of a run. Returns: (process id, file with the output) of each."""
    count, run = RUNS[name]
    port = TAKEN.getsockname()[1] if name == "port taken" else free_port()
    address = f"127.0.0.1:{port}"
    children = []
    for number in range(count):
        output = FOLDER / f"{name} {number}"
        child = os.fork()
        if not child:
            process(run, number, count, address, output)
        children.append((child, output))
    return children


if __name__ == "__main__":
    started = {name: start(name) for name in RUNS}
    ends = {}
    for name, children in started.items():
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
        ends[name] = [(code, output.read_text()) for code, (_, output) in zip(codes, children, strict=True)]
    print(json.dumps(ends))
