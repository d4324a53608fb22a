"""The compile cache: compiled functions stay in the user's cache folder, so that later commands need not compile them.

JAX writes the cache, and what a function computes does not depend on it. JAX's own variable JAX_COMPILATION_CACHE_DIR
comes first: then nothing here changes any setting.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import sys
import warnings
from collections.abc import Callable

from memoryllm_jax.common.errors import one_line

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_MOST_BYTES = 1 << 30  # what stays in the folder when a command starts
# A start compiles many functions that take less than a second each, which is JAX's default.
_LEAST_COMPILE_S = 0.05
_SUFFIX = "-cache"  # of the files that JAX writes
# With several emulated devices, a function for them that comes from the cache can compute wrong values, or crash. Seen
# with jaxlib 0.10 and 0.12 and the training step of ple-3 on a mesh of 2 x 2 x 2, which is right without a cache.
_EMULATED_DEVICES = re.compile(r"xla_force_host_platform_device_count=(?!1\b)\d")


def use(enabled: bool = True, several_processes: bool = False) -> None:
    """Chooses the compile cache of this process. Call it before anything is compiled.

    Args:
      enabled: False: nothing is read from a cache nor written to one, not even the one of JAX's variable.
      several_processes: whether the process is one of several of a run. They have no cache unless JAX's variable names
        one: only the first process writes, so where each host has its own folder the first would find functions that
        the others have to compile, and on GPUs these would wait for its share of the autotuning without end.
    """
    import jax

    if not enabled:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # for processes that this one starts
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if os.environ.get(_VARIABLE) or several_processes or _EMULATED_DEVICES.search(os.environ.get("XLA_FLAGS", "")):
        return
    path = folder()
    try:
        _check_own(path)
        _prune(path)
    except OSError as error:
        print(
            f"compile cache: {path} cannot be used ({error.strerror}); set {_VARIABLE}, or say --nocompile_cache",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path / _machine()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_COMPILE_S)
    warnings.showwarning = _without_damaged_entries(warnings.showwarning, path / _machine())


def folder() -> pathlib.Path:
    """The folder of the cache, by the conventions of the platform."""
    home = pathlib.Path(os.path.expanduser("~"))
    default = home / "Library/Caches" if sys.platform == "darwin" else home / ".cache"
    asked = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))  # its specification says to ignore a relative path
    return (asked if asked.is_absolute() else default) / "memoryllm_jax" / "compiled"


def _check_own(path: pathlib.Path) -> None:
    """Creates the folder for this user alone. Raises: OSError if it cannot be written, or is not this user's alone.

    Compiled functions are code, which runs with the rights of whoever reads them.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(1, "it belongs to another user")
    if status.st_mode & 0o022:
        raise PermissionError(1, "other users can write to it")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(1, "it cannot be written")


def _prune(path: pathlib.Path) -> None:
    """Removes the files that were not used for longest, until _MOST_BYTES are left.

    JAX's own limit needs a package that it does not require, and stops all writes after a process is killed in a write
    (jax-ml/jax#39880).
    """
    found = []
    for file in path.glob(f"*/*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            status = file.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= _MOST_BYTES:
            break
        file.unlink(missing_ok=True)  # a process that is reading it keeps it open
        total -= size


def _machine() -> str:
    """A name of the processor: JAX's keys leave out its features, and code for one may not run on another.

    Machines of several kinds may share a home folder.
    """
    facts = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        first = file.read().partition("\n\n")[0].splitlines()
        facts += [
            line for line in first if line.startswith(("vendor_id", "model name", "flags", "Features", "CPU part"))
        ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _without_damaged_entries(show: Callable, path: pathlib.Path) -> Callable:
    """The function that shows warnings, which removes entries that JAX could not read or write.

    JAX does not write atomically, so a process that is killed, or a full disk, leaves half an entry. JAX compiles anew
    then, but never replaces the entry.
    """

    told = False

    def call(message, category, filename, lineno, file=None, line=None):
        nonlocal told
        found = re.match(r"Error (reading|writing) persistent compilation cache entry for '(\w+)'", str(message))
        if not found:
            show(message, category, filename, lineno, file, line)
            return
        for entry in path.glob(f"{found[2]}-*{_SUFFIX}"):  # JAX names the function, not the entry
            entry.unlink(missing_ok=True)
        if found[1] == "writing" and not told:  # once: a full disk fails for each function
            told = True
            print(f"compile cache: {path} cannot be written ({one_line(message, 200)})", file=sys.stderr)

    return call
