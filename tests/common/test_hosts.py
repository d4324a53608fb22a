"""Stop signals, compilation, and how a process finds the others. tests/test_train.py has several processes."""

import signal

import jax
import pytest

from memoryllm_jax.common import hosts
from memoryllm_jax.common.errors import ArgumentError, CompilationError, LostError, OutOfMemoryError, UserError


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


def test_errors_of_joining_name_the_option():
    hosts.HostOptions().join()  # without --multihost it does nothing
    with pytest.raises(ArgumentError, match=r"^multihost: "):
        hosts.HostOptions(multihost=True).join()
    with pytest.raises(ArgumentError, match=r"^num_processes: expected at least 1, found 0$"):
        hosts.HostOptions(multihost=True, num_processes=0)
