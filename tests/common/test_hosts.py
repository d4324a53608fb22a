"""Stop signals, exit codes, and how a process finds the others."""

import os
import signal

import jax
import pytest

from memoryllm_jax.common import hosts
from memoryllm_jax.common.errors import ArgumentError, UserError


def test_exit_codes_of_processes_that_are_left(capfd, monkeypatch):
    """134 only for what JAX raises when another process is gone; a lack of memory is the run's own."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    for error in (
        jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"),
        OSError(28, "No space left on device"),
        ValueError("a bug"),
        UserError("config.steps: expected at least 1, found 0"),
    ):
        hosts.abandon(error)
    assert codes == [134, 1, 1, 1, 1]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: process 0 of 1: ")]
    assert len(lines) == 5 and "another process has ended" in lines[0] and "No space left" in lines[2]


def test_a_signal_is_noted_a_second_ctrl_c_interrupts_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    stop = hosts.StopSignal()
    try:
        assert not stop.now() and not stop.after_step(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.now() and stop.after_step(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGINT) == before


def test_processes_that_cannot_be_joined_are_named_by_the_option():
    hosts.HostOptions().join()  # alone, there is nothing to join
    with pytest.raises(ArgumentError, match=r"^multihost: "):
        hosts.HostOptions(multihost=True).join()
    with pytest.raises(ArgumentError, match=r"^num_processes: expected at least 1, found 0$"):
        hosts.HostOptions(multihost=True, num_processes=0)
