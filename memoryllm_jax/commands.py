"""Command lines of several commands: python -m MODULE COMMAND [ARGUMENT ...] [--option=VALUE ...]."""

import inspect
import os
import sys
from collections.abc import Callable, Collection

from memoryllm_jax import cli
from memoryllm_jax.cli import UserError


def run(
    commands: Collection[str],
    define_flags: Callable[[str], None],
    main: Callable,
    text_of: Callable[[str], str] | None = None,
) -> None:
    """Runs `main([COMMAND, ARGUMENT, ...])` with the flags of the command that the line names.

    Args:
      text_of: what COMMAND --help says; by default what the module says.
    """
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        define_flags(sys.argv[1])
        if text_of:
            sys.modules["__main__"].__doc__ = text_of(sys.argv[1])
    elif not {"--help", "-h", "--helpfull"} & set(sys.argv):
        found = os.path.basename(sys.argv[1]) if len(sys.argv) > 1 else "nothing"
        print(f"error: expected one of {', '.join(commands)}, found {found}", file=sys.stderr)
        sys.exit(1)
    cli.run(main, positional=True)


def run_functions(module: str, functions: dict[str, Callable], define_flags, call: Callable[[str], str]) -> None:
    """As `run`, for functions whose docstrings are their --help, and which have no arguments but options.

    Args:
      call: runs a function with the flags' values; returns the line to print.
    """

    def main(arguments):
        if arguments[1:]:
            raise UserError(f"unexpected argument {arguments[1]!r}; options are written --name=value")
        print(call(arguments[0]))
        return 0

    def text_of(command):
        return f"python -m {module} {command} --workdir=DIR --output=DIR\n\n{inspect.getdoc(functions[command])}"

    run(functions, define_flags, main, text_of)


def options_of(function: Callable) -> dict[str, object]:
    """{name: default} of a function's parameters but the first two, which are what it looks at and its page."""
    return {name: p.default for name, p in list(inspect.signature(function).parameters.items())[2:]}
