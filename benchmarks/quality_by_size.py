"""Loss against the size of a ToL: uniform bits, ranks and dropped layers, and the budget mode, with error bars.

    python benchmarks/quality_by_size.py --workdir=DIR --data=DIR --output=benchmarks/results/NAME

Rows are encoded as in a ToL file and decoded again. All losses are paired: each is the difference of two settings on
the same batches of held-out text, so that what makes a batch easy or hard cancels. Its standard error is estimated from
how the difference varies between batches of neighbouring windows. It says how far other text of this kind would move
the difference, and nothing about models trained with another seed.

Whatever is chosen is chosen on one half of the held-out text, and reported on the other: the bits and ranks of a
budget, the layer to drop, and which of the uniform settings of a size is best. The uniform settings have x0 at fewer
or more bits than the layers, as a budget may have it. A budget is given the sizes of the best uniform settings.
Writes NAME.json, NAME.md (the tables) and NAME.png; needs matplotlib (the extra `bench`).
"""

import math
from typing import Annotated, NamedTuple

import common
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import statistics
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.tol import budget, compress
from memoryllm_jax.tol.layout import Layout
from memoryllm_jax.tol.sources import LiveSource, full_vectors

BITS = (16, 8, 6, 5, 4, 3, 2)
X0_BITS = (16, 8, 6, 4, 3)
RANKS = (0.9, 0.75, 0.5)
_SPACING = 1.04  # sizes that budgets are given are at least this factor apart
SEPARATED = 2.0  # standard errors from zero, from which a difference counts as real
KINDS = ("bits", "rank", "bits and rank", "dropped layer")


class Setting(NamedTuple):
    """A uniform setting: its kind, its name in tables, and its layout."""

    kind: str
    name: str
    layout: Layout


class Difference(NamedTuple):
    """A difference of two losses in nats a token, and its standard error."""

    nats: float
    error: float

    @property
    def percent(self) -> "Difference":
        """The same as a change of perplexity, in percent."""
        return Difference(100 * math.expm1(self.nats), 100 * math.exp(self.nats) * self.error)

    @property
    def is_separated(self) -> bool:
        return abs(self.nats) > SEPARATED * self.error

    def __str__(self):
        return f"{self.percent.nats:+.3f} ± {self.percent.error:.3f}"


def difference(first_N: np.ndarray, second_N: np.ndarray, tokens_N: np.ndarray) -> Difference:
    """The mean loss of `first` minus that of `second`, with the error of a ratio of sums over batches.

    Args:
      first_N, second_N: loss in nats of all tokens of each batch.
      tokens_N: number of tokens of each batch.
    """
    N, tokens = len(tokens_N), tokens_N.sum()
    gain_N = first_N - second_N
    mean = gain_N.sum() / tokens
    spread = np.square(gain_N - mean * tokens_N).sum() * N / (N - 1)
    return Difference(float(mean), float(np.sqrt(spread) / tokens))


class _Text:
    """Held-out text, and the full rows of its tokens, which are stored in one layout after another."""

    def __init__(self, trial: "Trial", scorer: budget.Scorer):
        self.trial, self.scorer = trial, scorer
        self.vectors = full_vectors(trial.source, scorer.ids)
        self.full_N = scorer.batch_nats(self.vectors)

    def loss(self, layout: Layout, bases: dict) -> np.ndarray:
        """Loss in nats of all tokens of each batch, with rows as a file of the layout returns them."""
        tiers_U = self.trial.planner.tiers(layout)[self.scorer.ids]
        return self.scorer.batch_nats(budget.as_stored(layout, self.vectors, tiers_U, budget.cut(bases, layout)))

    def rise(self, losses_N) -> Difference:
        """How far the losses of batches are above those of full rows."""
        return difference(losses_N, self.full_N, self.scorer.batch_tokens)


class Trial:
    """A model that is measured with its rows stored in one way after another.

    Args:
      tokens: held-out tokens to report on, at most.
    Attributes:
      calibration: the text that everything is chosen on.
      held_out: the text that is reported on.
    """

    def __init__(self, workdir: str, data: str, tokens: int):
        trained = TrainedModel(workdir)
        self.source = LiveSource(trained)
        counts = statistics.token_counts(Dataset(data), self.source.vocab_size)
        scorer = budget.scorer(trained, data)
        self.calibration = _Text(self, scorer)
        self.held_out = _Text(self, budget.scorer(trained, data, tokens, half=1))
        self.planner = budget.Planner(self.source, scorer, counts)
        _, self.bases = self.planner.even_bases()

    def least_important(self) -> int:
        """The layer without which the loss rises least."""
        text = self.calibration
        losses = []
        for layer in range(self.source.layers):
            losses.append(text.scorer.nats({name: x for name, x in text.vectors.items() if name != f"ffn.{layer}"}))
        return int(np.argmin(losses))

    def settings(self) -> list[Setting]:
        """All uniform settings: bits, with x0 at its default bits and at others; ranks; and a dropped layer."""
        settings = []
        for bits in BITS:
            plain = self._setting("bits", f"{bits} bits", bits)
            settings.append(plain)
            for x0_bits in X0_BITS if self.source.has_x0 else ():
                other = self._setting("x0", f"{bits} bits, x0 {x0_bits} bits", f"{bits},x0:{x0_bits}")
                if other.layout != plain.layout:
                    settings.append(other)
        settings += [self._setting("rank", f"16 bits, rank {rank:.0%}", 16, rank=str(rank)) for rank in RANKS]
        for bits in (8, 4):
            for rank in (0.75, 0.5):
                settings.append(self._setting("bits and rank", f"{bits} bits, rank {rank:.0%}", bits, rank=str(rank)))
        gone = str(self.least_important())
        for bits in (16, 4):
            name = f"{bits} bits, without layer {gone}"
            settings.append(self._setting("dropped layer", name, bits, drop_layers=(gone,)))
        return settings

    def _setting(self, kind: str, name: str, bits: int | str, **options) -> Setting:
        return Setting(kind, name, compress.uniform(self.source, compress.Options(str(bits), **options)))


def frontier(losses: list[tuple[int, float]]) -> list[int]:
    """Numbers of the settings whose loss is lower than that of all settings that are no larger, smallest first.

    Args:
      losses: (bytes, loss) of each setting.
    """
    best, found = math.inf, []
    for number in sorted(range(len(losses)), key=lambda n: losses[n]):
        if losses[number][1] < best:
            best = losses[number][1]
            found.append(number)
    return found


def spaced(numbers: list[int], sizes: list[int]) -> list[int]:
    """Those of the settings, smallest first, whose sizes are some percent apart."""
    kept: list[int] = []
    for number in numbers:
        if not kept or sizes[number] >= _SPACING * sizes[kept[-1]]:
            kept.append(number)
    return kept


def measure(trial: Trial) -> tuple[list[dict], list[dict]]:
    """Measures all uniform settings, and budgets of the sizes of the best ones.

    Returns: (records of the settings, records of the comparisons).
    """
    settings, text = trial.settings(), trial.held_out
    sizes = [setting.layout.total_bytes for setting in settings]
    chosen_on = [float(trial.calibration.loss(setting.layout, trial.bases).sum()) for setting in settings]
    best = spaced(frontier(list(zip(sizes, chosen_on))), sizes)
    losses, rows = {}, {}
    for number, (kind, name, layout) in enumerate(settings):
        if kind != "x0" or number in best:
            losses[number] = text.loss(layout, trial.bases)
            rise = text.rise(losses[number])
            row = {"kind": kind, "setting": name, "bytes": sizes[number]}
            rows[number] = row | {"rise": rise.nats, "error": rise.error}
            print(f"{name:<48}{sizes[number]:>12,}  {rise}", flush=True)
    pairs = []
    for number in best:
        try:
            layout = trial.planner.layout(sizes[number])
        except UserError:
            continue  # even the coarsest rows that a budget can choose are larger
        budget_N = text.loss(layout, trial.planner.bases)
        rise, gain = text.rise(budget_N), difference(budget_N, losses[number], text.scorer.batch_tokens)
        pair = {"uniform": rows[number], "bytes": layout.total_bytes, "rise": rise.nats, "error": rise.error}
        pairs.append(pair | {"difference": gain.nats, "difference_error": gain.error})
        print(f"budget of {sizes[number]:,}: {rise}, over {rows[number]['setting']}: {gain}", flush=True)
    return list(rows.values()), pairs


def tables(rows: list[dict], pairs: list[dict]) -> str:
    """The Markdown tables: budgets against the best uniform settings of their sizes, then all uniform settings."""
    lines = [
        "Rise of perplexity over full rows in percent, ± one standard error.",
        "",
        "| bytes | best uniform setting | its rise | budget | budget over uniform | separated |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for pair in pairs:
        row, gain = pair["uniform"], Difference(pair["difference"], pair["difference_error"])
        rises = [Difference(found["rise"], found["error"]) for found in (row, pair)]
        verdict = "no"
        if gain.is_separated:
            verdict = "budget better" if gain.nats < 0 else "uniform better"
        cells = [f"{row['bytes']:,}", row["setting"], *map(str, rises), str(gain), verdict]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| uniform setting | bytes | rise |", "| --- | --- | --- |"]
    for row in rows:
        lines.append(f"| {row['setting']} | {row['bytes']:,} | {Difference(row['rise'], row['error'])} |")
    return "\n".join(lines)


def draw(rows: list[dict], pairs: list[dict], full: float, path: str) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shown = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    shown["best uniform"] = [pair["uniform"] for pair in pairs]
    shown["budget"] = pairs
    marks = dict(zip(shown, ("o", "s", "D", "^", "x-", "k*-")))
    for kind, found in shown.items():
        found = sorted(found, key=lambda row: row["bytes"])
        percent = [Difference(row["rise"], row["error"]).percent for row in found]
        bytes_MB, rises = [row["bytes"] / 1e6 for row in found], [rise.nats for rise in percent]
        bars = [rise.error for rise in percent]
        axes.errorbar(bytes_MB, rises, bars, fmt=marks[kind], label=kind, markersize=5, linewidth=1, capsize=2)
    axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)  # linear near zero, where differences are noise of either sign
    ticks = _ticks([row["bytes"] / 1e6 for row in rows])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    rises = [-0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 3, 10]
    axes.set_yticks(rises, [f"{rise:g}%" for rise in rises])
    axes.set_ylim(bottom=-0.1)
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
    output: Annotated[str, Option("path of the results, without an ending", writes=True)],
    tokens: Annotated[int, Option("held-out tokens to report on", least=1)] = 1 << 16,
) -> None:
    matplotlib.use("Agg")
    trial = Trial(workdir, data, tokens)
    text = trial.held_out
    count, batches = text.scorer.tokens, len(text.full_N)
    full = math.exp(text.full_N.sum() / count)
    print(f"full rows: perplexity {full:.3f} on {count:,} held-out tokens in {batches} batches", flush=True)
    rows, pairs = measure(trial)
    written = tables(rows, pairs)
    with open(f"{output}.md", "w") as file:
        file.write(written + "\n")
    draw(rows, pairs, full, f"{output}.png")
    facts = {"full_perplexity": full, "tokens": count, "batches": batches}
    common.write(f"{output}.json", {"uniform": rows, "budget": pairs}, facts)
    print(f"\n{written}")


if __name__ == "__main__":
    cli.run(main)
