"""What a request changes in the model for itself alone: edits of the token memory, and factors of the FFN outputs."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import msgspec

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.records import Count
from memoryllm_jax.config import ModelConfig
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.model import memories
from memoryllm_jax.server.bodies import Body
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.overlay_folder import OverlayFolder, bytes_of
from memoryllm_jax.server.recent import Recent
from memoryllm_jax.tol.edit import Editor
from memoryllm_jax.tol.edit_spec import EditSpec
from memoryllm_jax.tol.memory import NEEDS_ROWS
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.serving import memory_of

_MOST_EDITS = 256  # of a request
_MOST_FACTOR = 100.0  # larger ones could make the model's activations infinite
_MADE_BYTES = 256 << 20  # of overlays made from requests that are kept
_Factor = Annotated[float, msgspec.Meta(ge=0, le=_MOST_FACTOR)]
_Layers = Annotated[tuple[Count, ...], msgspec.Meta(max_length=4096)]


class Factors(Body):
    """Factors of the FFN outputs, with the fields of `Contribution`."""

    alpha: _Factor = 1.0
    alpha_compute: _Factor = 1.0
    drop_layers: _Layers = ()
    drop_compute: _Layers = ()


class Edits(Body):
    """The edits of a request: those of the overlay of this name first, then `edits`."""

    overlay: str | None = None
    edits: Annotated[tuple[EditSpec, ...], msgspec.Meta(max_length=_MOST_EDITS)] | None = None


class Changes(Edits):
    """The fields of a request that change the model for it."""

    contribution: Factors | None = None


class Changed(NamedTuple):
    """What a request changes.

    Attributes:
      overlay: edits of the token memory, or None. Do not change it: other requests may have the same one.
      contribution: factors of the FFN outputs.
    """

    overlay: Overlay | None
    contribution: Contribution


def contribution_of(factors: Factors | None, config: ModelConfig) -> Contribution:
    """The factors of a request, which the architecture must have. Raises: ApiError."""
    if factors is None:
        return Contribution()
    chosen = {field.name: getattr(factors, field.name) for field in dataclasses.fields(Contribution)}
    contribution = Contribution(**chosen)
    try:
        contribution.factors(config)
    except ArgumentError as error:
        raise ApiError(400, f"contribution.{error}", f"contribution.{error.name}") from error
    return contribution


class Editing:
    """Makes the overlays that requests ask for. Several threads may call it.

    Args:
      engine: the model.
      weights: its parameters; those of FFN-M are read from it where a key is suppressed.
      folder: the folder of the overlays that requests may name; "": they may name none.
    Attributes:
      memory: the model's token memory; None for a model without rows that edits can replace.
      folder: the overlays by name, or None.
    Raises: ArgumentError for overlays of a model without such rows.
    """

    def __init__(self, engine: Engine, weights: Mapping, folder: str = ""):
        self.memory = None
        if memories.can_edit(engine.config):
            self.memory = memory_of(engine, weights)
            self.memory.name = "the served model"  # in error messages: requests do not learn paths of the server
        elif folder:
            raise ArgumentError("overlays", f"{NEEDS_ROWS}, found {engine.config.architecture}")
        self.folder = OverlayFolder(folder, self.memory) if folder else None
        self._made: Recent[tuple, Overlay] = Recent(_MADE_BYTES)

    def names(self) -> list[str]:
        """The names of the overlays that requests may name."""
        return [] if self.folder is None else self.folder.names()

    def overlay(self, body: Edits) -> Overlay | None:
        """The edits of a request, None if there are none. Do not change them. Raises: ApiError."""
        if self.memory is None and (body.edits or body.overlay is not None):
            name = "edits" if body.edits else "overlay"
            raise ApiError(400, f"{name}: {NEEDS_ROWS}, found one without", name)
        base = None if body.overlay is None else self._named(body.overlay)
        if not body.edits:
            return base
        # A page asks for the same edits again and again, and a suppressed key takes a pass over the vocabulary.
        key = base, msgspec.json.encode(body.edits)
        return self._made.get(key, lambda: self._edited(base, body.edits), bytes_of)

    def _named(self, name):
        if self.folder is None:
            raise ApiError(400, "overlay: expected a server with --overlays=FOLDER, found one without", "overlay")
        return self.folder.open(name)

    def _edited(self, base, edits):
        overlay = Overlay(self.memory, () if base is None else base.edits)
        editor = Editor(overlay)
        for number, edit in enumerate(edits):
            try:
                editor.add(edit)
            except ArgumentError as error:
                raise ApiError(400, f"edits[{number}]: {error}", "edits") from error
        return overlay
