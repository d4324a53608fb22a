"""Perplexity against the size of a ToL: uniform bits, ranks and dropped layers, and the budget mode.

    python benchmarks/quality_by_size.py --workdir=DIR --data=DIR --output=benchmarks/results/NAME

Budgets are planned on one half of the held-out text and everything is reported on the other. Rows go through the
codecs as they do into a file and out of it. Writes NAME.json, NAME.md (the table) and NAME.png (the picture, drawn by
matplotlib: the extra `bench`).
"""

import math

import common
import matplotlib
import matplotlib.pyplot as plt
from absl import flags

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import errors, legacy
from memoryllm_jax.data import statistics
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import contribution
from memoryllm_jax.tol import budget, build, compress

RANKS = (0.9, 0.8, 0.7, 0.6, 0.5)


def uniform_settings(source, least_harmful):
    """{name: (kind, Options)}: the paper's settings and combinations of them."""
    out = {"32 bits": ("bits", compress.Options(bits="32"))}
    for bits in (16, 8, 6, 5, 4, 3, 2):
        out[f"{bits} bits"] = ("bits", compress.Options(bits=str(bits)))
    for rank in RANKS:
        out[f"16 bits, rank {rank:.0%}"] = ("rank", compress.Options(bits="16", rank=str(rank)))
    for bits in (8, 4):
        for rank in (0.75, 0.5):
            out[f"{bits} bits, rank {rank:.0%}"] = ("bits and rank", compress.Options(bits=str(bits), rank=str(rank)))
    for count in range(1, len(least_harmful) // 2 + 1):
        layers = tuple(str(layer) for layer in least_harmful[:count])
        for bits in (16, 4):
            name = f"{bits} bits, without layers {', '.join(sorted(layers))}"
            out[name] = ("dropped layers", compress.Options(bits=str(bits), drop_layers=layers))
    return out


def drop_order(source, scorer, vectors):
    """Layers in the order in which dropping them, on top of those before, harms least."""

    def loss(dropped):
        gone = {f"ffn.{layer}" for layer in dropped}
        return scorer.nats({name: x for name, x in vectors.items() if name not in gone})

    singles = [loss([layer]) for layer in range(source.layers)]
    return [layer for layer, _ in contribution.greedy(loss, singles, source.layers // 2)]


def main():
    f = flags.FLAGS
    trained = TrainedModel(f.workdir)
    source = build.LiveSource(trained)
    dataset = Dataset(f.data)
    counts = statistics.token_counts(dataset, source.vocab_size)
    calibration = budget.scorer(trained, f.data)
    held_out = budget.scorer(trained, f.data, f.tokens, half=1)
    planner = budget.Planner(source, calibration, counts)
    vectors = budget.full_vectors(source, held_out.ids)
    rows = []

    def add(kind, name, layout, bases):
        nats = planner.loss(layout, held_out, vectors, bases)
        rows.append({"kind": kind, "setting": name, "bytes": layout.total_bytes, "perplexity": math.exp(nats)})
        print(f"{name:<44}{layout.total_bytes:>12,}{math.exp(nats):>10.3f}", flush=True)

    full = math.exp(held_out.nats(vectors))
    print(f"full rows: perplexity {full:.3f} on {held_out.tokens:,} held-out tokens\n{'setting':<44}{'bytes':>12}")
    _, uniform_bases = planner.even_bases()
    harmless = drop_order(source, calibration, budget.full_vectors(source, calibration.ids))
    for name, (kind, setting) in uniform_settings(source, harmless).items():
        add(kind, name, compress.uniform(source, setting), uniform_bases)
    for size in sorted({row["bytes"] for row in rows}):
        try:
            layout = planner.layout(size)
        except errors.UserError:
            continue
        add("budget", f"budget of {size:,}", layout, planner.bases)
        rows[-1]["budget"] = size
    beaten = compare(rows)
    table = write_table(rows, full, f.output)
    draw(rows, full, f"{f.output}.png")
    common.write(f"{f.output}.json", rows, {"full_perplexity": full, "tokens": held_out.tokens} | beaten)
    print(f"\n{table}\nbudget mode against uniform settings of no smaller size: {beaten}")
    return 0


def compare(rows):
    """Each uniform setting against the budget of its own size."""
    found = {row["budget"]: row["perplexity"] for row in rows if row["kind"] == "budget"}
    better = [row["setting"] for row in rows if row["kind"] != "budget" and found[row["bytes"]] < row["perplexity"]]
    worse = [row["setting"] for row in rows if row["kind"] != "budget" and found[row["bytes"]] >= row["perplexity"]]
    return {"budget_better_than": len(better), "budget_not_better_than": worse}


def write_table(rows, full, output):
    found = {row["budget"]: row for row in rows if row["kind"] == "budget"}
    lines = [
        "| setting | bytes | perplexity | budget of the same size | its bytes |",
        "| --- | --- | --- | --- | --- |",
        f"| full rows | | {full:.3f} | | |",
    ]
    for row in rows:
        if row["kind"] != "budget":
            peer = found[row["bytes"]]
            lines.append(
                f"| {row['setting']} | {row['bytes']:,} | {row['perplexity']:.3f} | {peer['perplexity']:.3f} "
                f"| {peer['bytes']:,} |"
            )
    with open(f"{output}.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    return "\n".join(lines)


def draw(rows, full, path):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    marks = {"bits": "o-", "rank": "s-", "bits and rank": "D", "dropped layers": "^", "budget": "k*-"}
    for kind, mark in marks.items():
        points = sorted((r["bytes"] / 1e6, 100 * (r["perplexity"] / full - 1)) for r in rows if r["kind"] == kind)
        if points:
            sizes, rises = zip(*points)
            axes.plot(sizes, rises, mark, label=kind, markersize=9 if kind == "budget" else 5, linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)  # linear near zero, where differences are noise of either sign
    axes.set_xticks(ticks := _ticks([r["bytes"] / 1e6 for r in rows]), [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_yticks(rises := [-0.05, 0, 0.05, 0.1, 0.3, 1, 3, 10], [f"{rise:g}%" for rise in rises])
    axes.set_ylim(bottom=-0.07)
    axes.set_xlabel("rows and bases, MB")
    axes.set_ylabel(f"rise of perplexity over {full:.2f} of full rows")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _ticks(sizes):
    steps = [m * 10**e for e in range(-2, 6) for m in (1, 2, 3, 5)]
    return [t for t in steps if min(sizes) * 0.8 <= t <= max(sizes) * 1.2]


if __name__ == "__main__":
    matplotlib.use("Agg")
    flags.DEFINE_string("workdir", None, "the model's checkpoints", required=True)
    flags.DEFINE_string("data", None, "prepared data", required=True)
    flags.DEFINE_integer("tokens", 1 << 16, "held-out tokens to report on")
    flags.DEFINE_string("output", None, "path of the results, without an ending", required=True)
    legacy.run(main)
