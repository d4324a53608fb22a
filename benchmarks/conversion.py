"""Loss against tokens of memory and flex-3, converted from a trained base and from scratch.

    python benchmarks/conversion.py --data=DIR --workdir=DIR --output=benchmarks/results/conversion

All runs are of configs/tiny.py's shape, batch and recipe, on the same held-out text. Base trains for --base_steps, the
others for --steps. Kill it at any time and run the same line again. Writes NAME.json and NAME.png; needs matplotlib.
"""

import itertools
import json
import os
import subprocess
import sys

import common
from absl import flags

from memoryllm_jax.common import legacy
from memoryllm_jax.common.errors import UserError

FLAGS = flags.FLAGS
HERE = os.path.dirname(os.path.abspath(__file__))
WAYS = ("from scratch", "converted", "converted, FFN-M new")


def run(name, config, steps, *more):
    """Trains, or goes on; returns [(tokens, held-out loss)]."""
    workdir = os.path.join(FLAGS.workdir, name.replace(",", "").replace(" ", "_"))
    c = ("steps", steps), ("eval.every", FLAGS.every), ("eval.batches", 32), ("checkpoint.every", steps)
    command = [sys.executable, "-m", "memoryllm_jax.train", f"--config={HERE}/../configs/{config}"]
    command += [f"--workdir={workdir}", f"--config.data.path={FLAGS.data}", "--config.data.epochs=9"]
    if subprocess.run([*command, *(f"--config.{field}={value}" for field, value in c), *more]).returncode:
        raise UserError(f"{name}: training failed")
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        records = [json.loads(line) for line in file]
    a_step = next(r["tokens"] / r["step"] for r in records if r["kind"] == "train")
    return workdir, [(int(r["step"] * a_step), r["loss"]) for r in records if r["kind"] == "validation"]


def draw(results, base, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(FLAGS.architectures)
    figure, axes = pyplot.subplots(1, count, figsize=(1 + 4.5 * count, 3.6), sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    axes = axes[0]
    for axis, architecture in zip(axes, FLAGS.architectures):
        for way in WAYS:
            tokens, losses = zip(*results[f"{architecture}, {way}"])
            axis.plot([t / 1e6 for t in tokens], losses, marker=".", label=way)
        axis.axhline(base[-1][1], color="gray", linestyle="--", label=f"base after {base[-1][0] / 1e6:.1f} M tokens")
        axis.set(title=architecture, xlabel="tokens of this run, millions")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("held-out loss, nats a token")
    figure.savefig(path, dpi=110)


def main():
    base_dir, base = run("base", "tiny.py:base", FLAGS.base_steps)
    results = {}
    for architecture, way in itertools.product(FLAGS.architectures, WAYS):
        side = f"{architecture}, {way}"
        if way == "from scratch":
            results[side] = run(side, f"tiny.py:{architecture}", FLAGS.steps)[1]
        else:
            start = [f"--config.start.workdir={base_dir}"]
            start += ["--config.start.memory=new"] if way.endswith("new") else []
            results[side] = run(side, f"tiny.py:{architecture}", FLAGS.steps, *start)[1]
    draw(results, base, f"{FLAGS.output}.png")
    common.write(f"{FLAGS.output}.json", results, {"base": base})
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "prepared data", required=True)
    flags.DEFINE_string("workdir", None, "folder for the runs", required=True)
    flags.DEFINE_string("output", None, "path of the results, without an ending", required=True)
    flags.DEFINE_list("architectures", ["memory", "flex-3"], "what to convert base to")
    flags.DEFINE_integer("base_steps", 960, "steps of base")
    flags.DEFINE_integer("steps", 480, "steps of each other run")
    flags.DEFINE_integer("every", 60, "steps between evaluations")
    legacy.run(main)
