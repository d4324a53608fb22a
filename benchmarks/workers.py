"""Measurements in processes of their own, which take turns: a benchmark starts itself again with --worker=SIDE.

Such a process prints one line of JSON when it is ready, and one for each line of its input. Each of these asks for a
round, and is JSON too: the round's arguments.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from memoryllm_jax.common.errors import UserError


class FailedError(UserError):
    """A worker ended. The message has its exit code, and the last line that it wrote to stderr."""


class Worker:
    """A process that measures one side.

    Args:
      side: what it measures.
      arguments: arguments besides those of this process; of two with one name the last counts.
      environment: variables besides those of this process.
    """

    def __init__(self, side: str, arguments: tuple[str, ...] = (), environment: dict[str, str] | None = None):
        self._side, self._errors = side, tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv, *arguments, f"--worker={side}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | (environment or {}),
        )

    def read(self) -> dict:
        """The next line that the process prints. Raises: FailedError if it ended."""
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        raise FailedError(f"{self._side}: exit code {code}: {last_line(self._errors.read())}")

    def round(self, **arguments) -> dict:
        """Asks for a round. Returns: its figures. Raises: FailedError if the process ended."""
        with contextlib.suppress(BrokenPipeError):  # `read` says why
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        return self.read()

    def end(self) -> None:
        """Ends the process and waits for it."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        self._process.wait()


def last_line(text: str) -> str:
    """The last line that is not empty, of what a process wrote to stderr: there Python says why it ends."""
    return text.strip().rpartition("\n")[2].strip()[:300] or "nothing was written"


def serve(prepare: Callable[[], tuple[dict, Callable[..., dict]]]) -> None:
    """Answers as a worker, until the input ends.

    Args:
      prepare: returns what is printed first, and a function that measures a round with its arguments and returns its
        figures.
    """
    # Libraries may print to stdout: it is redirected to stderr, and only this function writes to the pipe.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    facts, measure = prepare()
    print(json.dumps(facts), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), file=out, flush=True)
