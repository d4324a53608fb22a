"""Temporary: what commands used before common/options.py. Nothing new uses it."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Collection

from absl import app, flags, logging

from memoryllm_jax.common.errors import UserError

flags.disclaim_key_flags()  # flags that are defined here are the command's: --help lists them


def run(main, positional: bool = False, check=None) -> None:
    """Runs `main()` as an absl command; a `UserError` becomes one line on stderr and exit code 1.

    With `positional`, `main` is given the arguments that are not options.
    """

    def wrapped(argv):
        if not any(argument.startswith(("--verbosity", "-v")) for argument in sys.argv):
            logging.set_verbosity(logging.FATAL)  # Orbax logs every file, and every error that it also raises
        try:
            if positional:
                return main(argv[1:])
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; options are written --name=value")
            return main()
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    def parse_flags(argv):
        try:
            if check:
                argv = check(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        return app.parse_flags_with_usage(argv)

    try:
        app.run(wrapped, flags_parser=parse_flags)
    except SystemExit:
        if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv):
            sys.exit(0)  # absl's is 1
        raise


def define_model_flags() -> None:
    """What `generate.model_from_flags` reads."""
    flags.DEFINE_string("workdir", None, "folder with the trained model's checkpoints", required=True)
    flags.DEFINE_string("tol", "", "ToL file; without it rows are computed from the weights")
    flags.DEFINE_string("rows", "disk", "where the ToL file's rows are served from: device, host or disk")
    flags.DEFINE_string(
        "cache", "256MiB", "rows kept on the device, for host and disk; least recently used leave first"
    )
    flags.DEFINE_string("overlay", "", "edits of the rows, that `tol edit` wrote")
    flags.DEFINE_float("alpha", 1.0, "factor of what FFN-M adds, live or from a ToL file; in base, the FFN")
    flags.DEFINE_float("alpha_compute", 1.0, "factor of what FFN-C adds, in flex")
    flags.DEFINE_list("drop_layers", [], "layers whose FFN-M, in base whose FFN, adds nothing, such as 0,5")
    flags.DEFINE_list("drop_compute", [], "layers whose FFN-C adds nothing, in flex")
    flags.DEFINE_integer("step", None, "checkpoint to read; by default the newest")
    flags.DEFINE_string("dtype", "", "float32 or bfloat16, of the computation; by default that of the training")


def define_quality_flags() -> None:
    """The text and the tasks that say how good a model is."""
    flags.DEFINE_string("data", "", "prepared data (folder or URL) or text files (globs, comma-separated)")
    flags.DEFINE_enum("split", "validation", ["train", "validation"], "of prepared data")
    flags.DEFINE_integer("max_tokens", 0, "predict so many tokens at most, from the start; 0: all", lower_bound=0)
    flags.DEFINE_list("tasks", [], "names of the harness's tasks, groups or tags, or of task files; may have * in them")
    flags.DEFINE_integer("num_fewshot", None, "examples in a prompt; by default as the task says", lower_bound=0)
    flags.DEFINE_float("limit", 0, "documents of each task, or a share of them below 1, for trials; 0: all", 0)
    flags.DEFINE_string("task_path", "", "folder with task files (.yaml) of your own")
    flags.DEFINE_string("task_data", "", "folder with lambada.jsonl and piqa.jsonl, for lambada_local and piqa_local")


def run_commands(
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
    run(main, positional=True)


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

    run_commands(functions, define_flags, main, text_of)


def options_of(function: Callable) -> dict[str, object]:
    """{name: default} of a function's parameters but the first two, which are what it looks at and its page."""
    return {name: p.default for name, p in list(inspect.signature(function).parameters.items())[2:]}


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(value: str, flag: str) -> int:
    """Bytes of "12KiB", "1.5GB" or "4096". Raises: UserError that names the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", value, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise UserError(f"--{flag}: expected a size above zero such as 12KiB or 1.5GB, found {value!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def layer_list(values: list[str], flag: str) -> tuple[int, ...]:
    """Numbers of layers. Raises: UserError that names the flag."""
    for value in values:
        if not value.strip().isdecimal():
            raise UserError(f"--{flag}: expected numbers of layers such as 0,5, found {value!r}")
    return tuple(map(int, values))


def at_least(options: dict[str, int], least: int = 1) -> None:
    """Raises: UserError for a number that is less."""
    for name, value in options.items():
        if value < least:
            raise UserError(f"--{name}: expected at least {least}, found {value}")


def layers_of(text: str, layers: int) -> list[int]:
    """Layers of "0,5", or all of them for "". Raises: UserError."""
    parts = text.split(",") if text else list(map(str, range(layers)))
    for part in parts:
        if not part.strip().isdecimal() or int(part) >= layers:
            raise UserError(f"--layers={text}: expected layers from 0 to {layers - 1}, found {part!r}")
    return sorted({int(part) for part in parts})
