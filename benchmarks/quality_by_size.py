"""Perplexity against the size of a ToL: uniform bits, ranks and dropped layers, and the budget mode.

    python benchmarks/quality_by_size.py --workdir=DIR --data=DIR --output=benchmarks/results/NAME

`analyze compression` measures uniform bits and uniform ranks on text of the user's choice. This script adds settings
that combine bits with ranks or with dropped layers. It reports all of them, and for each the budget of its size, on one
half of the held-out text; budgets are planned on the other half. Rows are encoded as in a ToL file and decoded again.
Writes NAME.json, NAME.md (the table) and NAME.png; needs matplotlib (the extra `bench`).
"""

import math
from typing import Annotated

import common
import matplotlib
import matplotlib.pyplot as plt

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import statistics
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import contribution
from memoryllm_jax.tol import budget, compress
from memoryllm_jax.tol.sources import LiveSource, full_vectors

BITS = (32, 16, 8, 6, 5, 4, 3, 2)
RANKS = (0.9, 0.8, 0.7, 0.6, 0.5)
MARKS = {"bits": "o-", "rank": "s-", "bits and rank": "D", "dropped layers": "^", "budget": "k*-"}


class Trial:
    """Measures a model with its rows stored in one setting after another.

    Args:
      tokens: held-out tokens to report on, at most.
    Attributes:
      full: perplexity with full rows.
      rows: the record's rows {"kind", "setting", "bytes", "perplexity"}; those of the budget mode also have "budget",
        the size in bytes that it was given.
    """

    def __init__(self, workdir: str, data: str, tokens: int):
        trained = TrainedModel(workdir)
        self.source = LiveSource(trained)
        counts = statistics.token_counts(Dataset(data), self.source.vocab_size)
        self.calibration = budget.scorer(trained, data)
        self.held_out = budget.scorer(trained, data, tokens, half=1)
        self.planner = budget.Planner(self.source, self.calibration, counts)
        _, self.uniform_bases = self.planner.even_bases()
        self._vectors = full_vectors(self.source, self.held_out.ids)
        self.full = math.exp(self.held_out.nats(self._vectors))
        self.rows: list[dict] = []

    def drop_order(self) -> list[str]:
        """Half of the layers, in the order in which dropping them one after another raises the loss least."""
        vectors = full_vectors(self.source, self.calibration.ids)

        def loss(dropped):
            gone = {f"ffn.{layer}" for layer in dropped}
            return self.calibration.nats({name: x for name, x in vectors.items() if name not in gone})

        layers = self.source.layers
        drops = contribution.greedy(loss, [loss([layer]) for layer in range(layers)], layers // 2)
        return [str(drop.layer) for drop in drops]

    def add_uniform(self, kind: str, name: str, setting: compress.Options) -> None:
        self._add(kind, name, compress.uniform(self.source, setting), self.uniform_bases)

    def add_budget(self, size: int) -> None:
        """Adds the budget of this size, if its coarsest rows are that small."""
        try:
            layout = self.planner.layout(size)
        except UserError:
            return
        self._add("budget", f"budget of {size:,}", layout, self.planner.bases)
        self.rows[-1]["budget"] = size

    def _add(self, kind, name, layout, bases):
        perplexity = math.exp(self.planner.loss(layout, self.held_out, self._vectors, bases))
        self.rows.append({"kind": kind, "setting": name, "bytes": layout.total_bytes, "perplexity": perplexity})
        print(f"{name:<44}{layout.total_bytes:>12,}{perplexity:>10.3f}", flush=True)


def uniform_settings(drop_order: list[str]) -> list[tuple[str, str, compress.Options]]:
    """The kind, name and options of the paper's settings and of combinations of them."""
    settings = [("bits", f"{bits} bits", compress.Options(bits=str(bits))) for bits in BITS]
    for rank in RANKS:
        settings.append(("rank", f"16 bits, rank {rank:.0%}", compress.Options(bits="16", rank=str(rank))))
    for bits in (8, 4):
        for rank in (0.75, 0.5):
            options = compress.Options(bits=str(bits), rank=str(rank))
            settings.append(("bits and rank", f"{bits} bits, rank {rank:.0%}", options))
    for count in range(1, len(drop_order) // 2 + 1):
        dropped = tuple(drop_order[:count])
        for bits in (16, 4):
            options = compress.Options(bits=str(bits), drop_layers=dropped)
            name = f"{bits} bits, without layers {', '.join(sorted(dropped))}"
            settings.append(("dropped layers", name, options))
    return settings


def with_budgets(rows: list[dict]) -> list[tuple[dict, dict | None]]:
    """Each uniform setting with the budget of its own size, or None if no budget is that small."""
    budgets = {row["budget"]: row for row in rows if row["kind"] == "budget"}
    return [(row, budgets.get(row["bytes"])) for row in rows if row["kind"] != "budget"]


def compare(rows: list[dict]) -> dict:
    """How many uniform settings the budget of their size beats, and which ones it does not."""
    beaten, not_beaten = [], []
    for row, peer in with_budgets(rows):
        if peer and peer["perplexity"] < row["perplexity"]:
            beaten.append(row["setting"])
        elif peer:
            not_beaten.append(row["setting"])
    return {"budget_better_than": len(beaten), "budget_not_better_than": not_beaten}


def table(rows: list[dict], full: float) -> str:
    """The Markdown table of all settings; full: perplexity with full rows."""
    lines = [
        "| setting | bytes | perplexity | budget of the same size | its bytes |",
        "| --- | --- | --- | --- | --- |",
        f"| full rows | | {full:.3f} | | |",
    ]
    for row, peer in with_budgets(rows):
        cells = [row["setting"], f"{row['bytes']:,}", f"{row['perplexity']:.3f}", "", ""]
        if peer:
            cells[3:] = [f"{peer['perplexity']:.3f}", f"{peer['bytes']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict], full: float, path: str) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for kind, mark in MARKS.items():
        points = sorted((r["bytes"] / 1e6, 100 * (r["perplexity"] / full - 1)) for r in rows if r["kind"] == kind)
        if points:
            axes.plot(*zip(*points), mark, label=kind, markersize=9 if kind == "budget" else 5, linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)  # linear near zero, where differences are noise of either sign
    ticks = _ticks([r["bytes"] / 1e6 for r in rows])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    rises = [-0.05, 0, 0.05, 0.1, 0.3, 1, 3, 10]
    axes.set_yticks(rises, [f"{rise:g}%" for rise in rises])
    axes.set_ylim(bottom=-0.07)
    axes.set_xlabel("rows and bases, MB")
    axes.set_ylabel(f"rise of perplexity over {full:.2f} of full rows")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _ticks(sizes):
    """Round numbers that span the sizes."""
    steps = [m * 10**e for e in range(-2, 6) for m in (1, 2, 3, 5)]
    return [t for t in steps if min(sizes) * 0.8 <= t <= max(sizes) * 1.2]


def main(
    workdir: Annotated[str, Option("the model's checkpoints")],
    data: Annotated[str, Option("prepared data")],
    output: Annotated[str, Option("path of the results, without an ending")],
    tokens: Annotated[int, Option("held-out tokens to report on", least=1)] = 1 << 16,
) -> None:
    matplotlib.use("Agg")
    trial = Trial(workdir, data, tokens)
    reported = trial.held_out.tokens
    print(f"full rows: perplexity {trial.full:.3f} on {reported:,} held-out tokens\n{'setting':<44}{'bytes':>12}")
    for kind, name, setting in uniform_settings(trial.drop_order()):
        trial.add_uniform(kind, name, setting)
    for size in sorted({row["bytes"] for row in trial.rows}):
        trial.add_budget(size)
    beaten = compare(trial.rows)
    text = table(trial.rows, trial.full)
    with open(f"{output}.md", "w") as file:
        file.write(text + "\n")
    draw(trial.rows, trial.full, f"{output}.png")
    common.write(f"{output}.json", trial.rows, {"full_perplexity": trial.full, "tokens": reported} | beaten)
    print(f"\n{text}\nbudget mode against uniform settings of no smaller size: {beaten}")


if __name__ == "__main__":
    cli.run(main)
