"""Loss against tokens of memory and flex-3, started from a trained base and from scratch.

    python benchmarks/conversion.py --data=DIR --workdir=DIR --output=benchmarks/results/conversion

All runs have the shape, batch and recipe of configs/tiny.py, but for --fields, and the same held-out text. Base trains
for --base_steps, runs from scratch for --steps, and converted ones for --share of them; each run has a whole cosine
schedule of its own. Every way runs with each of --seeds, which decides the random parameters and the order of the text;
runs of one seed read the same text. The record has the curves, and by architecture and way the loss at the start and at
the end as [least, median, most] over the seeds. Kill it at any time and run the same line again. Writes NAME.json and
NAME.png; needs matplotlib (the extra `bench`).
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from typing import Annotated, NamedTuple

import common

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option

HERE = os.path.dirname(os.path.abspath(__file__))
# {way to start: value of config.start.memory; None: random parameters}
WAYS = {"from scratch": None, "FFN-M copied": "copy", "FFN-M new": "new", "FFN-M distilled": "distill"}
Curve = list[tuple[int, float]]  # (tokens, held-out loss)


class Runs(NamedTuple):
    """Training runs, each in its own folder of `workdir`, evaluated every `every` steps."""

    workdir: str
    data: str
    every: int

    def folder(self, name: str) -> str:
        return os.path.join(self.workdir, name.replace(",", "").replace(" ", "_"))

    def train(self, name: str, config: str, steps: int, fields: dict) -> Curve:
        """Trains, or resumes a run that was stopped.

        Args:
          config: name of the config file in configs/, with the architecture.
          fields: further fields of the config.
        Returns: the curve of the run. Raises: UserError if training fails.
        """
        fields = {
            "steps": steps,
            "eval.every": self.every,
            "eval.batches": 32,
            "checkpoint.every": steps,
            "data.path": self.data,
            "data.epochs": 9,
            "sample.tokens": 0,
            **fields,
        }
        command = [sys.executable, "-m", "memoryllm_jax.train", f"--config={HERE}/../configs/{config}"]
        command += [f"--workdir={self.folder(name)}", *(f"--config.{field}={value}" for field, value in fields.items())]
        if subprocess.run(command).returncode:
            raise UserError(f"{name}: training failed")
        with open(os.path.join(self.folder(name), "metrics.jsonl")) as file:
            records = [json.loads(line) for line in file]
        tokens_a_step = next(r["tokens"] / r["step"] for r in records if r["kind"] == "train")
        return [(int(r["step"] * tokens_a_step), r["loss"]) for r in records if r["kind"] == "validation"]

    def started(self, name: str, config: str, steps: int, fields: dict) -> Curve:
        """As `train`, with the loss before the first step: that after a step with a rate of nearly zero."""
        still = {"optimizer.warmup_steps": 0, "optimizer.peak_lr": 1e-12, "optimizer.final_lr": 0.0, "log.every": 1}
        (_, loss), *_ = self.train(f"{name}, start", config, 1, fields | still)
        return [(0, loss), *self.train(name, config, steps, fields)]


def spread(values: list[float]) -> list[float]:
    """[least, median, most]."""
    return [min(values), statistics.median(values), max(values)]


def draw(curves: dict[str, list[Curve]], architectures, base: Curve, path: str) -> None:
    """Draws one panel for each architecture: medians over the seeds with their range, and base's last loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(architectures)
    figure, axes = pyplot.subplots(1, count, figsize=(1 + 4.5 * count, 3.6), sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for axis, architecture in zip(axes[0], architectures):
        for way in WAYS:
            of_seeds = curves[f"{architecture}, {way}"]
            tokens = [t / 1e6 for t, _ in of_seeds[0]]
            least, median, most = zip(*(spread([loss for _, loss in points]) for points in zip(*of_seeds)))
            (line,) = axis.plot(tokens, median, marker=".", label=way)
            axis.fill_between(tokens, least, most, color=line.get_color(), alpha=0.2)
        axis.axhline(base[-1][1], color="gray", linestyle="--", label=f"base after {base[-1][0] / 1e6:.1f} M tokens")
        axis.set(title=architecture, xlabel="tokens of this run, millions")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("held-out loss, nats a token")
    figure.savefig(path, dpi=110)


def main(
    data: Annotated[str, Option("prepared data")],
    workdir: Annotated[str, Option("folder for the runs")],
    output: Annotated[str, Option("path of the results, without an ending", writes=True)],
    architectures: Annotated[tuple[str, ...], Option("what to convert base to")] = ("memory", "flex-3"),
    base_steps: Annotated[int, Option("steps of base", least=1)] = 960,
    steps: Annotated[int, Option("steps of each other run", least=1)] = 480,
    every: Annotated[int, Option("steps between evaluations", least=1)] = 60,
    share: Annotated[float, Option("share of --steps that converted models train for", least=0.01)] = 0.25,
    seeds: Annotated[int, Option("seeds of each way", least=1)] = 3,
    distill_tokens: Annotated[float, Option("tokens of text to distil from", least=1)] = 65536,
    fields: Annotated[tuple[str, ...], Option("fields of all runs, such as model.dim=128")] = (),
) -> None:
    runs = Runs(workdir, data, every)
    shape = dict(field.split("=", 1) for field in fields)
    base = runs.train("base", "tiny.py:base", base_steps, shape)
    curves: dict[str, list[Curve]] = {}
    for seed, architecture, (way, memory) in itertools.product(range(seeds), architectures, WAYS.items()):
        chosen, length = shape | {"seed": seed}, steps
        if memory is not None:
            chosen |= {"start.workdir": runs.folder("base"), "start.memory": memory}
            length = max(1, round(share * steps))
        if memory == "distill":
            chosen["start.distill_tokens"] = distill_tokens
        side = f"{architecture}, {way}"
        curve = runs.started(f"{side}, seed {seed}", f"tiny.py:{architecture}", length, chosen)
        curves.setdefault(side, []).append(curve)
    draw(curves, architectures, base, f"{output}.png")
    summary = {
        side: {at: spread([curve[place][1] for curve in of_seeds]) for at, place in (("start", 0), ("end", -1))}
        for side, of_seeds in curves.items()
    }
    common.write(f"{output}.json", curves, {"base": base, "summary": summary})


if __name__ == "__main__":
    cli.run(main)
