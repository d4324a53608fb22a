"""Command lines: flags in, one call, exit code out.

`run(main)` turns one function into a command, `run_commands` several functions into a command with subcommands. The
flags follow from the functions' signatures (common/options.py).
"""

import inspect
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated

from absl import app, flags, logging

from memoryllm_jax.common import exit_codes, options
from memoryllm_jax.common.compile_cache import use as use_compile_cache
from memoryllm_jax.common.errors import ArgumentError, UserError, one_line
from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.common.options import Option

flags.disclaim_key_flags()  # flags that are defined here belong to the command: its --help lists them

_HELP = {"--help", "-h", "-help", "--helpfull"}


def run(
    main: Callable[..., int | None], check: Callable[[list[str]], list[str]] | None = None, computes: bool = True
) -> None:
    """Runs `main(**options)` as an absl command; a `UserError` becomes one line on stderr and an exit code.

    Args:
      check: takes the arguments and returns the ones for absl to parse. It raises `UserError` where absl's own message
        would not help.
      computes: whether the command uses JAX, so that it has the option of the compile cache.
    """
    options.define(main)
    if computes:
        options.define(_use_compile_cache)

    def call(positional):
        if positional:
            raise UserError(f"unexpected argument {positional[0]!r}; options are written --name=value")
        chosen = options.values(main)
        if computes:
            _use_compile_cache(**options.values(_use_compile_cache))
        return main(**chosen)

    _run(call, check)


def run_commands(commands: Mapping[str, Callable], through: Callable[[str], Callable] | None = None) -> None:
    """Runs the function that the command line names: python -m MODULE COMMAND [ARGUMENT ...] [--option=VALUE ...].

    COMMAND --help prints the function's docstring. Parameters without an `Option` are positional arguments.

    Args:
      commands: {COMMAND: its function}. A text that it returns is printed.
      through: maps COMMAND to a function that runs it and has further options of its own. It is called as
        f(COMMAND, **options) with its options and those of the command; then there are no positional arguments.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    targets = [commands[name]] if name in commands else []
    if targets:
        if through:
            targets.insert(0, through(name))
        for target in targets:
            options.define(target)
        options.define(_use_compile_cache)
        positional = [] if through else _positional(commands[name])
        sys.modules["__main__"].__doc__ = _help_of(name, commands[name], positional)
    elif name not in _HELP:  # without a command, --help prints the docstring of the module
        print(f"error: expected one of {', '.join(commands)}, found {name or 'nothing'}", file=sys.stderr)
        sys.exit(1)

    def call_named(arguments):
        _check_positional(name, positional, arguments[1:])
        chosen = {}
        for target in targets:
            chosen |= options.values(target)
        _use_compile_cache(**options.values(_use_compile_cache))
        to_call = targets[0]
        given = [name] if through else arguments[1:]
        text = to_call(*given, **chosen)
        if text:
            print(text)
        return 0

    _run(call_named, lambda argv: _refuse_options_of_others(name, commands, argv))


def _use_compile_cache(
    compile_cache: Annotated[bool, Option("keep compiled functions in the cache folder, for later commands")] = True,
) -> None:
    several_processes = "multihost" in flags.FLAGS and flags.FLAGS.multihost
    use_compile_cache(compile_cache, several_processes)


def print_error(error: Exception) -> None:
    """Prints the error as one line on stderr, with dashes before the name of an argument that is a flag."""
    is_flag = isinstance(error, ArgumentError) and error.name in flags.FLAGS
    dashes = "--" if is_flag else ""
    print(f"error: {dashes}{error}", file=sys.stderr, flush=True)


def _run(call, check=None):
    """Runs `call(positional arguments)` as an absl command, and turns errors into a line on stderr and an exit code."""

    def main(argv):
        try:
            return call(argv[1:])
        except (UserError, OSError) as error:
            print_error(error)
            return exit_codes.of(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return ExitCode.INTERRUPTED
        except Exception as error:
            if not exit_codes.is_out_of_memory(error):
                raise
            print(f"error: out of memory: {one_line(error, 300)}", file=sys.stderr, flush=True)
            return ExitCode.OUT_OF_MEMORY

    def parse_flags(argv):
        # Before the flags are parsed, as a config file may read a checkpoint.
        if not any(argument.startswith(("--verbosity", "-v")) for argument in sys.argv):
            logging.set_verbosity(logging.FATAL)  # Orbax logs every file, and also the errors that it raises
            sys.unraisablehook = _without_late_reports(sys.unraisablehook)
            # Orbax drops what it has not begun to read when it fails.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            if check:
                argv = check(argv)
        except UserError as error:
            print_error(error)
            sys.exit(exit_codes.of(error))
        return app.parse_flags_with_usage(argv)

    try:
        app.run(main, flags_parser=parse_flags)
    except SystemExit:
        if _HELP & set(sys.argv):
            sys.exit(0)  # absl exits with 1 after --help
        raise


def _without_late_reports(hook):
    """The hook without the reports of reads and writes that end after Orbax has failed.

    Orbax closes its event loop at the first error, which it raises. TensorStore cannot tell the loop of the ends of the
    other reads and writes, and errors of Orbax's own coroutines reach nobody. Python would print a traceback for each.
    """

    def call(unraisable):
        coroutine = unraisable.object if inspect.iscoroutine(unraisable.object) else None
        is_orbax = coroutine is not None and "orbax" in pathlib.Path(coroutine.cr_code.co_filename).parts
        if not is_orbax and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return call


def _positional(function) -> list[inspect.Parameter]:
    """The parameters without an `Option`."""
    hints = options.hints(function)
    return [p for p in inspect.signature(function).parameters.values() if not options.is_option(hints.get(p.name))]


def _check_positional(name, parameters, arguments) -> None:
    """Raises: UserError if there are too few or too many arguments for the positional parameters of command `name`."""
    required = [p for p in parameters if p.default is p.empty]
    if not len(required) <= len(arguments) <= len(parameters):
        expected = " ".join(p.name.upper() if p in required else f"[{p.name.upper()}]" for p in parameters)
        raise UserError(
            f"{name}: expected {expected or 'no argument but options'}, found {' '.join(arguments) or 'none'}"
        )


def _refuse_options_of_others(name: str, commands: Mapping[str, Callable], argv: list[str]) -> list[str]:
    """Returns argv. Raises: UserError for an option that command `name` lacks and others have.

    absl would call it unknown, though --help of another command, or its documentation, shows it.
    """
    for argument in argv[1:]:
        flag = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and flag not in flags.FLAGS:
            having = [other for other, function in commands.items() if flag in options.names(function)]
            if having:
                raise UserError(f"{name}: takes no --{flag}, which is an option of {', '.join(having)}")
    return argv


def _help_of(name, function, positional) -> str:
    """What `name --help` prints above the options: how to call the command, and its docstring."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else ""
    arguments = "".join(f" {p.name.upper()}" for p in positional)
    return f"python -m {module} {name}{arguments} [--option=VALUE ...]\n\n{inspect.getdoc(function)}"
