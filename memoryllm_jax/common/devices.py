"""The devices that JAX finds, and the share of a GPU's memory that it takes.

The package asks for devices here and not JAX: where a GPU or TPU fails to initialise, JAX goes on with the CPU, and
logs the reason below the level that is shown.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Iterator

import jax
from jax._src import xla_bridge  # keeps the errors of devices that failed; jax has no public way to them

from memoryllm_jax.common.errors import UserError, one_line

# jax 0.10 to 0.12 read both names, of which the second is deprecated, and refuse to use a GPU if both are set.
_MEMORY_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_LOGGER = "jax._src.xla_bridge"  # which initialises the devices, and logs what goes wrong


def limit_gpu_memory(share: float) -> None:
    """Lets JAX reserve this share of each GPU's memory, unless the environment names one. Call before JAX is used."""
    if not any(os.environ.get(name) for name in _MEMORY_SHARES):
        os.environ[_MEMORY_SHARES[0]] = f"{share}"


def find() -> list[jax.Device]:
    """All devices, of all processes of the run.

    Raises: UserError if JAX finds CPUs alone, though a plugin for an accelerator is installed and JAX_PLATFORMS does
      not ask for the CPU.
    """
    _check()
    return jax.devices()


def find_local() -> list[jax.Device]:
    """The devices of this process. Raises: UserError, as `find`."""
    _check()
    return jax.local_devices()


@functools.cache
def _check() -> None:
    """Raises: UserError, as `find`. Looks once, as devices do not change while a process runs."""
    asked = _asked_platforms()
    if "cpu" in asked.split(","):
        return
    problem = ""
    with _said_by_jax() as said:
        try:
            if jax.default_backend() != "cpu":
                return
        except (RuntimeError, AssertionError) as error:  # a platform that JAX_PLATFORMS names cannot be used
            problem = one_line(error, 600)
    plugins = _plugins()
    if not (plugins or asked or problem):
        return  # a machine without accelerators
    wanted = f"JAX_PLATFORMS={asked} asks for one" if asked else f"there is {' and '.join(plugins)}"
    if not said:  # other code has used JAX before
        said = [text for platform, text in xla_bridge._backend_errors.items() if platform != "proxy"]
    reasons = [text.rstrip(".") for text in (*said, problem) if text] or ["it sees no such device"]
    raise UserError(
        f"JAX finds only CPUs, though {wanted}: {'; '.join(reasons)}; to use the CPU, set JAX_PLATFORMS=cpu"
    )


def _asked_platforms() -> str:
    """JAX_PLATFORMS, or what the program has set."""
    return jax.config.jax_platforms or ""


@contextlib.contextmanager
def _said_by_jax() -> Iterator[list[str]]:
    """Collects what JAX logs about devices that fail, each on one line, instead of showing it."""
    said = []

    class Collector(logging.Handler):
        def emit(self, record):
            error = record.exc_info and record.exc_info[1]
            text = f"{record.getMessage()}: {error}" if error else record.getMessage()
            # Without a proxy's address, jax 0.12 says at each start that it has none.
            if record.levelno >= logging.WARNING or re.search("Unable to initialize backend '(?!proxy)", text):
                said.append(" ".join(text.split())[:600])

    logger = logging.getLogger(_LOGGER)
    level, shown, collector = logger.level, logger.propagate, Collector()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(collector)
    try:
        yield said
    finally:
        logger.removeHandler(collector)
        logger.propagate = shown
        logger.setLevel(level)


def _plugins() -> list[str]:
    """The installed packages that give JAX an accelerator."""
    names = {entry.dist.name for entry in importlib.metadata.entry_points(group="jax_plugins") if entry.dist}
    if importlib.util.find_spec("libtpu"):
        names.add("libtpu")
    return sorted(names)
