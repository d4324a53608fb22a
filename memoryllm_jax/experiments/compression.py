"""What compressed rows of the token memory cost in quality: bits, ranks, and the budget mode."""

import jax
import numpy as np

from memoryllm_jax.common import plots, report
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset, statistics
from memoryllm_jax.evaluation.measure import Measure, change
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol import budget, build, compress

BITS = ("32", "16", "8", "4", "3", "2")
RANKS = ("0.9", "0.8", "0.7", "0.6", "0.5")


class StoredRows:
    """Rows as a file of a layout gives them back, made from the weights: full rows are encoded, and decoded again."""

    on_device = True

    def __init__(self, source: build.LiveSource, layout, bases: dict, tier_of_token: np.ndarray, embedding=None):
        self._source, self._layout, self._bases = source, layout, bases
        self._tiers, self._embedding = jax.numpy.asarray(tier_of_token), embedding

    def fetch(self, ids_U) -> TokenRows:
        vectors = budget.as_stored(self._layout, self._source.vectors(ids_U), self._tiers[ids_U], self._bases)
        x0 = vectors["x0"] if "x0" in vectors else self._embedding[ids_U]
        ffn = [vectors.get(f"ffn.{layer}") for layer in range(self._source.layers)]
        return TokenRows(x0[None], [None if y is None else y[None] for y in ffn])

    def stats(self) -> dict:
        return {"rows": "stored", "bytes": self._layout.total_bytes}

    def close(self) -> None:
        """Nothing is held open."""


def compression(
    models: Models,
    page: report.Report,
    measure: Measure,
    calibration: str = "",
    bits: tuple = BITS,
    ranks: tuple = RANKS,
) -> dict:
    """Uniform bits (MemoryLLM, Table 7), uniform ranks (Table 8), singular values (Figure 13), and the budget mode.

    Rows of memory or flex go through the codec of a ToL file and back. Ranks are of the SVD of a layer's rows, every
    token counting alike, at 16 bits. The budget mode is asked for the size of each uniform setting; it measures on
    every second window of the held-out split of --calibration, so --data should be other text, or its training split.
    Singular values are over the largest of their layer. Sizes are those of rows and bases; changes are relative to
    full rows.
    """
    if len(models.workdirs) != 1 or models.tol:
        raise UserError("compression: expected one --workdir, of memory or flex, and no --tol")
    page.facts |= {"calibration": calibration}
    if not calibration:
        raise UserError("--calibration: expected prepared data of the model's tokenizer, found nothing")
    for label, model in models:
        if not model.config.memory_dim:
            raise UserError(f"compression: expected memory or flex, found {label}, which has no FFN-M")
        return _compression(label, model, page, measure, calibration, bits, ranks)


def _compression(label, model, page, measure, calibration, bits, ranks):
    source = build.LiveSource(model.trained)
    settings = [("bits", f"{b} bits", compress.uniform(source, compress.Options(bits=b))) for b in bits]
    settings += [
        ("rank", f"16 bits, rank {r}", compress.uniform(source, compress.Options(bits="16", rank=r))) for r in ranks
    ]
    probe = _Trial(source, model, calibration)
    rows = [probe.row("full", "full rows", None, {}, measure)]
    for kind, name, layout in settings:
        rows.append(probe.row(kind, name, layout, probe.plain_bases, measure))
        try:
            planned = probe.planner.layout(layout.total_bytes)
        except UserError:
            continue  # the size of the coarsest setting holds no budget
        rows.append(probe.row("budget", f"budget of the size of {name}", planned, probe.planner.bases, measure))
    metrics = list(rows[0]["quality"])
    head = ["kind", "setting", "bytes", "saved, %", *metrics, *(f"{m} change, %" for m in metrics)]
    whole = budget.plain_layout(source, 16).total_bytes
    lines = []
    for row in rows:
        found = row["quality"]
        changes = [change(found[m], rows[0]["quality"][m]) for m in metrics]
        lines.append(
            [row["kind"], row["setting"], row["bytes"], 100 * (1 - row["bytes"] / whole), *found.values(), *changes]
        )
    page.table(head, lines, f"Compressed rows of {label} (Tables 7 and 8); saved: of 16 bits", csv="settings")
    for metric in metrics:
        page.figure(metric.replace(" ", "-"), _draw(rows, metric), f"Change of {metric} against size of the rows")
    page.figure("singular", _draw_singular(probe.singular), "Singular values of each layer's rows (Figure 13)")
    with page.csv("singular", ["layer", "number", "singular value over the largest"]) as write:
        write([layer, n, value] for layer, values in enumerate(probe.singular) for n, value in enumerate(values))
    return {"settings": rows, "singular_values": probe.singular}


class _Trial:
    """A model's rows, planned and measured."""

    def __init__(self, source, model, calibration):
        self.source, self.model, trained = source, model, model.trained
        counts = statistics.token_counts(dataset.open_for(calibration, model.tokenizer.digest), self.source.vocab_size)
        self.planner = budget.Planner(self.source, budget.scorer(trained, calibration), counts)
        values, self.plain_bases = self.planner.even_bases()
        self.singular = [v / v.max() for v in values.values()]
        self._live = model.rows
        self._embedding = None
        if not source.has_x0:
            self._embedding = trained.load(lambda name: name == "embedding")[0]["embedding"]

    def row(self, kind, name, layout, bases, measure):
        """A setting and what it comes to; None is full rows."""
        if layout is None:
            bits = 32 if self.source.identity.dtype == "float32" else 16
            self.model.rows, size = self._live, budget.plain_layout(self.source, bits).total_bytes
        else:
            size, used, tiers = layout.total_bytes, budget.cut(bases, layout), self.planner.tiers(layout)
            self.model.rows = StoredRows(self.source, layout, used, tiers, self._embedding)
        found = measure(self.model)
        print(f"{name}: {size:,} bytes, {found}", flush=True)
        return {"kind": kind, "setting": name, "bytes": size, "quality": found}


def _draw(rows, metric):
    full = rows[0]["quality"][metric]
    figure, axis = plots.new_figure()
    for number, kind in enumerate(("bits", "rank", "budget")):
        chosen = [row for row in rows if row["kind"] == kind]
        points = sorted((row["bytes"] / 1e6, change(row["quality"][metric], full)) for row in chosen)
        if points:
            axis.plot(*zip(*points), **plots.style_of(number), label=kind if kind == "budget" else f"uniform {kind}")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="rows and bases, MB", ylabel=f"change of {metric}, %")
    plots.legend(axis)
    return figure


def _draw_singular(singular):
    figure, axis = plots.new_figure()
    for layer, values in enumerate(singular):
        shade = 0.1 + 0.8 * layer / max(len(singular) - 1, 1)
        label = f"layer {layer}" if len(singular) <= 8 or layer in (0, len(singular) - 1) else None
        axis.plot(range(1, len(values) + 1), values, color=plots.shade(shade), linewidth=1.2, label=label)
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-4)
    axis.set(xlabel="number of the singular value", ylabel="over the layer's largest")
    plots.legend(axis)
    return figure
