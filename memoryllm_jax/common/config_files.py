"""Config files: where they are found, how they are run, and the check of the flags that override their fields."""

import re
import runpy
from pathlib import Path

import ml_collections

from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.fields import did_you_mean


def _installed() -> Path:
    """The folder of the package's own config files: inside the package if it is installed, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def locate(path: str, argument: str = "config", folder: str = "configs") -> str:
    """Replaces FILE in `FILE.py:ARCHITECTURE` by the path where it is found.

    `configs/NAME.py` is looked for in the current folder, and then among the package's own config files.

    Args:
      argument: name of the argument that the path comes from.
      folder: `configs`, or a folder inside of it, whose files the package has too.
    Raises: ArgumentError that names both places.
    """
    name, colon, architecture = path.partition(":")
    if Path(name).is_file():
        return path
    own = _installed().parent / folder
    installed = own / Path(name).name
    if Path(name).parent == Path(folder) and installed.is_file():
        return f"{installed}{colon}{architecture}"
    known = ", ".join(f"{folder}/{file.name}" for file in sorted(own.glob("*.py")))
    form = "FILE.py:ARCHITECTURE" if argument == "config" else "FILE.py"
    raise ArgumentError(
        argument,
        f"expected {form}, found no file {name} in {Path.cwd()}; the package's own files, "
        f"in {_installed().parent}, are {known}",
    )


def load(path: str) -> ml_collections.ConfigDict:
    """The config of `FILE.py:ARCHITECTURE`, before any override. Raises: UserError."""
    name, _, architecture = locate(path).partition(":")
    arguments = [architecture] if architecture else []
    try:
        return runpy.run_path(name)["get_config"](*arguments)
    except UserError:
        raise
    except Exception as error:
        problem = f"expected a file whose get_config() returns a config, found {path}: {type(error).__name__}: {error}"
        raise ArgumentError("config", problem) from error


def check_flags(argv: list[str]) -> list[str]:
    """Locates the config file in the arguments and checks that overridden fields exist.

    Missing files and unknown fields are refused here, as the messages of config_flags do not name them.
    Args:
      argv: the command line, with --config=FILE.py:ARCHITECTURE and --config.FIELD=VALUE among others.
    Returns: the arguments, with the path where the config file was found.
    Raises: UserError that names the file or field.
    """
    argv = list(argv)
    config = None
    for at, argument in enumerate(argv):
        if match := re.fullmatch("(--?config=)(.*)", argument):
            argv[at], config = match[1] + locate(match[2]), load(match[2])
        elif re.fullmatch("--?config", argument) and at + 1 < len(argv):
            argv[at + 1], config = locate(argv[at + 1]), load(argv[at + 1])
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)  # --noconfig.FIELD sets a boolean field to false
        if match and config is not None:
            check_field(config, match[1])
    return argv


def check_field(config: ml_collections.ConfigDict, path: str) -> None:
    """Raises: UserError if the config has no field with the dotted name `path`."""
    node, seen = config, "config"
    for name in path.split("."):
        names = list(node.keys()) if isinstance(node, ml_collections.ConfigDict) else []
        if name not in names:
            raise UserError(f"{seen}.{name}: no such field{did_you_mean(name, names)}")
        node, seen = node[name], f"{seen}.{name}"
