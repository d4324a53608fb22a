"""Loss against tokens of memory and flex-3, started from a trained base and from scratch.

    python benchmarks/conversion.py --data=DIR --workdir=DIR --output=benchmarks/results/conversion

All runs have the shape, batch and recipe of configs/tiny.py, and the same held-out text. Base trains for --base_steps,
the others for --steps. Kill it at any time and run the same line again. Writes NAME.json and NAME.png; needs matplotlib
(the extra `bench`).
"""

import itertools
import json
import os
import subprocess
import sys
from typing import Annotated, NamedTuple

import common

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option

HERE = os.path.dirname(os.path.abspath(__file__))
WAYS = ("from scratch", "converted", "converted, FFN-M new")
Curve = list[tuple[int, float]]  # (tokens, held-out loss)


class Runs(NamedTuple):
    """Training runs, each in its own folder of `workdir`, evaluated every `every` steps."""

    workdir: str
    data: str
    every: int

    def folder(self, name: str) -> str:
        return os.path.join(self.workdir, name.replace(",", "").replace(" ", "_"))

    def train(self, name: str, config: str, steps: int, *more: str) -> Curve:
        """Trains, or resumes a run that was stopped.

        Args:
          config: name of the config file in configs/, with the architecture.
          more: further flags of `train`.
        Returns: the curve of the run. Raises: UserError if training fails.
        """
        fields = {"steps": steps, "eval.every": self.every, "eval.batches": 32, "checkpoint.every": steps}
        fields |= {"data.path": self.data, "data.epochs": 9}
        command = [sys.executable, "-m", "memoryllm_jax.train", f"--config={HERE}/../configs/{config}"]
        command += [f"--workdir={self.folder(name)}", *(f"--config.{field}={value}" for field, value in fields.items())]
        if subprocess.run([*command, *more]).returncode:
            raise UserError(f"{name}: training failed")
        with open(os.path.join(self.folder(name), "metrics.jsonl")) as file:
            records = [json.loads(line) for line in file]
        tokens_a_step = next(r["tokens"] / r["step"] for r in records if r["kind"] == "train")
        return [(int(r["step"] * tokens_a_step), r["loss"]) for r in records if r["kind"] == "validation"]


def draw(curves: dict[str, Curve], architectures, base: Curve, path: str) -> None:
    """Draws one panel for each architecture, with the loss that base ended at as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(architectures)
    figure, axes = pyplot.subplots(1, count, figsize=(1 + 4.5 * count, 3.6), sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for axis, architecture in zip(axes[0], architectures):
        for way in WAYS:
            tokens, losses = zip(*curves[f"{architecture}, {way}"])
            axis.plot([t / 1e6 for t in tokens], losses, marker=".", label=way)
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
) -> None:
    runs = Runs(workdir, data, every)
    base = runs.train("base", "tiny.py:base", base_steps)
    curves = {}
    for architecture, way in itertools.product(architectures, WAYS):
        start = []
        if way != "from scratch":
            start.append(f"--config.start.workdir={runs.folder('base')}")
        if way == "converted, FFN-M new":
            start.append("--config.start.memory=new")
        side = f"{architecture}, {way}"
        curves[side] = runs.train(side, f"tiny.py:{architecture}", steps, *start)
    draw(curves, architectures, base, f"{output}.png")
    common.write(f"{output}.json", curves, {"base": base})


if __name__ == "__main__":
    cli.run(main)
