"""How a command ends: the table of exit codes, and which error has which code.

The launchers in launch/ and docs/pods.md act on this table; tests/launch/test_launch.py compares them with it.
"""

import enum
import errno
import re
from collections.abc import Iterator


class ExitCode(enum.IntEnum):
    """Exit codes."""

    restarts: bool  # whether launchers start the run again
    when: str  # what has the code, as docs/pods.md says it

    def __new__(cls, code: int, restarts: bool, when: str):
        member = int.__new__(cls, code)
        member._value_ = code
        member.restarts, member.when = restarts, when
        return member

    DONE = 0, False, "training is done"
    ERROR = 1, False, "an error that another start would meet again: a wrong config, damaged data, a full disk, a bug"
    COMPILATION = 70, False, "the step does not compile"
    OUT_OF_MEMORY = 71, False, "a device or the host has too little memory"
    DIVERGED = 72, False, "the loss or the gradient is not finite, or a spike, in more steps than may be skipped"
    STORAGE = 75, True, "storage or network failed for longer than it is retried"
    INTERRUPTED = 130, False, "stopped by a second Ctrl-C, without a checkpoint"  # 128 + SIGINT
    # 128 + SIGABRT: JAX itself ends a process by SIGABRT when it loses another one.
    LOST = 134, True, "another process or a device is lost"
    STOPPED = 143, True, "stopped by SIGTERM or Ctrl-C, after a checkpoint"  # 128 + SIGTERM


# Errors of a network, or of a file system behind one, that may pass. EIO is also that of a failing disk; a restart may
# then run on another machine. Not EAGAIN: a lock that another run holds has it. By name, as macOS lacks some.
_TRANSIENT_NAMES = (
    "EBUSY",
    "ECOMM",
    "ECONNABORTED",
    "ECONNREFUSED",
    "ECONNRESET",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "EIO",
    "ENETDOWN",
    "ENETRESET",
    "ENETUNREACH",
    "ENOLINK",
    "ENOTCONN",
    "EPIPE",
    "EREMOTEIO",
    "ESHUTDOWN",
    "ESTALE",
    "ETIMEDOUT",
)
_TRANSIENT = {getattr(errno, name) for name in _TRANSIENT_NAMES if hasattr(errno, name)}
# gcsfs, s3fs and the packages behind them, whose errors of the connection are no ConnectionError, and parts of the
# names of these errors and of their base classes.
_CLIENTS = {"aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3"}
_CONNECTION = re.compile(
    "Connect|Disconnect|Timeout|Transport|Payload|Protocol|ChunkedEncoding|IncompleteRead|HTTPClient|Checksum"
)
# TensorStore raises ValueError with the status of the storage service, or the number of the system's error.
_TENSORSTORE = re.compile(r"tensorstore_spec|source locations|os_error_code")
_STATUS = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): ")
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
# JAX has no error of its own for a lost process: each collective, barrier and look-up fails with another message. What
# they have in common is the library of the collectives, the coordination service, or the status. Orbax and the reading
# of an array raise some of them as ValueError.
_LOST = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|DATA_LOSS): |gloo|nccl|coordination|barrier|heartbeat|"
    "closed by peer|Connection reset|Connection refused|preempt",
    re.IGNORECASE,
)


def of(error: BaseException) -> ExitCode:
    """The exit code of a command that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    own = getattr(error, "exit_code", None)
    if isinstance(own, ExitCode):
        return own
    if is_out_of_memory(error):
        return ExitCode.OUT_OF_MEMORY
    return ExitCode.STORAGE if is_transient(error) else ExitCode.ERROR


def is_transient(error: BaseException) -> bool:
    """Whether storage or network is the cause of an error, in a way that may pass."""
    return any(_is_transient(cause) for cause in causes(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a device or the host has too little memory."""
    return isinstance(error, MemoryError) or (is_of_jax(error) and "RESOURCE_EXHAUSTED" in str(error))


def is_of_jax(error: BaseException) -> bool:
    """Whether JAX raised the error for what failed in a compiler, on a device or between processes."""
    return type(error).__name__ == "JaxRuntimeError"  # by name, so that commands without JAX do not load it


def of_lost_peer(error: BaseException) -> BaseException | None:
    """The error of one of several processes, or what caused it, that says that another process is lost; None: no."""
    for cause in causes(error):
        if not isinstance(cause, ValueError | RuntimeError) or is_out_of_memory(cause):  # JAX's is a RuntimeError
            continue
        if _LOST.search(str(cause)) and not _TENSORSTORE.search(str(cause)):
            return cause
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the one that caused it, and so on."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) in _TRANSIENT:
        return True
    status = str(getattr(error, "code", None) or getattr(error, "status", None))  # gcsfs.retry.HttpError; aiohttp
    if status.isdecimal() and (int(status) in (408, 429) or 500 <= int(status) < 600):
        return True
    if getattr(error, "retryable", False) is True or _is_of_connection(error):  # the first is google.auth's
        return True
    text = str(error)
    if not _TENSORSTORE.search(text):
        return False
    number = _OS_ERROR.search(text)
    return int(number[1]) in _TRANSIENT if number else bool(_STATUS.search(text))


def _is_of_connection(error: BaseException) -> bool:
    """Whether a package behind gcsfs or s3fs raised the error for a connection that failed."""
    kinds = [kind for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in _CLIENTS]
    return any(_CONNECTION.search(kind.__name__) for kind in kinds)
