"""Which error ends a command with which code."""

import errno

import aiohttp
import gcsfs.retry
import google.auth.exceptions
import jax
import pytest
import requests

from memoryllm_jax.common import exit_codes
from memoryllm_jax.common.errors import ArgumentError, CompilationError, UserError
from memoryllm_jax.common.exit_codes import ExitCode

# Messages as TensorStore 0.1.86 writes them
REFUSED = "UNAVAILABLE: Error reading \"state/d/1\" [source locations='tensorstore/kvstore/gcs/gcs_key_value_store.cc']"
STALE = "UNKNOWN: Error reading local file \"a\": Stale file handle [os_error_code='116'] [tensorstore_spec='{}']"
FULL = "RESOURCE_EXHAUSTED: Error writing \"a\": No space left on device [os_error_code='28'] [tensorstore_spec='{}']"


@pytest.mark.parametrize(
    "error, code",
    [
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (UserError("config.steps: expected at least 1, found 0"), ExitCode.ERROR),
        (ArgumentError("workdir", "expected a folder"), ExitCode.ERROR),
        (ValueError("a bug"), ExitCode.ERROR),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.ERROR),
        (FileNotFoundError("no such bucket"), ExitCode.ERROR),
        (BlockingIOError(errno.EAGAIN, "locked by another run"), ExitCode.ERROR),
        (OSError(errno.ESTALE, "Stale file handle"), ExitCode.STORAGE),
        (TimeoutError(), ExitCode.STORAGE),
        (gcsfs.retry.HttpError({"code": 503, "message": "unavailable"}), ExitCode.STORAGE),
        (gcsfs.retry.HttpError({"code": 403, "message": "forbidden"}), ExitCode.ERROR),
        (gcsfs.retry.HttpError({"code": "503"}), ExitCode.STORAGE),
        (gcsfs.retry.ChecksumError(), ExitCode.STORAGE),
        (aiohttp.ServerDisconnectedError(), ExitCode.STORAGE),
        (requests.exceptions.ProxyError(), ExitCode.STORAGE),  # a connection's by its base class
        (requests.exceptions.InvalidURL(), ExitCode.ERROR),
        (google.auth.exceptions.RefreshError("the metadata server is busy", retryable=True), ExitCode.STORAGE),
        (google.auth.exceptions.RefreshError("the key is revoked"), ExitCode.ERROR),
        (ValueError(REFUSED), ExitCode.STORAGE),
        (ValueError(STALE), ExitCode.STORAGE),
        (ValueError(FULL), ExitCode.ERROR),
        (MemoryError(), ExitCode.OUT_OF_MEMORY),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), ExitCode.OUT_OF_MEMORY),
        (CompilationError("the step does not compile"), ExitCode.COMPILATION),
    ],
)
def test_codes(error, code):
    """Also of a UserError that another error caused: it decides whether another start would meet it again."""
    assert exit_codes.of(error) == code
    if isinstance(error, Exception) and code in (ExitCode.ERROR, ExitCode.STORAGE):
        explained = UserError("DIR: cannot be read")
        explained.__cause__ = error
        assert exit_codes.of(explained) == code


@pytest.mark.parametrize(
    "error, lost",
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: save_1"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: NCCL ran out of memory"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with non-zero error code 2"), False),
        (ValueError(REFUSED), False),
        (ConnectionResetError("of the storage"), False),
        (ValueError("a bug"), False),
    ],
)
def test_a_lost_process_is_recognised_by_what_collectives_say(error, lost):
    wrapped = UserError("DIR: expected a folder for checkpoints")
    wrapped.__cause__ = error
    assert exit_codes.of_lost_peer(wrapped) is (error if lost else None)
