"""What compressed rows of the token memory cost in quality: bits, ranks, and the budget mode of `precompute`."""

import contextlib
from typing import Annotated, NamedTuple

import jax
import numpy as np

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.common import plots, report
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import statistics
from memoryllm_jax.evaluation import scores
from memoryllm_jax.evaluation.measure import Measure
from memoryllm_jax.evaluation.scores import Score
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol import budget, compress
from memoryllm_jax.tol.layout import Layout
from memoryllm_jax.tol.sources import LiveSource, live_vectors

BITS = ("32", "16", "8", "4", "3", "2")
RANKS = ("0.9", "0.8", "0.7", "0.6", "0.5")


class StoredRows:
    """A `RowSource` with the rows that a ToL file of some layout would return, without writing the file.

    Rows are computed from the weights, encoded, and decoded again.

    Args:
      source: the model's full rows.
      layout: the layout of the file.
      bases: {"ffn.LAYER": [rank, D]}, the bases of the layers that the layout stores rotated.
      tier_of_token: int32 [V], the tier that each token's row is stored in.
      embedding: [V, D], if the layout does not store it.
    """

    on_device = True
    weights_bytes = 0  # a file would replace them

    def __init__(self, source: LiveSource, layout: Layout, bases: dict, tier_of_token: np.ndarray, embedding=None):
        self._source, self._layout = source, layout
        self.arrays = (source.params, jax.numpy.asarray(tier_of_token), bases, embedding)

    def fetch(self, ids_U) -> TokenRows:
        with jax.set_mesh(self._source.mesh):
            return self.gather(self.arrays, ids_U)

    def gather(self, arrays, ids_U) -> TokenRows:
        params, tiers_V, bases, embedding_VD = arrays
        vectors = budget.as_stored(
            self._layout, live_vectors(self._source.config, params, ids_U), tiers_V[ids_U], bases
        )
        x0 = vectors["x0"] if "x0" in vectors else embedding_VD[ids_U]
        ffn = [vectors.get(f"ffn.{layer}") for layer in range(self._source.layers)]
        return TokenRows(x0[None], [None if y is None else y[None] for y in ffn])

    def stats(self) -> dict:
        return {"rows": "stored", "bytes": self._layout.total_bytes}

    def close(self) -> None:
        """Does nothing, as no file is open."""


class Setting(NamedTuple):
    """A way to store the rows, with its size and the model's quality.

    kind: "full", "bits", "rank" or "budget".
    setting: name in tables.
    bytes: size of rows and bases.
    quality: as `Measure` returns it.
    """

    kind: str
    setting: str
    bytes: int
    quality: dict[str, Score]


def compression(
    models: Models,
    page: report.Report,
    *,
    measure: Measure,
    calibration: Annotated[str, Option("prepared data to plan a budget on; by default that of the training")] = "",
    bits: Annotated[tuple[str, ...], Option("uniform bits of an element")] = BITS,
    ranks: Annotated[tuple[str, ...], Option("shares of the singular vectors that are kept, at 16 bits")] = RANKS,
) -> dict:
    """Uniform bits (MemoryLLM, Table 7), uniform ranks (Table 8), singular values (Figure 13), and the budget mode.

    Rows of memory or flex are encoded as in a ToL file and decoded again. Uniform ranks keep a share of the singular
    vectors of a layer's rows, at 16 bits; every token has the same weight in the SVD. The budget mode is given the size
    of each uniform setting. It is planned on every second window of the held-out split of --calibration, so --data
    should be other text, or the training split. Singular values are relative to the largest of their layer. Sizes are
    those of rows and bases; changes are relative to full rows, with standard errors over documents of the text and
    examples of the tasks.
    """
    if models.tol:
        raise ArgumentError("tol", "expected none, as rows are compressed here")
    if len(models.workdirs) != 1:
        raise ArgumentError("workdir", f"expected one model, found {len(models.workdirs)}")
    if not models.configs[0].memory_dim:
        raise ArgumentError("workdir", f"expected memory or flex, found {models.labels[0]}, which has no FFN-M")
    calibration = calibration or models.data_of(models.labels[0], "calibration")
    page.facts |= {"calibration": calibration}
    with contextlib.closing(models.open(models.workdirs[0])) as model:
        source = LiveSource(model.trained)
        # Layouts come first: they refuse bad bits and ranks, before the trial spends time on planning.
        layouts = uniform_layouts(source, bits, ranks)
        trial = _Trial(source, model, calibration)
        settings = _measure_settings(trial, layouts, measure)
    page.facts |= scores.facts(settings[0].quality)
    _show_settings(page, settings, trial.plain_bytes, models.labels[0])
    page.figure("singular", _draw_singular(trial.singular), "Singular values of each layer's rows (Figure 13)")
    with page.csv("singular", ["layer", "number", "singular value over the largest"]) as write:
        write([layer, n, value] for layer, values in enumerate(trial.singular) for n, value in enumerate(values))
    return {"settings": _records(settings), "singular_values": trial.singular}


def _records(settings: list[Setting]) -> list[dict]:
    """What the JSON file has of each setting: its quality, and changes relative to full rows with their errors."""
    full, records = settings[0].quality, []
    for setting in settings:
        changes = scores.changes(setting.quality, full)
        quality = {"quality": scores.values(setting.quality)}
        records.append(
            setting._asdict() | quality | {"changes": scores.amounts(changes), "errors": scores.errors(changes)}
        )
    return records


class _Trial:
    """A model that is measured with its rows stored in one way after another.

    Attributes:
      source: its full rows.
      planner: the planner of the budget mode.
      bases: {"ffn.LAYER": [D, D]}, singular vectors of each layer's rows, for uniform ranks.
      singular: for each layer, its singular values over the largest one.
      plain_bytes: size of all rows at 16 bits, which savings are relative to.
    """

    def __init__(self, source: LiveSource, model: Engine, calibration: str):
        self.source, self.model = source, model
        trained = model.trained
        counts = statistics.token_counts(run_data.open_data(trained, calibration), source.vocab_size)
        self.planner = budget.Planner(source, budget.scorer(trained, calibration), counts)
        values, self.bases = self.planner.even_bases()
        self.singular = [v / v.max() for v in values.values()]
        self.plain_bytes = budget.plain_layout(source, 16).total_bytes
        self._full_rows = model.rows
        self._embedding = None
        if not source.has_x0:
            self._embedding = trained.load(lambda name: name == "embedding")["embedding"]

    def full(self, measure: Measure) -> Setting:
        """Measures with full rows, as they are computed from the weights."""
        bits = 32 if self.source.identity.dtype == "float32" else 16
        self.model.rows = self._full_rows
        return self._measure("full", "full rows", budget.plain_layout(self.source, bits).total_bytes, measure)

    def stored(self, kind: str, name: str, layout: Layout, bases: dict, measure: Measure) -> Setting:
        """Measures with the rows that a file of the layout returns."""
        tiers = self.planner.tiers(layout)
        self.model.rows = StoredRows(self.source, layout, budget.cut(bases, layout), tiers, self._embedding)
        return self._measure(kind, name, layout.total_bytes, measure)

    def _measure(self, kind, name, size, measure):
        found = measure(self.model)
        print(f"{name}: {size:,} bytes, {scores.text(found)}", flush=True)
        return Setting(kind, name, size, found)


def uniform_layouts(source: LiveSource, bits, ranks) -> list[tuple[str, str, Layout]]:
    """The kind, name and layout of each uniform setting. Raises: UserError for bits or ranks that do not exist."""
    chosen = [("bits", f"{b} bits", compress.Options(bits=b)) for b in bits]
    chosen += [("rank", f"16 bits, rank {r}", compress.Options(bits="16", rank=r)) for r in ranks]
    return [(kind, name, compress.uniform(source, options)) for kind, name, options in chosen]


def _measure_settings(trial: _Trial, layouts: list[tuple[str, str, Layout]], measure: Measure) -> list[Setting]:
    """Measures full rows, then each uniform setting, each followed by the budget of its size if one is that small."""
    settings = [trial.full(measure)]
    for kind, name, layout in layouts:
        settings.append(trial.stored(kind, name, layout, trial.bases, measure))
        try:
            planned = trial.planner.layout(layout.total_bytes)
        except UserError:
            continue  # even the coarsest rows that a budget can choose are larger than this setting
        name = f"budget of the size of {name}"
        settings.append(trial.stored("budget", name, planned, trial.planner.bases, measure))
    return settings


def _show_settings(page: report.Report, settings: list[Setting], plain_bytes: int, label: str) -> None:
    full = settings[0].quality
    head = ["kind", "setting", "bytes", "saved, %", *full, *scores.change_columns(full)]
    rows = []
    for setting in settings:
        changes = scores.change_cells(scores.changes(setting.quality, full))
        saved = 100 * (1 - setting.bytes / plain_bytes)
        values = scores.values(setting.quality).values()
        rows.append([setting.kind, setting.setting, setting.bytes, saved, *values, *changes])
    caption = f"Compressed rows of {label} (Tables 7 and 8); saved: relative to 16 bits"
    page.table(head, rows, caption, csv="settings")
    for metric in full:
        figure = _draw(settings, metric)
        page.figure(metric.replace(" ", "-"), figure, f"Change of {metric} against size of the rows")


def _draw(settings: list[Setting], metric: str) -> plots.Chart:
    full, lines = settings[0].quality[metric], {}
    for kind in ("bits", "rank", "budget"):
        chosen = [setting for setting in settings if setting.kind == kind]
        points = sorted((setting.bytes / 1e6, *setting.quality[metric].change(full)) for setting in chosen)
        if points:
            lines[kind if kind == "budget" else f"uniform {kind}"] = plots.Line(*zip(*points))
    return plots.Chart(lines, "rows and bases, MB", f"change of {metric}, %", "log", "change")


def _draw_singular(singular) -> plots.Chart:
    lines, last = {}, len(singular) - 1
    for layer, values in enumerate(singular):
        style = {"color": plots.shade(0.1 + 0.8 * layer / max(last, 1)), "linewidth": 1.2, "marker": ""}
        # The legend of a deep model names only its first and last layer: shades show the order of those between.
        if last >= 8 and layer not in (0, last):
            style["label"] = "_nolegend_"
        lines[f"layer {layer}"] = plots.Line(range(1, len(values) + 1), values, style=style | {"linestyle": "-"})
    return plots.Chart(lines, "number of the singular value", "over the layer's largest", y_scale="log", bottom=1e-4)
