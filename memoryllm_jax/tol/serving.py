"""Opens a trained model for use, its rows computed live or looked up in a ToL file."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated

from memoryllm_jax.checkpoint.trained import Digest, TrainedModel
from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference import ahead
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.inference.rows import LiveRows, RowSource
from memoryllm_jax.tol.cached_rows import CachedRows
from memoryllm_jax.tol.edited_rows import EditedRows
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.memory import FileMemory, LiveMemory
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.rows import DeviceRows, FileRows, HostTable
from memoryllm_jax.tol.sources import Repair

PLACES = ("device", "host", "disk")
CACHE_BYTES = 256 << 20  # the cache of host and disk, unless another size is asked for


def open_engine(
    workdir: str,
    tol: str = "",
    rows: str = "",
    cache: int | None = None,
    overlay: str = "",
    step: int | None = None,
    dtype: str = "",
    mesh=None,
    compile_ahead: Callable[[Engine], None] | None = None,
) -> Engine:
    """Opens a trained model, ready to generate.

    Args:
      workdir: folder with the model's checkpoints.
      tol: path of a ToL file; "" to compute rows from the weights. With a file, FFN-M and an untied embedding are never
        loaded.
      rows: where the file's rows are served from: device, host or (the default) disk.
      cache: size in bytes of the cache of rows on the device, for host and disk; by default CACHE_BYTES.
      overlay: path of an overlay that `tol edit` wrote, or "". It edits rows of a ToL file and live rows.
      step, dtype, mesh: as of `TrainedModel`.
      compile_ahead: uses the engine for what it will be used for, inside `ahead.only_shapes`: without a ToL file it is
        called while the parameters are read.
    Raises: UserError.
    """
    place = rows or "disk"
    if tol and place not in PLACES:
        raise ArgumentError("rows", f"expected one of {', '.join(PLACES)}, found {rows!r}")
    with contextlib.ExitStack() as on_error:
        # What is wrong shows before the weights are read, which takes longest: first the file, then the configuration.
        file = on_error.enter_context(contextlib.closing(TolFile(tol))) if tol else None
        trained = on_error.enter_context(contextlib.closing(TrainedModel(workdir, step, dtype, mesh)))
        if file is None:
            engine = _open_live(trained, overlay, compile_ahead)
        else:
            file.check_model(trained.config, trained.tokenizer.digest, None)
            edits = Overlay.open(overlay, FileMemory(file)) if overlay else None
            digest = Digest()
            params = trained.load(lambda name: not trained.is_memory(name), digest)
            file.check_model(trained.config, trained.tokenizer.digest, digest.text())
            source = _open_rows(file, place, cache, trained, params.get("embedding"))
            engine = Engine(trained, params, EditedRows(source, edits, trained.mesh) if edits else source)
        on_error.pop_all()  # all is well: the engine closes the checkpoint and the rows, which close the file
    return engine


def _open_live(trained: TrainedModel, overlay: str, compile_ahead) -> Engine:
    """An engine whose rows are computed from the weights. The arguments are those of `open_engine`."""
    shapes = trained.shapes()
    source: RowSource = LiveRows(trained.config, shapes, trained.mesh)
    edits = None
    if overlay:
        memory = LiveMemory(trained)
        edits = Overlay.open(overlay, memory, is_read=False)
        source = EditedRows(source, edits, trained.mesh)
    engine = Engine(trained, shapes, source)
    with ahead.in_background(functools.partial(compile_ahead or (lambda engine: None), engine)):
        digest = memory.digest() if edits else None
        params = trained.load(lambda name: True, digest)
        if edits:
            memory.fill(params, digest.text())
            edits.check_rows()
        engine.fill(params)
    return engine


def _open_rows(file: TolFile, place: str, cache: int | None, trained: TrainedModel, embedding) -> FileRows:
    """A file's rows, served from `place`; damaged ones are computed again from the checkpoint."""
    repair = Repair(trained, file)
    if place == "device":
        return DeviceRows(file, trained.mesh, embedding, repair)
    table = HostTable(file, repair) if place == "host" else RowReader(file, repair=repair)
    size = CACHE_BYTES if cache is None else cache
    return CachedRows(table, trained.mesh, size, embedding)


def memory_of(engine: Engine, weights: Mapping | None = None) -> FileMemory | LiveMemory:
    """The memory of an engine, without the edits of `open_engine`.

    Args:
      engine: the model.
      weights: parameters with "embedding" and "memory" as the engine's `TrainedModel.load` gives them, or that will
        read them; None: what a key needs and the engine lacks is read for the memory alone.
    Raises: UserError if the model has no rows that edits can replace.
    """
    rows = engine.rows.source if isinstance(engine.rows, EditedRows) else engine.rows
    if isinstance(rows, FileRows):
        # Keys are computed in the dtype of the rows.
        if engine.config.dtype != rows.tol.metadata["dtype"]:
            weights = None
        return FileMemory(rows.tol, engine.trained, weights)
    return LiveMemory(engine.trained, rows.arrays)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model is run, and where its rows come from: the options of every command that runs one."""

    workdir: Annotated[str, Option("folder with the trained model's checkpoints")]
    tol: Annotated[str, Option("ToL file; without it rows are computed from the weights")] = ""
    rows: Annotated[str, Option("where the ToL file's rows are served from: device, host or, by default, disk")] = ""
    cache: Annotated[
        str, Option("size of the cache of rows on the device, with --rows=host or disk; by default 256MiB")
    ] = ""
    step: Annotated[int | None, Option("checkpoint to read; by default the newest")] = None
    dtype: Annotated[str, Option("float32 or bfloat16, for the computation; by default that of the training")] = ""

    def open(self, mesh=None, compile_ahead: Callable[[Engine], None] | None = None) -> Engine:
        """Opens the engine.

        Args:
          mesh: as of `TrainedModel`.
          compile_ahead: as of `open_engine`.
        Raises: UserError.
        """
        return self._open(mesh, compile_ahead)

    def _open(self, mesh, compile_ahead, overlay=""):
        if not self.tol and (self.rows or self.cache):
            name = "rows" if self.rows else "cache"
            raise ArgumentError(name, "expected a ToL file too, as it says how the rows of one are served")
        return open_engine(
            self.workdir,
            tol=self.tol,
            rows=self.rows,
            cache=options.size(self.cache, "cache") if self.cache else None,
            overlay=overlay,
            step=self.step,
            dtype=self.dtype,
            mesh=mesh,
            compile_ahead=compile_ahead,
        )


@dataclasses.dataclass(frozen=True)
class EngineOptions(ModelOptions):
    """The options of commands that run a model as it is or changed. `open` makes the engine that they ask for."""

    overlay: Annotated[str, Option("file of edits of the rows, live or from a ToL file, written by `tol edit`")] = ""
    alpha: Annotated[float, Option("factor of FFN-M's output, live or from a ToL file; in base, of the FFN's")] = 1.0
    alpha_compute: Annotated[float, Option("factor of FFN-C's output, in flex")] = 1.0
    drop_layers: Annotated[
        tuple[str, ...], Option("layers whose FFN-M output is left out, or in base the FFN's, such as 0,5")
    ] = ()
    drop_compute: Annotated[tuple[str, ...], Option("layers whose FFN-C output is left out, in flex")] = ()

    def open(self, mesh=None, compile_ahead: Callable[[Engine], None] | None = None) -> Engine:
        """Opens the engine. The arguments are those of `ModelOptions.open`. Raises: UserError."""
        ahead = compile_ahead and functools.partial(self._compile_ahead, compile_ahead)
        engine = self._open(mesh, ahead, self.overlay)
        with contextlib.ExitStack() as on_error:
            on_error.callback(engine.close)
            self._contribute(engine)
            on_error.pop_all()  # all is well: the caller closes the engine
        return engine

    def _compile_ahead(self, compile_ahead, engine):
        self._contribute(engine)  # a scaled decoder has other arguments, so that other functions compile
        compile_ahead(engine)

    def _contribute(self, engine):
        contribution = Contribution(
            alpha=self.alpha,
            alpha_compute=self.alpha_compute,
            drop_layers=options.layers(self.drop_layers, "drop_layers", engine.config.layers),
            drop_compute=options.layers(self.drop_compute, "drop_compute", engine.config.layers),
        )
        # Weights are scaled only if asked for: the plain engine needs no scaled copies of them.
        if contribution != Contribution():
            engine.contribute(contribution)
