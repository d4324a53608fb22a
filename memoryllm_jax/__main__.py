"""`python -m memoryllm_jax` lists the commands, each with the first line of its docstring."""

import ast
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Prints the list of commands. Returns: the exit code."""
    unknown = [argument for argument in arguments if argument not in ("--help", "-h")]
    if unknown:
        print(
            f"error: expected no argument, found {unknown[0]!r}; a command is run as python -m memoryllm_jax.COMMAND",
            file=sys.stderr,
        )
        return 1
    summaries = command_summaries(Path(__file__).parent)
    width = max(map(len, summaries))
    print("python -m memoryllm_jax.COMMAND --help says how a command is used.\n")
    for name, summary in summaries.items():
        print(f"  {name:<{width}}  {summary}")
    return 0


def command_summaries(package: Path) -> dict[str, str]:
    """{command: first line of its docstring}. The files are parsed, not imported: an import would load JAX."""
    files = {path.stem: path for path in package.glob("*.py")}
    # A folder with a __main__.py, such as tol, is a command too.
    files |= {path.parent.name: path for path in package.glob("*/__main__.py")}
    for not_a_command in ("__init__", "__main__"):
        del files[not_a_command]
    return {name: _first_line(files[name]) for name in sorted(files)}


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.partition("\n")[0] if docstring else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
