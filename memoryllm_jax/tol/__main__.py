"""Looks into, checks, compresses, edits and compares ToL files.

    python -m memoryllm_jax.tol inspect  FILE [--token=TEXT ...]
    python -m memoryllm_jax.tol verify   FILE [--workdir=DIR]
    python -m memoryllm_jax.tol compress FILE --output=FILE [--bits=4] [--rank=0.5] [--drop_layers=5,6]
    python -m memoryllm_jax.tol compress FILE --output=FILE --bytes_per_token=12KiB --data=DATA --workdir=DIR
    python -m memoryllm_jax.tol edit     FILE --overlay=FILE [--swap=A,B] [--zero=A] [--list] [--undo=1] [--output=FILE]
    python -m memoryllm_jax.tol diff     FILE [FILE] [--overlay=FILE]

verify reads every row against its checksum and, with --workdir, against the live FFN-M. edit writes a small overlay,
which `generate --overlay` applies; with --output the edits are applied to a new ToL file instead. Tokens are named as
text that is one token, or as #ID.
"""

import json

import jax
import numpy as np
from absl import flags

from memoryllm_jax import config
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import legacy, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.model import sharding
from memoryllm_jax.tol import budget, build, compress, edit, verify
from memoryllm_jax.tol.compress import from_flags, write
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.verify import compare, damaged


def mesh_here():
    return sharding.make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])


def inspect(tol: TolFile) -> dict:
    """Prints what a file holds and, for named tokens, the norms of their rows. Returns the same for machines."""
    layout, meta = tol.layout, tol.metadata
    lines = [
        f"{tol.path}: {tol.size:,} bytes, {meta['codec']}",
        f"made from {meta['architecture']} at step {meta['step']}, computed in {meta['dtype']}: {layout.layers} layers "
        f"of width {layout.dim}, {tol.vocab_size:,} tokens" + (", with the input embedding" if layout.has_x0 else ""),
        f"dropped layers: {', '.join(map(str, json.loads(meta['dropped_layers']))) or 'none'}; rows in order of "
        + ("frequency" if "counts" in tol.tensors else "token id"),
        f"digests: rows {meta['rows_digest'][:12]}, decoder {meta['decoder_digest'][:12]}, tokenizer "
        f"{meta['tokenizer_kind']} {meta['tokenizer_digest'][:12]}",
        f"{layout.row_bytes / tol.vocab_size:,.0f} bytes a token on average; bases "
        f"{layout.total_bytes - layout.row_bytes:,} bytes",
    ]
    for number, tier in enumerate(layout.tiers):
        lines.append(f"tier {number}: {tier.rows:,} rows of {tier.stride:,} bytes")
        for part in tier.parts:
            bands = " + ".join(f"{band.size} at {band.bits} bits" for band in part.bands)
            lines.append(f"  {part.name:>7}  {bands}{'  in a rotated basis' if part.rotated else ''}")
    record = {
        "size": tol.size,
        "metadata": {k: v for k, v in meta.items() if k != "layout"},
        "layout": layout.to_json(),
    }
    names = flags.FLAGS.token
    if names:
        editor = edit.Editor(tol, edit.Overlay(tol, []))
        ids = [editor.token(name) for name in names]
        record["tokens"] = {}
        for token, rows in zip(ids, edit.read_rows(tol, np.array(ids))):
            norms = np.linalg.norm(rows, axis=1)
            record["tokens"][token] = norms.tolist()
            lines.append(
                f"#{token} {editor.tokenizer.decode([token])!r}: row {tol.row_of_token[token]}, norms by layer "
                + " ".join(f"{norm:.3g}" for norm in norms)
            )
    print("\n".join(lines))
    return record


def verify_command(tol: TolFile) -> dict:
    """Reads every row and every other tensor. Raises: UserError that names the damaged tokens."""
    for name in json.loads(tol.metadata["tensor_checksums"]):
        tol.read(name)
    tol.tokenizer()
    bad = damaged(tol)
    if bad:
        named = ", ".join(f"#{token}" for token in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UserError(f"{tol.path}: the checksums of {len(bad)} of {tol.vocab_size} rows differ: tokens {named}")
    print(f"{tol.path}: all {tol.vocab_size:,} rows match their checksums")
    record = {"rows": tol.vocab_size, "damaged": 0}
    if flags.FLAGS.workdir:
        trained = TrainedModel(flags.FLAGS.workdir, int(tol.metadata["step"]), tol.metadata["dtype"])
        live = build.LiveSource(trained)
        tol.check_model(trained.config, trained.tokenizer.digest, live.identity.decoder_digest)
        if live.identity.rows_digest != tol.metadata["rows_digest"]:
            raise UserError(f"{tol.path}: made from other weights than {flags.FLAGS.workdir} has, or edited")
        result = compare(live, build.FileSource(tol, trained.mesh))
        record["relative_error"] = result.by_part
        print("against the live model, error over norm by part:")
        print("  " + "  ".join(f"{name} {error:.2g}" for name, error in result.by_part.items()))
    return record


def compress_command(tol: TolFile) -> dict:
    f = flags.FLAGS
    choices = from_flags()
    if not tol.layout.tiers[0].plain or len(tol.layout.kept_layers()) < tol.layout.layers:
        raise UserError(
            f"{tol.path}: expected a file of 16 or 32 bits with all layers, found {tol.metadata['codec']} of "
            f"{len(tol.layout.kept_layers())} layers; compress the file that it was made from"
        )
    source = build.FileSource(tol, mesh_here())
    scorer = None
    if f.workdir:
        trained = TrainedModel(f.workdir, int(tol.metadata["step"]), tol.metadata["dtype"])
        tol.check_model(trained.config, trained.tokenizer.digest, None)
        scorer = budget.scorer(trained, choices.data) if choices.data else None
    line = write(source, choices, f.output, scorer, "compress")
    print(line)
    return {"result": line}


def edit_command(tol: TolFile) -> dict:
    f = flags.FLAGS
    if not f.overlay:
        raise UserError("--overlay: expected the name of the overlay file")
    asked = [(name, spec) for name in edit.OPERATIONS for spec in f[name].value]
    overlay = edit.Overlay.open(f.overlay, tol, missing_ok=bool(asked))
    editor = edit.Editor(tol, overlay, f.workdir)
    if f.list and (asked or f.undo or f.output):
        raise UserError("--list: expected no edit, --undo or --output on the same line")
    if f.undo and asked:
        raise UserError("--undo: expected no other edit on the same line")
    for name, spec in asked:
        editor.add(name, spec)
    for text in editor.undo(f.undo) if f.undo else []:
        print(f"undone: {text}")
    written = edit.apply(tol, overlay, mesh_here(), f.output) if f.output else ""
    if asked or f.undo:  # not before the rest of the line is done, so that it can be run again
        overlay.save(f.overlay)
    if not overlay.edits:
        print(f"{f.overlay}: no edits")
    for number, entry in enumerate(overlay.edits, 1):
        print(f"{number}: {entry.text}")
    if written:
        print(written)
    return {"edits": [entry.text for entry in overlay.edits]}


def diff(tol: TolFile, other: TolFile | None) -> dict:
    f = flags.FLAGS
    if (other is None) == (not f.overlay):
        raise UserError("diff: expected a second file, or --overlay=FILE")
    after = other or tol
    overlay = edit.Overlay.open(f.overlay, tol) if f.overlay else None
    if after.vocab_size != tol.vocab_size or after.layout.layers != tol.layout.layers:
        raise UserError(f"{after.path}: expected the vocabulary and layers of {tol.path}")
    mesh = mesh_here()
    result = verify.compare(build.FileSource(tol, mesh), build.FileSource(after, mesh, overlay))
    tokenizer = tol.tokenizer()
    print(f"{result.changed:,} of {tol.vocab_size:,} tokens differ; difference over norm by part:")
    print("  " + "  ".join(f"{name} {error:.3g}" for name, error in result.by_part.items()))
    listed = result.most(f.top)
    for token, share, part in listed:
        print(f"  #{token} {tokenizer.decode([token])!r}: {share:.3g}, most in {part}")
    return {"changed": result.changed, "by_part": result.by_part, "tokens": listed}


def main(arguments):
    command, paths = arguments[0], arguments[1:]
    most = 2 if command == "diff" else 1
    if not 1 <= len(paths) <= most:
        raise UserError(f"{command}: expected {'one or two files' if most > 1 else 'one file'}, found {len(paths)}")
    opened = [TolFile(path) for path in paths]
    call = {
        "inspect": inspect,
        "verify": verify_command,
        "compress": compress_command,
        "edit": edit_command,
        "diff": diff,
    }[command]
    record = call(*opened, *([None] if most > len(opened) else []))
    if flags.FLAGS.json:
        storage.write_json(flags.FLAGS.json, record)
    return 0


def define_flags(command):
    flags.DEFINE_string("json", "", "file for the result, for machines")
    if command in ("verify", "compress", "edit"):
        flags.DEFINE_string("workdir", "", "folder with the model's checkpoints")
    if command == "inspect":
        flags.DEFINE_multi_string("token", [], "show the norms of this token's row")
    if command == "compress":
        compress.define_flags()
        flags.DEFINE_string("output", None, "file to write, NAME.safetensors", required=True)
    if command in ("edit", "diff"):
        flags.DEFINE_string("overlay", "", "file of edits")
    if command == "edit":
        flags.DEFINE_multi_string("swap", [], "A,B: exchange the rows of two tokens; a comma in a name is doubled")
        flags.DEFINE_multi_string("replace", [], "A,B: give A the row of B")
        flags.DEFINE_multi_string("blend", [], "A,B,SHARE: give A (1 - SHARE) of its row and SHARE of B's")
        flags.DEFINE_multi_string("zero", [], "A: take the row of A away")
        flags.DEFINE_multi_string("suppress", [], "LAYER:KEY: take one key's value out of all rows (needs --workdir)")
        flags.DEFINE_integer("undo", 0, "take back this many of the last edits")
        flags.DEFINE_bool("list", False, "only list the edits, as every edit does at its end")
        flags.DEFINE_string("output", "", "apply the edits to a new ToL file")
    if command == "diff":
        flags.DEFINE_integer("top", 10, "tokens listed")


if __name__ == "__main__":
    legacy.run_commands(("inspect", "verify", "compress", "edit", "diff"), define_flags, main)
