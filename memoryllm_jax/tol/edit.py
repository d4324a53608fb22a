"""Makes edits of a ToL file's rows, and files with the edits in them."""

import dataclasses
import functools
import hashlib
import os
import shutil
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.model.transformer import Norm, swiglu_coefficients
from memoryllm_jax.tol import codec
from memoryllm_jax.tol.format import TolFile, checksum
from memoryllm_jax.tol.overlay import Edit, Overlay
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.sources import FileSource, read_rows

OPERATIONS = ("swap", "replace", "blend", "zero", "suppress")
_FIELDS = {"swap": 2, "replace": 2, "blend": 3, "zero": 1}  # of a row operation
_KEY_ROWS = 8192  # tokens whose coefficients of a key are computed at a time
_COPY_ROWS = 512  # rows that are encoded at a time


@dataclasses.dataclass(frozen=True)
class Request:
    """Edits of an overlay: some to add, or some to take back."""

    overlay: Annotated[str, Option("file of edits; the first edit makes it")]
    swap: Annotated[
        tuple[str, ...], Option("A,B: exchange the rows of two tokens; a comma in a name is doubled", many=True)
    ] = ()
    replace: Annotated[tuple[str, ...], Option("A,B: give A the row of B", many=True)] = ()
    blend: Annotated[
        tuple[str, ...], Option("A,B,SHARE: give A (1 - SHARE) of its row and SHARE of B's", many=True)
    ] = ()
    zero: Annotated[tuple[str, ...], Option("A: set the row of A to zero", many=True)] = ()
    suppress: Annotated[
        tuple[str, ...], Option("LAYER:KEY: remove one key's value from all rows (needs --workdir)", many=True)
    ] = ()
    undo: Annotated[int, Option("take back this many of the last edits", least=0)] = 0
    workdir: Annotated[str, Option("the model's checkpoints, which --suppress needs")] = ""
    output: Annotated[str, Option("write a copy of the ToL file with the edits in it")] = ""

    def operations(self) -> list[tuple[str, str]]:
        """(operation, spec) of the edits to add."""
        return [(name, spec) for name in OPERATIONS for spec in getattr(self, name)]


class Result(NamedTuple):
    """Texts of the edits taken back and of those that the overlay has now, and a line on the file written, or ""."""

    undone: list[str]
    edits: list[str]
    written: str


def fulfil(tol: TolFile, request: Request) -> Result:
    """Adds edits to an overlay or takes some back, and writes the edited file where one is named. Raises: UserError."""
    operations = request.operations()
    if request.undo and operations:
        raise ArgumentError("undo", f"expected no edit on the same line, found {operations[0][0]}")
    overlay = Overlay.open(request.overlay, tol, missing_ok=bool(operations))
    editor = Editor(tol, overlay, request.workdir)
    for operation, spec in operations:
        editor.add(operation, spec)
    undone = editor.undo(request.undo) if request.undo else []
    written = write_edited(tol, overlay, request.output) if request.output else ""
    if operations or undone:  # saved last, so that a line that failed can be run again
        overlay.save(request.overlay)
    return Result(undone, [edit.text for edit in overlay.edits], written)


class Editor:
    """Adds edits to an overlay, and takes them back.

    Args:
      workdir: of the model, whose weights suppressing a key needs.
    """

    def __init__(self, tol: TolFile, overlay: Overlay, workdir: str = ""):
        self.tol, self.overlay, self.workdir = tol, overlay, workdir
        self.tokenizer = tol.tokenizer()

    def token(self, text: str) -> int:
        """The id of `#ID` or of a text that is one token. Raises: UserError."""
        label = f"token {text if text.startswith('#') else repr(text)}"
        return self.tokenizer.token(text, label, self.tol.vocab_size)

    def add(self, operation: str, spec: str) -> None:
        """Adds an edit.

        Args:
          operation, spec: "swap" and "A,B"; "replace" and "A,B" (A gets B's row); "blend" and "A,B,SHARE" (A gets
            1 - SHARE of its row and SHARE of B's); "zero" and "A"; "suppress" and "LAYER:KEY". A and B are tokens.
        Raises: UserError.
        """
        if operation == "suppress":
            self._suppress(spec)
        else:
            self._give_rows(operation, spec)

    def _give_rows(self, operation, spec):
        fields = _split(operation, spec, _FIELDS[operation])
        share = _share(fields.pop()) if operation == "blend" else 0.0
        ids = [self.token(field) for field in fields]
        if len(set(ids)) < len(ids):
            raise ArgumentError(operation, f"expected two different tokens, found the same one twice in {spec!r}")
        a, b = ids[0], ids[-1]
        # {token: what its new row is made of}
        mix = {
            "swap": {a: [(b, 1.0)], b: [(a, 1.0)]},
            "replace": {a: [(b, 1.0)]},
            "blend": {a: [(a, 1 - share), (b, share)]},
            "zero": {a: []},
        }[operation]
        row_of = dict(zip(ids, read_rows(self.tol, np.array(ids, np.int32), self.overlay)))
        zeros = np.zeros_like(row_of[a])
        rows = [sum((weight * row_of[token] for token, weight in made_of), zeros) for made_of in mix.values()]
        text = " ".join([operation, *(f"#{i} {self.tokenizer.decode([i])!r}" for i in ids)])
        if operation == "blend":
            text += f" {share:g}"
        edit = Edit(text, ids=np.array(list(mix), np.int32), rows=np.stack(rows), mix=list(mix.values()))
        self.overlay.edits.append(edit)

    def _suppress(self, spec):
        layer, _, key = spec.partition(":")
        if not (layer.isdecimal() and key.isdecimal()):
            raise ArgumentError("suppress", f"expected LAYER:KEY, two numbers, found {spec!r}")
        if not self.workdir:
            raise ArgumentError("suppress", "expected a workdir too, as a key's coefficients come from the weights")
        layer, key = int(layer), int(key)
        trained = TrainedModel(self.workdir, int(self.tol.metadata["step"]), self.tol.metadata["dtype"])
        c = trained.config
        self.tol.check_model(c, trained.tokenizer.digest, None)
        if layer >= c.layers or key >= c.memory_dim:
            expected = f"expected a layer below {c.layers} and a key below {c.memory_dim}"
            raise ArgumentError("suppress", f"{expected}, found {spec!r}")
        if layer not in self.tol.layout.kept_layers():
            expected = f"expected a layer that {self.tol.path} holds"
            raise ArgumentError("suppress", f"{expected}, found {layer}, which it dropped")
        text = f"suppress layer {layer} key {key}"
        if any(edit.text == text for edit in self.overlay.edits):
            raise ArgumentError("suppress", f"expected a key that is not suppressed yet, found {spec!r}")
        coefficients, value = _key(trained, layer, key, self.tol.metadata["rows_digest"])
        coefficients = self.overlay.mixed(coefficients)
        self.overlay.edits.append(Edit(text, layer=layer, coefficients=coefficients, value=value))

    def undo(self, count: int) -> list[str]:
        """Takes back the last edits. Returns: what they were. Raises: ArgumentError if there are fewer."""
        edits = self.overlay.edits
        if not 1 <= count <= len(edits):
            raise ArgumentError("undo", f"expected from 1 to {len(edits)}, the number of edits, found {count}")
        gone = [edit.text for edit in edits[-count:]]
        del edits[-count:]
        return gone


def _key(trained: TrainedModel, layer: int, key: int, rows_digest: str) -> tuple[np.ndarray, np.ndarray]:
    """(coefficient c_key(t) of every token t, float32 [V]; value v_key, float32 [D]) of FFN-M of a layer.

    Raises: ArgumentError if the weights are not those that the rows were made from.
    """
    params, digest = trained.load(lambda name: trained.is_memory(name) or name == "embedding")
    if digest != rows_digest:
        expected = "expected the weights that the rows were made from"
        raise ArgumentError("workdir", f"{expected}, found others at step {trained.step} of {trained.workdir}")
    p, c = params["memory"][layer], trained.config

    @jax.jit
    def coefficients(x0_UD):
        q_UD = Norm(c).apply({"params": p["norm"]}, x0_UD).astype(jnp.float32)
        gate_D = p["ffn"]["gate"][:, key].astype(jnp.float32)
        up_D = p["ffn"]["up"][:, key].astype(jnp.float32)
        return swiglu_coefficients(q_UD, gate_D, up_D)

    table = params["embedding"]
    with jax.set_mesh(trained.mesh):
        starts = range(0, len(table), _KEY_ROWS)
        parts = [np.asarray(coefficients(table[start : start + _KEY_ROWS])) for start in starts]
    return np.concatenate(parts), np.asarray(p["ffn"]["down"][key], np.float32)


def _split(operation, spec, count) -> list[str]:
    """Comma-separated names; a doubled comma is a comma."""
    fields = [field.replace("\0", ",") for field in spec.replace(",,", "\0").split(",")]
    if len(fields) != count or not all(fields):
        expected = "a token" if count == 1 else f"{count} values with commas between them"
        raise ArgumentError(operation, f"expected {expected}, found {spec!r}")
    return fields


def _share(text) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ArgumentError("blend", f"expected a share from 0 to 1, found {text!r}")
    return share


def write_edited(tol: TolFile, overlay: Overlay, output: str) -> str:
    """Writes a copy of the file with the edits in its rows; parts that no edit changes keep their bytes.

    Returns: one line on it. Raises: UserError.
    """
    if os.path.exists(output) and os.path.samefile(output, tol.path):
        raise ArgumentError("output", f"expected another file than the one that is edited, found {output}")
    old_digest = tol.metadata["rows_digest"]
    texts = "".join(entry.text for entry in overlay.edits)
    new_digest = hashlib.sha256((old_digest + texts).encode()).hexdigest()
    source = FileSource(tol, overlay)
    with storage.replaced(output) as part:
        shutil.copyfile(tol.path, part)
        with open(part, "r+b") as file:
            # Digests are of one length, so that the header's stays as it is.
            header = os.pread(file.fileno(), tol.tensors["rows.0"].start, 0)
            os.pwrite(file.fileno(), header.replace(old_digest.encode(), new_digest.encode()), 0)
            _write_changed_rows(tol, overlay, source, file.fileno())
            os.fsync(file.fileno())
    source.close()
    return f"{output}: {len(overlay.edits)} edits in a copy of {tol.path}"


def _write_changed_rows(tol, overlay, source, fd):
    """Encodes the parts that edits change, token by token, into the rows of a copy."""
    layout = tol.layout
    bases = {name: jnp.asarray(tol.basis(name)) for name in layout.rotated}
    changed = _changed_parts(overlay, layout.layers)
    tokens = np.array(sorted(changed, key=lambda token: tol.row_of_token[token]), np.int32)
    reader = RowReader(tol)
    encoders = [jax.jit(functools.partial(codec.encode, tier.parts)) for tier in layout.tiers]
    for chunk in vocabulary.chunks(tokens, _COPY_ROWS):
        raw, tier_U = reader.read(chunk.real_ids)
        vectors = source.vectors(chunk.ids)
        encoded = [np.asarray(encode(vectors, bases)) if t.parts else None for encode, t in zip(encoders, layout.tiers)]
        for i, (token, tier) in enumerate(zip(chunk.real_ids.tolist(), tier_U)):
            offset = 0
            for part in layout.tiers[tier].parts:
                if part.name in changed[token]:
                    raw[i, offset : offset + part.bytes] = encoded[tier][i, offset : offset + part.bytes]
                offset += part.bytes
            row, row_bytes = int(tol.row_of_token[token]), raw[i, : layout.tiers[tier].stride]
            os.pwrite(fd, row_bytes.tobytes(), int(tol.start_of_row[row]))
            os.pwrite(fd, checksum(row_bytes).to_bytes(8, "little"), tol.tensors["checksums"].start + 8 * row)
    reader.close()


def _changed_parts(overlay: Overlay, layers: int) -> dict[int, set[str]]:
    """{token: names of the parts that some edit changes}."""
    changed: dict[int, set[str]] = {}
    for edit in overlay.edits:
        if edit.gives_rows:
            ids, names = edit.ids, {f"ffn.{layer}" for layer in range(layers)}
        else:
            ids, names = np.nonzero(edit.coefficients)[0], {f"ffn.{edit.layer}"}
        for token in ids.tolist():
            changed.setdefault(token, set()).update(names)
    return changed
