"""Describes, checks, compresses, edits and compares ToL files.

    python -m memoryllm_jax.tol inspect  FILE [--token=TEXT ...]
    python -m memoryllm_jax.tol verify   FILE [--workdir=DIR]
    python -m memoryllm_jax.tol compress FILE --output=FILE [--bits=4] [--rank=0.5] [--drop_layers=5,6]
    python -m memoryllm_jax.tol edit     FILE --overlay=FILE [--swap=A,B] [--zero=A] [--list] [--undo=1] [--output=FILE]
    python -m memoryllm_jax.tol edit     [FILE] --overlay=FILE --workdir=DIR --suppress=LAYER:KEY
    python -m memoryllm_jax.tol edit     [FILE] --overlay=FILE --workdir=DIR --teach=PROMPT --target=TEXT [--token=A]
    python -m memoryllm_jax.tol diff     FILE [FILE] [--overlay=FILE]

COMMAND --help lists the options. A token is named by a text that is exactly one token, or as #ID.
"""

from typing import Annotated

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.tol import compress, edit, summary, verify
from memoryllm_jax.tol.format import TolFile

Json = Annotated[str, Option("JSON file to write the result to", writes=True)]
Tokens = Annotated[tuple[str, ...], Option("token to show the row norms of, as text or #ID", many=True)]


def inspect_file(file: str, token: Tokens = (), json: Json = "") -> str:
    """Shows what a ToL file holds: its model, its layout and, for each --token, the norms of the token's row."""
    tol = TolFile(file)
    tokens = summary.token_norms(tol, token)
    _write_json(json, summary.record(tol, tokens))
    return "\n".join([*summary.lines(tol), *(entry.line() for entry in tokens)])


def verify_file(
    file: str,
    workdir: Annotated[str, Option("checkpoints of the model, to compare the rows with")] = "",
    json: Json = "",
) -> None:
    """Checks every row against its checksum and, with --workdir, compares it with the output of the live FFN-M."""
    tol = TolFile(file)
    verify.check_file(tol)
    print(f"{tol.path}: all {tol.vocab_size:,} rows match their checksums")
    record: dict = {"rows": tol.vocab_size, "damaged": 0}
    if workdir:
        record["relative_error"] = errors = verify.compare_with_weights(tol, workdir).by_part
        print("against the live model, norm of the difference over norm, by part:")
        print("  " + "  ".join(f"{name} {error:.2g}" for name, error in errors.items()))
    _write_json(json, record)


def compress_file(
    file: str,
    output: Annotated[str, Option("file to write, NAME.safetensors", writes=True)],
    choices: compress.Options,
    workdir: Annotated[str, Option("the model's checkpoints, which a budget needs")] = "",
    json: Json = "",
) -> str:
    """Compresses a ToL file of 16 or 32 bits into a smaller one, with the options of `precompute`."""
    line = compress.compress_file(TolFile(file), choices, output, workdir)
    _write_json(json, {"result": line})
    return line


def edit_rows(
    file: str = "",
    *,
    request: edit.Request,
    list: Annotated[bool, Option("list the edits and change nothing; every other call lists them too")] = False,
    json: Json = "",
) -> str:
    """Edits rows and keeps the edits in a small file, the overlay. A token is named by its text or as #ID.

    The rows are those of a ToL file or, without FILE, those that --workdir's newest checkpoint computes.
    """
    if list and (request.has_edits or request.undo or request.output):
        raise ArgumentError("list", "expected no edit, undo or output on the same line")
    result = edit.fulfil(TolFile(file) if file else None, request)
    _write_json(json, {"edits": result.edits})
    lines = [f"undone: {text}" for text in result.undone]
    lines += [f"{number}: {text}" for number, text in enumerate(result.edits, 1)]
    if not result.edits:
        lines.append(f"{request.overlay}: no edits")
    if result.written:
        lines.append(result.written)
    return "\n".join(lines)


def diff_files(
    file: str,
    other: str = "",
    overlay: Annotated[str, Option("file of edits to compare with, in place of a second ToL file")] = "",
    top: Annotated[int, Option("tokens listed", least=0)] = 10,
    json: Json = "",
) -> str:
    """Compares the rows of two ToL files, or of one with and without the edits of an overlay."""
    if bool(other) == bool(overlay):
        raise UserError("diff: expected a second file or --overlay=FILE")
    tol = TolFile(file)
    # With an overlay, the file is compared with itself: once as it is, once with the edits.
    result = verify.compare_files(tol, TolFile(other or file), overlay)
    _write_json(json, {"changed": result.changed, "by_part": result.by_part, "tokens": result.most(top)})
    return "\n".join(verify.describe(result, tol, top))


def _write_json(path, record):
    if path:
        storage.write_json(path, record)


if __name__ == "__main__":
    cli.run_commands(
        {
            "inspect": inspect_file,
            "verify": verify_file,
            "compress": compress_file,
            "edit": edit_rows,
            "diff": diff_files,
        }
    )
