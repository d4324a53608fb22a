"""Adds edits to an overlay, and writes ToL files with the edits in them."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import options, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference import vocabulary
from memoryllm_jax.tol import codec, edit_spec, header, serving, teach
from memoryllm_jax.tol.edit_spec import OPERATIONS, Blend, EditSpec, Suppress
from memoryllm_jax.tol.edited_rows import EditedRows, EditedSource
from memoryllm_jax.tol.format import ALIGN, TolFile, checksum, text_checksum
from memoryllm_jax.tol.header import Place
from memoryllm_jax.tol.layout import Layout
from memoryllm_jax.tol.memory import FileMemory, LiveMemory
from memoryllm_jax.tol.overlay import Edit, Overlay
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.sources import FileSource, Repair, Source
from memoryllm_jax.tol.teach import Teaching
from memoryllm_jax.tol.writer import to_replace

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
    teaching: Teaching = dataclasses.field(default_factory=Teaching)
    undo: Annotated[int, Option("take back this many of the last edits", least=0)] = 0
    workdir: Annotated[
        str, Option("the model's checkpoints, which --suppress and --teach need, and edits without a ToL file")
    ] = ""
    layers: Annotated[tuple[str, ...], Option("layers that the edits of rows change, such as 0,5; by default all")] = ()
    output: Annotated[str, Option("write a copy of the ToL file with the edits in it", writes=True)] = ""

    @property
    def has_edits(self) -> bool:
        """Whether there are edits to add."""
        return any(getattr(self, name) for name in OPERATIONS) or bool(self.teaching.teach)

    def specs(self, layers: int) -> list[EditSpec]:
        """The edits to add to a memory of this number of layers. Raises: ArgumentError."""
        of_rows = [getattr(self, name) for name in OPERATIONS if name != "suppress"]
        if self.layers and not any([*of_rows, self.teaching.teach]):
            raise ArgumentError("layers", "expected an edit of rows on the same line, found none")
        if self.layers and self.suppress:
            raise ArgumentError("layers", "expected no suppressed key on the same line, as it names its layer itself")
        chosen = options.layers(self.layers, "layers", layers) or None
        return [edit_spec.from_text(name, text, chosen) for name in OPERATIONS for text in getattr(self, name)]


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


def fulfil(tol: TolFile | None, request: Request) -> Result:
    """Adds edits to an overlay or takes some back, and writes the edited file where one is named.

    Args:
      tol: the file whose rows are edited; None: the rows are computed from the newest checkpoint.
    Raises: UserError.
    """
    if tol is None and not request.workdir:
        raise UserError("edit: expected a ToL file or --workdir, found neither")
    if request.output and tol is None:
        raise ArgumentError("output", "expected a ToL file too, which is copied with the edits in it")
    if request.output and os.path.abspath(request.output) == os.path.abspath(request.overlay):
        raise ArgumentError("output", f"expected another file than the overlay, found {request.output}")
    with _opened(tol, request.workdir) as (memory, trained):
        specs = request.specs(memory.layers)
        if request.undo and request.has_edits:
            found = specs[0].operation if specs else "teach"
            raise ArgumentError("undo", f"expected no edit on the same line, found {found}")
        overlay = Overlay.open(request.overlay, memory, missing_ok=request.has_edits)
        editor = Editor(overlay)
        for spec in specs:
            editor.add(spec)
        if request.teaching.teach:
            _teach(trained, tol.path if tol else "", editor, request)
        undone = editor.undo(request.undo) if request.undo else []
        written = write_edited(tol, overlay, request.output, memory.repair) if request.output else ""
        if request.has_edits or undone:  # saved last, so that a line that failed can be run again
            overlay.save(request.overlay)
    return Result(undone, [edit.text for edit in overlay.edits], written)


@contextlib.contextmanager
def _opened(tol: TolFile | None, workdir: str) -> Iterator[tuple[FileMemory | LiveMemory, TrainedModel | None]]:
    """The memory of a file or, without one, of the newest checkpoint; and the model if there is a workdir."""
    with contextlib.ExitStack() as stack:
        trained = None
        if workdir:
            step, dtype = (None, "") if tol is None else (tol.step, tol.metadata["dtype"])
            trained = stack.enter_context(contextlib.closing(TrainedModel(workdir, step, dtype)))
            if tol is not None:
                tol.check_model(trained.config, trained.tokenizer.digest, None)
        memory = LiveMemory(trained) if tol is None else FileMemory(tol, trained)
        yield stack.enter_context(contextlib.closing(memory)), trained


def _teach(trained: TrainedModel | None, tol: str, editor: "Editor", request: Request) -> None:
    """Adds a learned edit to those that the overlay has already. Raises: UserError."""
    if trained is None:
        raise ArgumentError("teach", "expected a workdir too, as rows are learned through the model's decoder")
    layers = options.layers(request.layers, "layers", trained.config.layers) or None
    with contextlib.closing(serving.open_engine(request.workdir, tol, step=trained.step)) as engine:
        engine.rows = EditedRows(engine.rows, editor.overlay, engine.trained.mesh)
        teaching = request.teaching
        learned = teach.learn(engine, teaching.lessons(), teaching.token, layers, teaching.method)
        editor.give(teach.described(engine, teaching.lessons(), learned), learned.rows, layers)


class Editor:
    """Adds edits to an overlay, and takes them back.

    Args:
      overlay: is changed in place.
    """

    def __init__(self, overlay: Overlay):
        self.overlay, self.memory = overlay, overlay.memory

    def add(self, spec: EditSpec) -> None:
        """Adds an edit. Raises: UserError."""
        if isinstance(spec, Suppress):
            self._suppress(spec)
        else:
            self._mix_rows(spec)

    def give(self, text: str, rows: dict[int, np.ndarray], layers: tuple[int, ...] | None = None) -> None:
        """Adds an edit that gives tokens new rows which are no mix of others, such as learned ones.

        Suppressing a key later takes away from such a row what the key added to the token's row before.

        Args:
          text: the edit in words; a checksum of the rows is added, as a text determines its edit.
          rows: float32 [k, D] by token id, the new rows in the k layers.
          layers: the layers that change; None for all.
        Raises: ArgumentError.
        """
        layers = self._layers(layers)
        given = np.stack([np.asarray(row_kD, np.float32) for row_kD in rows.values()])
        if not np.isfinite(given).all():
            raise ArgumentError("rows", f"expected finite numbers, found others in the edit {text!r}")
        mix = [[(token, 1.0)] for token in rows]
        self._give(f"{text}{_in_layers(layers)} ({text_checksum(given)})", list(rows), given, mix, layers)

    def _mix_rows(self, spec):
        ids = [self.memory.token(token, spec.operation) for token in spec.tokens]
        if len(set(ids)) < len(ids):
            problem = f"expected two different tokens, found the same one twice: #{ids[0]}"
            raise ArgumentError(spec.operation, problem)
        layers = self._layers(spec.layers)
        mix = spec.mix(*ids)
        row_of = dict(zip(ids, self.overlay.rows(np.array(ids, np.int32))))
        zeros = np.zeros_like(row_of[ids[0]])
        rows = np.stack([sum((weight * row_of[token] for token, weight in made_of), zeros) for made_of in mix.values()])
        text = " ".join([spec.operation, *(f"#{i} {self.memory.tokenizer.decode([i])!r}" for i in ids)])
        if isinstance(spec, Blend):
            text += f" {spec.share!r}"
        rows = rows if layers is None else rows[:, list(layers)]
        self._give(text + _in_layers(layers), list(mix), rows, list(mix.values()), layers)

    def _give(self, text, ids, rows, mix, layers):
        self.overlay.add(Edit(text, ids=np.array(ids, np.int32), rows=rows, mix=mix, layers=layers))

    def _layers(self, layers) -> tuple[int, ...] | None:
        """The layers in rising order; None for all. Raises: ArgumentError."""
        if layers is None:
            return None
        L = self.memory.layers
        for layer in layers:
            if not 0 <= layer < L:
                raise ArgumentError("layers", f"expected layers from 0 to {L - 1}, found {layer}")
        chosen = tuple(sorted(set(layers)))
        return None if len(chosen) == L else chosen

    def _suppress(self, spec):
        text = f"suppress layer {spec.layer} key {spec.key}"
        if any(edit.text == text for edit in self.overlay.edits):
            raise ArgumentError("suppress", f"expected a key that is not suppressed yet, found {spec.layer}:{spec.key}")
        if spec.layer < self.memory.layers and not self.memory.holds(spec.layer).any():
            expected = f"expected a layer that {self.memory.name} holds"
            raise ArgumentError("suppress", f"{expected}, found {spec.layer}, which it dropped")
        key = self.memory.key(spec.layer, spec.key)
        coefficients_V = self.overlay.mixed(key.coefficients_V, spec.layer)
        self.overlay.add(Edit(text, layer=spec.layer, coefficients=coefficients_V, value=key.value_D))

    def undo(self, count: int) -> list[str]:
        """Takes back the last edits. Returns: what they were. Raises: ArgumentError if there are fewer."""
        most = len(self.overlay.edits)
        if not 1 <= count <= most:
            raise ArgumentError("undo", f"expected from 1 to {most}, the number of edits, found {count}")
        return [edit.text for edit in self.overlay.take_back(count)]


def _in_layers(layers: tuple[int, ...] | None) -> str:
    """The end of an edit's text that names its layers."""
    return "" if layers is None else f" in layers {','.join(map(str, layers))}"


def write_edited(tol: TolFile, overlay: Overlay, output: str, repair: Repair | None = None) -> str:
    """Writes a copy of the file with the edits in its rows. Parts that no edit changes keep their bytes.

    Args:
      repair: computes rows of edited tokens that are damaged; None: they are refused. Damaged rows of other tokens are
        copied with the checksums that they fail.
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
        contextlib.closing(FileSource(tol, repair)) as source,
        contextlib.closing(RowReader(tol, repair=repair)) as reader,
        storage.replaced(output) as part,
        open(tol.path, "rb") as original,
        open(part, "w+b") as file,
    ):
        file.write(first)
        original.seek(tol.data_start)
        shutil.copyfileobj(original, file, _COPY_BYTES)
        file.flush()
        shift = len(first) - tol.data_start
        _write_changed_rows(tol, overlay, EditedSource(source, overlay), reader, file.fileno(), shift)
        os.fsync(file.fileno())
    return f"{output}: a copy of {tol.path} with these edits"


def _write_changed_rows(tol: TolFile, overlay: Overlay, source: Source, reader: RowReader, fd: int, shift: int) -> None:
    """Encodes the parts that edits change and writes them, with new checksums, into the rows of a copy.

    Args:
      source: the edited rows.
      reader: gives the file's rows as they are stored.
      fd: of the copy.
      shift: bytes by which the copy's data lies further back than the data of the file.
    Raises: ArgumentError if an edit gives a token a layer that its tier does not hold.
    """
    layout = tol.layout
    bases = {name: jnp.asarray(tol.basis(name)) for name in layout.rotated}
    changed = _changed_parts(overlay, layout.layers)
    tokens = np.array(sorted(changed, key=lambda token: tol.row_of_token[token]), np.int32)  # in the order of the disk
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
            names = {f"ffn.{layer}" for layer in (range(layers) if edit.layers is None else edit.layers)}
        else:
            ids = np.nonzero(edit.coefficients)[0]
            names = {f"ffn.{edit.layer}"}
        for token in ids.tolist():
            changed.setdefault(token, set()).update(names)
    return changed
