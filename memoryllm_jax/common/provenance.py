"""Which code computed something: the commit and the versions of the packages."""

import functools
import importlib.metadata
import os
import shutil
import subprocess

_PACKAGES = ("memoryllm_jax", "jax", "flax", "optax", "numpy", "scipy")
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def versions() -> dict[str, str]:
    """The versions of this package and of those that its numbers depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@functools.cache
def commit() -> str:
    """The commit of this package's checkout, with "-dirty" if files differ from it; "" if it is not in a checkout.

    The environment variable GIT_COMMIT says it where the checkout is not at hand.
    """
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    if not os.path.exists(os.path.join(_ROOT, ".git")) or shutil.which("git") is None:
        return ""
    command = ["git", "-C", _ROOT, "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode else done.stdout.strip()
