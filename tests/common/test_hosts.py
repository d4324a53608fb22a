"""Stop signals, compilation, and how a process finds the others. tests/test_train.py has several processes."""

import json
import os
import re
import signal
import subprocess
import sys

import jax
import pytest
from lab import with_devices

from memoryllm_jax.common import hosts
from memoryllm_jax.common.errors import ArgumentError, CompilationError, LostError, OutOfMemoryError, UserError
from memoryllm_jax.common.exit_codes import ExitCode


@pytest.mark.parametrize(
    "text, kind",
    [
        ("INTERNAL: ptxas exited with non-zero error code 2", CompilationError),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.",
            OutOfMemoryError,
        ),
    ],
)
def test_an_error_of_the_compiler_names_what_it_compiled(text, kind):
    with pytest.raises(kind, match=r"^the training step.*: [A-Z_]+: "), hosts.compiling("the training step"):
        raise jax.errors.JaxRuntimeError(text)


def test_a_single_process_raises_what_ends_it():
    """A failed device may work again at another start; an error that says what is wrong stays as it is."""
    with pytest.raises(LostError, match=r"^a device has failed: INTERNAL: CUDA_ERR"), hosts.ending_all():
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(UserError, match=r"^config.steps: "), hosts.ending_all():
        raise UserError("config.steps: expected at least 1, found 0")


def test_a_signal_is_remembered_and_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    stop = hosts.StopSignal()
    try:
        assert not stop.now() and not stop.agreed()
        signal.raise_signal(signal.SIGTERM)
        assert stop.now() and stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGINT) == before


def test_several_processes_end_with_one_code_and_one_sentence(tmp_path):
    """Whatever ends one of two or four processes, within seconds. Only one that is killed has no time to say why."""
    command = [sys.executable, f"{os.path.dirname(__file__)}/several.py", str(tmp_path)]
    env = with_devices(1) | {"PYTHONPATH": ":".join(sys.path)}  # where this process finds the tests' helpers
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert {name: [code for code, _ in processes] for name, processes in ends.items()} == {
        "user error": [ExitCode.ERROR] * 4,
        "workdir in use": [ExitCode.ERROR] * 2,
        "compile error": [ExitCode.COMPILATION] * 2,
        "out of memory": [ExitCode.OUT_OF_MEMORY] * 2,
        "storage": [ExitCode.STORAGE] * 2,
        "killed": [ExitCode.LOST, ExitCode.LOST, -signal.SIGKILL],
        "signal at once": [ExitCode.STOPPED] * 2,
        "Ctrl-C in steps": [ExitCode.STOPPED] * 4,
        "Ctrl-C twice": [ExitCode.INTERRUPTED] * 2,
        "port taken": [ExitCode.ERROR],
    }
    first, second = (text for _, text in ends["workdir in use"])
    reason = f"{tmp_path}/w: in use by another run"
    assert (
        f"error: process 0 of 2: {reason}" in first
        and f"error: process 1 of 2: process 0 of 2 has ended: {reason}" in second
    )
    for number, (_, text) in enumerate(ends["killed"][:2]):  # the first one to notice tells the other
        assert re.search(rf"error: process {number} of 3: .*another process has ended, or cannot be reached: ", text)
    assert len({re.search(r"saved step \d+", text)[0] for _, text in ends["Ctrl-C in steps"]}) == 1
    assert "coordinator: expected a free port of this machine" in ends["port taken"][0][1]
    assert not any("Fatal" in text or "Traceback" in text for processes in ends.values() for _, text in processes)


def test_errors_of_joining_name_the_option():
    hosts.HostOptions().join()  # without --multihost it does nothing
    with pytest.raises(ArgumentError, match=r"^multihost: "):
        hosts.HostOptions(multihost=True).join()
    with pytest.raises(ArgumentError, match=r"^num_processes: expected at least 1, found 0$"):
        hosts.HostOptions(multihost=True, num_processes=0)
