"""An accelerator that cannot be used is an error, and no run on the CPU."""

import contextlib
import importlib.metadata
import logging
import os
import pathlib
import re

import jax
import pytest

from memoryllm_jax.checkpoint import reader
from memoryllm_jax.common import devices
from memoryllm_jax.common.errors import UserError


class Plugin:
    """An entry point of an installed package."""

    dist = type("Distribution", (), {"name": "jax-cuda13-plugin"})


def initialise(backend):
    """Acts as JAX where a GPU fails to initialise."""

    def default_backend():
        logging.getLogger("jax._src.xla_bridge").info("Unable to initialize backend 'cuda': NOT_FOUND: no device.")
        return backend

    return default_backend


@pytest.mark.parametrize(
    "plugins, platforms, backend, message",
    [
        (
            [Plugin],
            "",
            "cpu",
            "though there is jax-cuda13-plugin: .* NOT_FOUND: no device; .*=cpu$",
        ),
        ([Plugin], "", "gpu", None),
        ([Plugin], "cpu", "cpu", None),
        ([], "", "cpu", None),
        ([], "cuda", "cpu", "though JAX_PLATFORMS=cuda asks for one: "),
    ],
)
def test_no_cpu_in_place_of_an_accelerator(monkeypatch, plugins, platforms, backend, message, caplog):
    """The reason is what JAX logs, below the level that is shown."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jax, "default_backend", initialise(backend))
    monkeypatch.setattr(devices, "_asked_platforms", lambda: platforms)
    devices._check.cache_clear()
    try:
        with (
            pytest.raises(UserError, match=f"^JAX finds only CPUs, {message}") if message else contextlib.nullcontext()
        ):
            devices._check()
    finally:
        devices._check.cache_clear()
    assert not caplog.records


@pytest.mark.parametrize("given", [{}, {"XLA_CLIENT_MEM_FRACTION": ".5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}])
def test_a_share_of_memory_that_the_user_sets_stays(monkeypatch, given):
    """JAX refuses to use a GPU if both variables are set."""
    for name in devices._MEMORY_SHARES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    devices.limit_gpu_memory(0.9)
    found = {name: os.environ[name] for name in devices._MEMORY_SHARES if name in os.environ}
    assert found == (given or {"XLA_CLIENT_MEM_FRACTION": "0.9"})


def test_the_package_asks_for_devices_here_alone():
    package = pathlib.Path(devices.__file__).parents[1]
    asking = [path.name for path in package.rglob("*.py") if re.search(r"jax\.(local_)?devices\(", path.read_text())]
    assert set(asking) <= {"devices.py", "chips.py"}  # chips.py asks for the CPUs of a dry run


def test_checkpoints_are_opened_only_where_the_devices_are_usable(monkeypatch):
    """Orbax asks JAX for devices too, and fails with a traceback where JAX has none."""

    def find():
        raise UserError("no GPU")

    monkeypatch.setattr(devices, "find", find)
    monkeypatch.setattr(reader.ocp, "PyTreeCheckpointer", lambda: pytest.fail("Orbax asked first"))
    with pytest.raises(UserError, match="no GPU"):
        reader.Reader("DIR")
