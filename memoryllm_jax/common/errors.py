"""Errors that users can fix, and imports that need an optional extra."""

import importlib
import types

from memoryllm_jax.common.exit_codes import ExitCode


class UserError(Exception):
    """Bad input or a problem of the environment. Its text is one sentence for the user; no traceback is shown."""

    exit_code: ExitCode | None = None  # None: it follows from what caused the error (exit_codes.of)


class CompilationError(UserError):
    """XLA refuses a program: another start would meet the same error."""

    exit_code = ExitCode.COMPILATION


class OutOfMemoryError(UserError):
    """A device or the host has too little memory."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DivergedError(UserError):
    """The loss of a training run is not finite: another start would meet the same step."""

    exit_code = ExitCode.DIVERGED


class LostError(UserError):
    """Another process of the run or a device is lost: another start may find it again."""

    exit_code = ExitCode.LOST


class ArgumentError(UserError):
    """A bad value of one argument of a function or command.

    Args:
      name: the argument's name without dashes; `cli.run` adds them if it is a flag.
      problem: what was expected and what was found.
    """

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}: {problem}")
        self.name, self.problem = name, problem

    def __reduce__(self):
        # Worker processes send their errors; by default an exception is rebuilt from its text alone.
        return ArgumentError, (self.name, self.problem)


def one_line(error: Exception, most: int | None = None) -> str:
    """The text of an error without line breaks, as a clause of another message; at most `most` characters."""
    return " ".join(str(error).split())[:most]


def shown(value, most: int = 60) -> str:
    """A value as a message shows it, at most `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def require(module: str, extra: str, what: str) -> types.ModuleType:
    """Imports a module of a package that only an optional extra installs.

    Args:
      module: its full name, such as "pyarrow.parquet".
      extra: the extra of memoryllm_jax that installs the package.
      what: what needs the module, as the message begins: "pictures".
    Raises: UserError that names package and extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        # The message includes `error`, as the package may be installed and one of its dependencies missing.
        raise UserError(f"{what}: needs {package}: pip install 'memoryllm_jax[{extra}]' ({error})") from error
