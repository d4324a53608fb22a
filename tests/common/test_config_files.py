"""Config files: where they are found, how the package installs them, and flags that name no field."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from memoryllm_jax.common import config_files
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import resolve

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.model.dimm=3", "config.model.dimm: no such field; did you mean dim?"),
        ("--config.steps.more=1", "config.steps.more: no such field; there are none below it"),
        ("--config=configs/tiny.py:flex-9", "config: expected the architecture base, memory or flex-B"),
        ("--config=configs/tyni.py", "config: expected FILE.py:ARCHITECTURE, found no file configs/tyni.py"),
    ],
)
def test_overrides_and_files_that_do_not_exist_are_refused(argument, message):
    with pytest.raises(UserError) as error:
        config_files.check_flags(["train", "--config=configs/tiny.py:base", argument])
    assert str(error.value).startswith(message)


def test_a_config_file_is_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.locate("configs/tiny.py:memory") == f"{ROOT}/configs/tiny.py:memory"
    assert resolve(config_files.load("configs/tiny.py:flex-3")).model.architecture == "flex-3"
    arguments = ["train", "--config", "configs/tiny.py:base", "--workdir=w"]
    assert config_files.check_flags(arguments) == [
        arguments[0],
        "--config",
        f"{ROOT}/configs/tiny.py:base",
        "--workdir=w",
    ]
    with pytest.raises(UserError) as error:
        config_files.locate("configs/other.py:memory")
    assert str(tmp_path) in str(error.value) and f"files, in {ROOT}, are configs/1b.py" in str(error.value)

    Path("configs").mkdir()
    shutil.copy(ROOT / "configs/1b.py", "configs/tiny.py")
    assert config_files.locate("configs/tiny.py:memory") == "configs/tiny.py:memory"  # the user's own comes first


def test_config_files_are_installed_with_the_package(tmp_path):
    for name in ("memoryllm_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
        page = (ROOT / "memoryllm_jax/server/page").iterdir()
        needed = {"evaluation/tasks/lambada_local.yaml", *(f"server/page/{entry.name}" for entry in page)}
        assert {f"memoryllm_jax/{name}" for name in needed} <= set(file.namelist())
    load = "c.load('configs/tiny.py:flex-3').model.dim"
    show = f"from memoryllm_jax.common import config_files as c; print(c.__file__, {load})"
    command = [sys.executable, "-c", show]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [f"{tmp_path}/installed/memoryllm_jax/common/config_files.py", "256"]
