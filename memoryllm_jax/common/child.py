"""A command that runs in a process of its own and does not outlive this one."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


def run(command: list[str]) -> int:
    """Runs a command until it ends. SIGTERM and SIGINT to this process become SIGTERM to the command.

    Returns: its exit code; if a signal ended it, 128 + the signal's number, as in shells.
    """
    process = None
    stopped = False

    def stop(number, frame):
        # `train` saves its state before it ends, so this process goes on to wait for it.
        nonlocal stopped
        stopped = True
        if process is not None:
            process.terminate()

    # On Ctrl-C a terminal sends SIGINT to both processes. `train` may get SIGTERM after it: only a second SIGINT makes
    # it end without saving.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command, preexec_fn=end_with_parent())
        if stopped:  # while the process was being started
            process.terminate()
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def end_with_parent() -> Callable[[], None] | None:
    """The `preexec_fn` by which a child ends when this process is killed by SIGKILL.

    Linux then sends it SIGTERM. Other systems have nothing like that: there, the child would run on.
    """
    if sys.platform != "linux":
        return None
    # Loaded here, as little may be done between fork and exec.
    libc, parent = ctypes.CDLL(None), os.getpid()

    def ask():
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # which was killed before this process could ask
            os._exit(128 + signal.SIGTERM)

    return ask
