"""The compile cache: where it is, who uses it, and entries that are damaged or too many."""

import os
import pathlib
import subprocess
import sys

import pytest
from lab import with_devices

from memoryllm_jax.common import compile_cache

COMMAND = """
import jax, jax.numpy as jnp
from memoryllm_jax.common import cli
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
def main() -> None:
    print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.eye(3))[0, 0])
cli.run(main)
"""


def run(home, *options, **variables):
    """Runs a small command with this home folder. Returns: (entries of its cache, what it wrote on stderr)."""
    env = {name: value for name, value in with_devices(1).items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": "", "PYTHONPATH": os.getcwd()} | variables
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *options], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0.84147096\n"
    return sorted(home.rglob("*-cache")), done.stderr


def test_compiled_functions_stay_in_the_users_cache_folder(tmp_path):
    home, other, own = (tmp_path / name for name in ("home", "other", "own"))
    for folder in (home, other, own):
        folder.mkdir()
    entries, errors = run(home)
    folder = home / ".cache/memoryllm_jax/compiled"
    assert entries and not errors and all(entry.parent.parent == folder for entry in entries)
    assert run(other, XLA_FLAGS="--xla_force_host_platform_device_count=8") == ([], "")
    assert folder.stat().st_mode & 0o777 == 0o700

    # Half an entry, as of a process that was killed in a write, is removed at its first use, and written anew.
    whole = {entry: entry.read_bytes() for entry in entries}
    for entry, data in whole.items():
        entry.write_bytes(data[: len(data) // 2])
    found, errors = run(home)
    assert found == entries and not errors and all(len(e.read_bytes()) > len(d) // 2 for e, d in whole.items())

    assert run(other, "--nocompile_cache") == ([], "")
    assert run(other, JAX_COMPILATION_CACHE_DIR=str(own)) == ([], "")
    assert list(own.glob("*-cache"))


@pytest.mark.parametrize("problem", ["Not a directory", "other users can write to it"])
def test_a_folder_that_is_not_safe_is_not_used(tmp_path, monkeypatch, capsys, problem):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests emulate devices
    folder = tmp_path / "memoryllm_jax/compiled"
    if problem == "Not a directory":
        (tmp_path / "memoryllm_jax").write_text("a file")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compile_cache.folder().parent.parent == pathlib.Path.home() / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.use()
    expected = f"compile cache: {folder} cannot be used ({problem}); set JAX_COMPILATION_CACHE_DIR, or say "
    assert capsys.readouterr().err == f"{expected}--nocompile_cache\n"


def test_what_was_not_used_for_longest_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_MOST_BYTES", 25)
    for name, used in (("a", 3), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / f"{name}-cache"
        path.write_bytes(b"0123456789")
        os.utime(path, (used, used))
    compile_cache._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*-cache")) == ["a-cache", "c-cache"]
