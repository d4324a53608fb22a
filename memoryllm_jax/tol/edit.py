"""Adds edits to the overlay of a ToL file, and writes ToL files with the edits in them."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint.trained import Digest, TrainedModel
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.model.transformer import Norm, swiglu_coefficients
from memoryllm_jax.tol import codec, header
from memoryllm_jax.tol.format import ALIGN, TolFile, checksum
from memoryllm_jax.tol.header import Place
from memoryllm_jax.tol.layout import Layout
from memoryllm_jax.tol.overlay import Edit, Overlay
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.sources import FileSource, read_rows
from memoryllm_jax.tol.writer import to_replace

OPERATIONS = ("swap", "replace", "blend", "zero", "suppress")
_FIELDS = {"swap": 2, "replace": 2, "blend": 3, "zero": 1}  # comma-separated values that an operation on rows takes
_KEY_ROWS = 8192  # tokens that a key's coefficients are computed for at a time
_COPY_BYTES = 16 << 20  # bytes of a file that are copied at a time
_COPY_ROWS = 512  # rows that are encoded at a time


@dataclasses.dataclass(frozen=True)
class Request:
    """What to do with an overlay: edits to add, or a number of edits to take back."""

    overlay: Annotated[str, Option("file of edits; the first edit creates it")]
    swap: Annotated[
        tuple[str, ...], Option("A,B: exchange the rows of two tokens; write a comma in a token twice", many=True)
    ] = ()
    replace: Annotated[tuple[str, ...], Option("A,B: give A the row of B", many=True)] = ()
    blend: Annotated[
        tuple[str, ...], Option("A,B,SHARE: give A the row (1 - SHARE) * A's + SHARE * B's", many=True)
    ] = ()
    zero: Annotated[tuple[str, ...], Option("A: set the row of A to zero", many=True)] = ()
    suppress: Annotated[
        tuple[str, ...], Option("LAYER:KEY: remove one key's value from all rows (needs --workdir)", many=True)
    ] = ()
    undo: Annotated[int, Option("take back this many of the last edits", least=0)] = 0
    workdir: Annotated[str, Option("the model's checkpoints, which --suppress needs")] = ""
    output: Annotated[str, Option("write a copy of the ToL file with the edits in it", writes=True)] = ""

    def operations(self) -> list[tuple[str, str]]:
        """(operation, spec) of each edit to add, as `Editor.add` takes them."""
        return [(name, spec) for name in OPERATIONS for spec in getattr(self, name)]


class Result(NamedTuple):
    """What `fulfil` did.

    Attributes:
      undone: texts of the edits that were taken back.
      edits: texts of the edits that the overlay has now.
      written: one line on the ToL file that was written, or "".
    """

    undone: list[str]
    edits: list[str]
    written: str


def fulfil(tol: TolFile, request: Request) -> Result:
    """Adds edits to an overlay or takes some back, and writes the edited file where one is named. Raises: UserError."""
    operations = request.operations()
    if request.output and os.path.abspath(request.output) == os.path.abspath(request.overlay):
        raise ArgumentError("output", f"expected another file than the overlay, found {request.output}")
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
      tol: the file whose rows are edited.
      overlay: is changed in place.
      workdir: the model's checkpoints, whose weights suppressing a key needs; else "".
    """

    def __init__(self, tol: TolFile, overlay: Overlay, workdir: str = ""):
        self.tol, self.overlay, self.workdir = tol, overlay, workdir
        self.tokenizer = tol.tokenizer()

    def token(self, text: str, argument: str) -> int:
        """The id of `#ID` or of a text that is one token. Raises: ArgumentError that names the argument."""
        return self.tokenizer.token(text, argument, self.tol.vocab_size)

    def add(self, operation: str, spec: str) -> None:
        """Adds an edit.

        Args:
          operation: one of OPERATIONS.
          spec: depends on the operation. A and B are tokens, each as text or #ID.
            swap "A,B": A and B exchange their rows.
            replace "A,B": A gets B's row.
            blend "A,B,SHARE": A gets (1 - SHARE) * its row + SHARE * B's row.
            zero "A": A's row becomes zero.
            suppress "LAYER:KEY": every row loses what this key of FFN-M adds.
        Raises: UserError.
        """
        if operation == "suppress":
            self._suppress(spec)
        else:
            self._give_rows(operation, spec)

    def _give_rows(self, operation, spec):
        fields = _split(operation, spec, _FIELDS[operation])
        share = _share(fields.pop()) if operation == "blend" else 0.0
        ids = [self.token(field, operation) for field in fields]
        if len(set(ids)) < len(ids):
            raise ArgumentError(operation, f"expected two different tokens, found the same one twice in {spec!r}")
        a, b = ids[0], ids[-1]  # the same token for zero, which takes one
        # {token whose row changes: (token, weight) of the rows that its new row is the sum of}
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
        meta = self.tol.metadata
        with contextlib.closing(TrainedModel(self.workdir, self.tol.step, meta["dtype"])) as trained:
            self._suppress_key(trained, int(layer), int(key), spec)

    def _suppress_key(self, trained, layer, key, spec):
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
        # A tier that drops the layer holds nothing of the key that could be taken away.
        coefficients[~self.tol.holds(layer)] = 0
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
    """One key of FFN-M of a layer, which is a sum over keys of coefficient * value (MemoryLLM, section 2.3.1).

    Args:
      rows_digest: of the weights that the rows were made from.
    Returns: (the key's coefficient for every token, float32 [V]; its value, float32 [D]).
    Raises: ArgumentError if the checkpoint has other weights.
    """
    digest = Digest()
    params = trained.load(lambda name: trained.is_memory(name) or name == "embedding", digest)
    if digest.text() != rows_digest:
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
    """The comma-separated values of a spec. Two commas in a row are a comma within a value. Raises: ArgumentError."""
    # A null character, which no command line can hold, stands for these commas while the text is split.
    fields = [field.replace("\0", ",") for field in spec.replace(",,", "\0").split(",")]
    if len(fields) != count or not all(fields):
        expected = "a token" if count == 1 else f"{count} values with commas between them"
        raise ArgumentError(operation, f"expected {expected}, found {spec!r}")
    return fields


def _share(text) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0  # refused below, like any number outside the range
    if not 0 <= share <= 1:
        raise ArgumentError("blend", f"expected a share from 0 to 1, found {text!r}")
    return share


def write_edited(tol: TolFile, overlay: Overlay, output: str) -> str:
    """Writes a copy of the file with the edits in its rows. Parts that no edit changes keep their bytes.

    Returns: one line on what was written. Raises: UserError.
    """
    if os.path.exists(output) and os.path.samefile(output, tol.path):
        raise ArgumentError("output", f"expected another file than the one that is edited, found {output}")
    old_digest = tol.metadata["rows_digest"]
    replaced = to_replace(output)
    if replaced and (
        replaced["decoder_digest"] != tol.metadata["decoder_digest"] or replaced["rows_digest"] == old_digest
    ):
        expected = "expected a name that is free, or an edited file of this model"
        raise ArgumentError("output", f"{expected}, found another ToL file: {output}")
    texts = "".join(entry.text for entry in overlay.edits)
    # The copy holds other rows, so that overlays of the old ones must not fit it.
    new_digest = hashlib.sha256((old_digest + texts).encode()).hexdigest()
    places = {
        name: Place(t.dtype, t.shape, t.start - tol.data_start, t.end - tol.data_start)
        for name, t in tol.tensors.items()
    }
    first = header.to_bytes(tol.metadata | {"rows_digest": new_digest}, places, ALIGN)
    with (
        contextlib.closing(FileSource(tol, overlay)) as source,
        storage.replaced(output) as part,
        open(tol.path, "rb") as original,
        open(part, "w+b") as file,
    ):
        file.write(first)
        original.seek(tol.data_start)
        shutil.copyfileobj(original, file, _COPY_BYTES)
        file.flush()
        _write_changed_rows(tol, overlay, source, file.fileno(), len(first) - tol.data_start)
        os.fsync(file.fileno())
    return f"{output}: a copy of {tol.path} with these edits"


def _write_changed_rows(tol: TolFile, overlay: Overlay, source: FileSource, fd: int, shift: int) -> None:
    """Encodes the parts that edits change and writes them, with new checksums, into the rows of a copy.

    Args:
      source: the edited rows.
      fd: of the copy.
      shift: bytes by which the copy's data lies further back than the data of the file.
    Raises: ArgumentError if an edit gives a token a layer that its tier does not hold.
    """
    layout = tol.layout
    bases = {name: jnp.asarray(tol.basis(name)) for name in layout.rotated}
    changed = _changed_parts(overlay, layout.layers)
    tokens = np.array(sorted(changed, key=lambda token: tol.row_of_token[token]), np.int32)  # in the order of the disk
    reader = RowReader(tol)
    encoders = [jax.jit(functools.partial(codec.encode, tier.parts)) for tier in layout.tiers]
    for chunk in vocabulary.chunks(tokens, _COPY_ROWS):
        raw, tier_U = reader.read(chunk.real_ids)
        vectors = source.vectors(chunk.ids)
        _check_storable(layout, vectors, chunk.real_ids, tier_U)
        # Every row is encoded for every tier, so that shapes stay static; the bytes for its own tier are used.
        encoded = {}
        for number, tier in enumerate(layout.tiers):
            if tier.parts:
                encoded[number] = np.asarray(encoders[number](vectors, bases))
        for i, (token, number) in enumerate(zip(chunk.real_ids.tolist(), tier_U.tolist())):
            # Only the changed parts: encoding decoded integers again might choose other scales.
            offset = 0
            for part in layout.tiers[number].parts:
                if part.name in changed[token]:
                    raw[i, offset : offset + part.bytes] = encoded[number][i, offset : offset + part.bytes]
                offset += part.bytes
            row = int(tol.row_of_token[token])
            row_bytes = raw[i, : layout.tiers[number].stride]
            os.pwrite(fd, row_bytes.tobytes(), shift + int(tol.start_of_row[row]))
            os.pwrite(fd, checksum(row_bytes).to_bytes(8, "little"), shift + tol.tensors["checksums"].start + 8 * row)
    reader.close()


def _check_storable(layout: Layout, vectors: dict, tokens: np.ndarray, tier_U: np.ndarray) -> None:
    """Checks that each layer that a token's tier drops is zero in the token's edited row. Raises: ArgumentError."""
    for number, tier in enumerate(layout.tiers):
        is_here = np.nonzero(tier_U == number)[0]
        held = {part.layer for part in tier.parts}
        for layer in layout.dropped_layers():
            if layer in held or not len(is_here):
                continue
            lost = is_here[np.asarray(vectors[f"ffn.{layer}"])[is_here].any(1)]
            if len(lost):
                raise ArgumentError(
                    "output",
                    f"expected edits of layers that the rows hold, found one of layer {layer} of token "
                    f"#{tokens[lost[0]]}, whose tier {number} drops that layer; an overlay can hold this edit",
                )


def _changed_parts(overlay: Overlay, layers: int) -> dict[int, set[str]]:
    """{token: names of the parts of its row that some edit changes}."""
    changed: dict[int, set[str]] = {}
    for edit in overlay.edits:
        if edit.gives_rows:
            ids = edit.ids
            names = {f"ffn.{layer}" for layer in range(layers)}
        else:
            ids = np.nonzero(edit.coefficients)[0]
            names = {f"ffn.{edit.layer}"}
        for token in ids.tolist():
            changed.setdefault(token, set()).update(names)
    return changed
