"""Command lines: flags in, one call, exit code out.

`run(main)` makes a command of one function, `run_commands` of several. Their options are those of the functions'
signatures (common/options.py).
"""

import inspect
import sys
from collections.abc import Callable, Mapping

from absl import app, flags, logging

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError, UserError

flags.disclaim_key_flags()  # flags that are defined here belong to the command: its --help lists them

_HELP = {"--help", "-h", "-help", "--helpfull"}


def run(main: Callable[..., int | None], check: Callable[[list[str]], list[str]] | None = None) -> None:
    """Runs `main(**options)` as an absl command; a `UserError` becomes one line on stderr and exit code 1.

    Args:
      check: is given the arguments before absl parses them, and returns them as absl is to parse them. Raises
        `UserError` for those that absl would refuse in words that do not help.
    """
    options.define(main)

    def call(positional):
        if positional:
            raise UserError(f"unexpected argument {positional[0]!r}; options are written --name=value")
        return main(**options.values(main))

    _run(call, check)


def run_commands(commands: Mapping[str, Callable], through: Callable[[str], Callable] | None = None) -> None:
    """Runs the function that the line names: python -m MODULE COMMAND [ARGUMENT ...] [--option=VALUE ...].

    A function's docstring is what COMMAND --help says. Its parameters without an `Option` are positional.

    Args:
      through: COMMAND -> a function that runs it and adds options of its own. It is called as f(COMMAND, **options)
        with its own options and those of the command, which then has no positional arguments.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    targets = [commands[name]] if name in commands else []
    if targets:
        if through:
            targets.insert(0, through(name))
        for target in targets:
            options.define(target)
        positional = [] if through else _positional(commands[name])
        sys.modules["__main__"].__doc__ = _help_of(name, commands[name], positional)
    elif not _HELP & set(sys.argv):
        print(f"error: expected one of {', '.join(commands)}, found {name or 'nothing'}", file=sys.stderr)
        sys.exit(1)

    def call_named(arguments):
        _check_positional(name, positional, arguments[1:])
        chosen = {}
        for target in targets:
            chosen |= options.values(target)
        text = through(name)(name, **chosen) if through else commands[name](*arguments[1:], **chosen)
        if text:
            print(text)
        return 0

    _run(call_named)


def print_error(error: Exception) -> None:
    """One line on stderr; an argument that is a flag gets its dashes."""
    is_flag = isinstance(error, ArgumentError) and error.name in flags.FLAGS
    print(f"error: {'--' if is_flag else ''}{error}", file=sys.stderr, flush=True)


def _run(call, check=None):
    def main(argv):
        if not any(argument.startswith(("--verbosity", "-v")) for argument in sys.argv):
            logging.set_verbosity(logging.FATAL)  # Orbax logs every file, and every error that it also raises
        try:
            return call(argv[1:])
        except (UserError, OSError) as error:
            print_error(error)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    def parse_flags(argv):
        try:
            if check:
                argv = check(argv)
        except UserError as error:
            print_error(error)
            sys.exit(1)
        return app.parse_flags_with_usage(argv)

    try:
        app.run(main, flags_parser=parse_flags)
    except SystemExit:
        if _HELP & set(sys.argv):
            sys.exit(0)  # absl's is 1
        raise


def _positional(function):
    hints = options.hints(function)
    return [p for p in inspect.signature(function).parameters.values() if not options.is_option(hints.get(p.name))]


def _check_positional(name, parameters, arguments):
    least = sum(p.default is p.empty for p in parameters)
    if not least <= len(arguments) <= len(parameters):
        expected = " ".join(p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]" for p in parameters)
        raise UserError(
            f"{name}: expected {expected or 'no argument but options'}, found {' '.join(arguments) or 'none'}"
        )


def _help_of(name, function, positional):
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else ""
    arguments = "".join(f" {p.name.upper()}" for p in positional)
    return f"python -m {module} {name}{arguments} [--option=VALUE ...]\n\n{inspect.getdoc(function)}"
