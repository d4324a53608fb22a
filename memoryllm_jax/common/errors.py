"""Errors that people cause and can mend, and imports that need an optional extra."""

import importlib
import types


class UserError(Exception):
    """Bad input. Its text is one sentence for the person who gave it."""


class ArgumentError(UserError):
    """A bad value of one argument: of a function for those who call it, of a flag for those who type it.

    Args:
      name: of the argument, without dashes: `cli.run` adds them where it is a flag.
      problem: what was expected and what was found.
    """

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}: {problem}")
        self.name = name


def require(module: str, extra: str, what: str) -> types.ModuleType:
    """The module, of a package that only an optional extra installs.

    Args:
      what: the thing that needs it, as the message begins: "pictures".
    Raises: UserError that names package and extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        # The package may be there, and one that it needs be missing: `error` says which.
        raise UserError(f"{what}: needs {package}: pip install 'memoryllm_jax[{extra}]' ({error})") from error
