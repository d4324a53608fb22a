"""Commands that run in processes of their own and do not outlive this one."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
_POLL_S = 0.05


class Children:
    """Commands that run side by side; a context manager, to be used in the main thread.

    Inside of it, SIGTERM and SIGINT to this process become SIGTERM to all commands. At its end, those that still run
    get SIGTERM and are waited for: `train` saves its state before it ends.

    Attributes:
      stopped: whether a signal arrived. Nothing should be started then.
    """

    def __init__(self):
        self.stopped = False
        self._running: list[subprocess.Popen] = []

    def __enter__(self):
        def stop(number, frame):
            self.stopped = True
            self.terminate()

        # On Ctrl-C a terminal sends SIGINT to all processes. `train` may get SIGTERM after it: only a second SIGINT
        # makes it end without saving.
        self._before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        self.terminate()
        for process in self._running:
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __len__(self) -> int:
        return len(self._running)

    def start(self, command: list[str], **options) -> subprocess.Popen:
        """Starts a command. Options are those of subprocess.Popen."""
        process = subprocess.Popen(command, preexec_fn=end_with_parent(), **options)
        self._running.append(process)
        if self.stopped:  # while it was being started
            process.terminate()
        return process

    def terminate(self) -> None:
        """Sends SIGTERM to all commands."""
        for process in self._running:
            process.terminate()

    def wait(self) -> tuple[subprocess.Popen, int]:
        """Waits until a command ends.

        Returns: its process, and its exit code; if a signal ended it, 128 + the signal's number, as in shells.
        """
        while True:
            for process in self._running:
                code = process.poll()
                if code is not None:
                    self._running.remove(process)
                    return process, code if code >= 0 else 128 - code
            time.sleep(_POLL_S)


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
