"""Stop signals, exit codes, and how a process finds the others."""

import os
import signal
import sys

import jax
import pytest

from memoryllm_jax.common import hosts
from memoryllm_jax.common.errors import ArgumentError, UserError


def test_only_the_loss_of_another_process_exits_with_134(capfd, monkeypatch):
    """A lack of memory, a bug and a user's mistake exit with 1, as another start would fail in the same way."""
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


def test_a_signal_is_remembered_and_a_second_ctrl_c_interrupts():
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


def test_ctrl_c_at_one_of_several_processes_is_sigterm_and_a_second_one_ends_it(monkeypatch):
    """JAX tells all processes of a SIGTERM. Between steps they cannot agree, so `now` stays false."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    seen, codes = [], []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    stop = hosts.StopSignal()
    try:
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGTERM] and not stop.now()
        with pytest.raises(KeyboardInterrupt) as interrupt:
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
        signal.signal(signal.SIGTERM, before)
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code) or sys.exit())
    with pytest.raises(SystemExit):
        hosts.abandon(interrupt.value)
    assert codes == [130]


def test_errors_of_joining_name_the_option():
    hosts.HostOptions().join()  # without --multihost it does nothing
    with pytest.raises(ArgumentError, match=r"^multihost: "):
        hosts.HostOptions(multihost=True).join()
    with pytest.raises(ArgumentError, match=r"^num_processes: expected at least 1, found 0$"):
        hosts.HostOptions(multihost=True, num_processes=0)
