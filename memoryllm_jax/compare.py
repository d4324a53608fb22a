"""Trains architectures alike, and draws how they compare (the paper's Table 2, Figures 9 and 10).

    python -m memoryllm_jax.compare --config=configs/tiny.py --workdir=DIR [--config.steps=2000 ...]
    python -m memoryllm_jax.compare --config=configs/1b.py --workdir=DIR --only=flex-3      (a job of its own)
    python -m memoryllm_jax.compare --config=configs/1b.py --workdir=DIR --report           (draws what is there)

Every architecture has the same seed, data, steps and recipe: all --config.FIELD options are handed to `train`, which
runs in a process of its own with the workdir DIR/ARCHITECTURE. Kill it at any time and run the same line again. On
several hosts, run `train` itself with these workdirs, and then --report. The
report is DIR/comparison.html, with .json and .csv beside it. Beside the paper's architectures there are, to compare
with, narrow-B, value-B and ple-B: flex-B's active parameters, and in place of FFN-M nothing, value embeddings, or
per-layer embeddings as in Gemma 3n.
"""

import contextlib
import os
import signal
import subprocess
import sys

from absl import flags
from ml_collections import config_flags

from memoryllm_jax import checkpoint, cli, files, metrics, report
from memoryllm_jax import config as config_lib
from memoryllm_jax.cli import UserError

ARCHITECTURES = ("base", "memory", "flex-1", "flex-2", "flex-3")


def train(config: str, architecture: str, workdir: str, overrides: list[str]) -> int:
    """The exit code of `train`, run as a command."""
    command = [sys.executable, "-m", "memoryllm_jax.train", f"--config={config}:{architecture}"]
    print(f"--- {architecture}", flush=True)
    with subprocess.Popen([*command, f"--workdir={workdir}", *overrides]) as process:
        # Training saves its state before it ends; a terminal's Ctrl-C reaches it by itself.
        handlers = {signal.SIGTERM: lambda *_: process.terminate(), signal.SIGINT: lambda *_: None}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_of(workdir: str) -> dict | None:
    """What a run has left: its parameters, curve and recipe; None if it has not been evaluated and saved yet.

    curve: of each evaluation its tokens, seconds and FLOPs of training until then (without compiling, evaluating and
    saving), and loss, perplexity and bits per byte of held-out text.
    """
    path = os.path.join(workdir, "metrics.jsonl")
    if not files.exists(path):
        return None
    with contextlib.closing(checkpoint.Checkpoints(checkpoint.folder(workdir), read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            return None
        description = checkpoints.description(max(steps))
    config = config_lib.from_saved(description["config"])
    curve, tokens, seconds, flops = [], 0, 0.0, 0.0
    for record in metrics.records(path):
        if record["kind"] == "train":
            lap = (record["tokens"] - tokens) / record["tokens_per_second"]
            tokens, seconds = record["tokens"], seconds + lap
            flops += lap * record["model_flops_per_second"]
        else:
            quality = {name: record[name] for name in ("loss", "perplexity", "bits_per_byte")}
            seen = record["step"] * config.batch_size * config.seq_len
            curve.append({"step": record["step"], "tokens": seen, "seconds": seconds, "flops": flops} | quality)
    if not curve:
        return None
    free = (*config_lib.MAY_CHANGE, "model.beta", "model.token_memory", "model.compute_input")
    recipe = {name: value for name, value in config_lib.flatten(config).items() if name not in free}
    return {
        "parameters": metrics.parameters(config),
        "curve": curve,
        "recipe": recipe | {"data's digest": description["data"]["digest"]},
        "data": config.data.path,
        "finished": curve[-1]["step"] == config.steps,
    }


def draw(runs: dict[str, dict], folder: str, facts: dict[str, str]) -> str:
    """Writes the report of {architecture: run}. Returns: one line on it. Raises: UserError."""
    with report.Report(folder, "comparison", "Architectures compared", facts) as page:
        last = {name: run["curve"][-1] for name, run in runs.items()}
        page.text(
            "All have the same seed, data, batches and recipe. Base, memory and flex have as many parameters in total. "
            "Active parameters are those that every token passes: attention, FFN-C, gates and norms; the token memory, "
            "embedding and output head are not among them, as in the paper."
        )
        head = ["architecture", "total, M", "active, M", "steps", "loss", "perplexity", "bits per byte"]
        head += ["tokens/s", "MFLOP a token"]
        rows = []
        for name, run in runs.items():
            end, n = last[name], run["parameters"]
            speed = end["tokens"] / end["seconds"], end["flops"] / end["tokens"] / 1e6
            rows.append([name, n["total"] / 1e6, n["active"] / 1e6, end["step"], end["loss"], end["perplexity"]])
            rows[-1] += [end["bits_per_byte"], *speed]
        page.table(
            head, rows, "Held-out loss in nats a token; speed without compiling, evaluating and saving", csv="runs"
        )
        with page.csv("curves", ["architecture", *next(iter(last.values()))]) as write:
            write([name, *point.values()] for name, run in runs.items() for point in run["curve"])
        axes_of = {
            "tokens": ("tokens, millions", 1e6),
            "seconds": ("minutes of training", 60.0),
            "flops": ("training FLOPs", 1.0),
        }
        for field, (label, unit) in axes_of.items():
            figure, axis = report.new_figure()
            for number, (name, run) in enumerate(runs.items()):
                points = [p for p in run["curve"] if p["tokens"]]
                style = report.style_of(number)
                axis.plot([p[field] / unit for p in points], [p["loss"] for p in points], **style, label=name)
            axis.set(xlabel=label, ylabel="held-out loss, nats a token")
            report.legend(axis)
            page.figure(field, figure, f"Held-out loss against {label} (the paper's Figure 10 is against tokens)")
        figure, axis = report.new_figure()
        for number, (name, run) in enumerate(runs.items()):
            at = run["parameters"]["active"] / 1e6, last[name]["perplexity"]
            axis.plot(*at, **report.style_of(number))
            axis.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
        report.log_scale(axis)
        axis.set(xlabel="active parameters, millions", ylabel="held-out perplexity")
        page.figure("active", figure, "Perplexity against active parameters (the paper's Figure 9)")
        return page.write(runs)


def main():
    f = flags.FLAGS
    if f.only and f.report:
        raise UserError("--only, --report: expected one of them, as the one trains and the other draws")
    names = [f.only] if f.only else f.architectures
    for name in names:
        config_lib.parse_architecture(name)
    path = f["config"].config_filename
    if ":" in path:
        raise UserError(f"--config={path}: expected a config file without an architecture; --architectures names them")
    if not f.report:
        changed = config_flags.get_override_values(f["config"])
        for name in names:
            overrides = [f"--config.{field}={value}" for field, value in changed.items()]
            code = train(path, name, os.path.join(f.workdir, name), overrides)
            if code:
                print(f"error: {name}: training ended with exit code {code}", file=sys.stderr)
                return code
        if f.only:
            return 0
    runs = {name: run_of(os.path.join(f.workdir, name)) for name in names}
    runs = {name: run for name, run in runs.items() if run}
    if not runs:
        raise UserError(f"--workdir={f.workdir}: expected runs of {', '.join(names)}, found none")
    recipe = _common_recipe(runs)
    shown = ("steps", "batch_size", "seq_len", "seed", "model.dim", "model.layers", "model.heads", "optimizer.peak_lr")
    facts = {"config": path, "recipe": ", ".join(f"{name} {recipe[name]}" for name in shown)}
    facts["data"] = ", ".join(dict.fromkeys(run["data"] for run in runs.values()))
    missing = [name for name in names if name not in runs or not runs[name]["finished"]]
    print(draw(runs, f.workdir, facts | ({"not finished": ", ".join(missing)} if missing else {})))
    return 0


def _common_recipe(runs):
    """Of all runs. Raises: UserError that names a field in which they differ."""
    (first, run), *others = runs.items()
    for name, other in others:
        for field, value in other["recipe"].items():
            if value != run["recipe"].get(field):
                expected = run["recipe"].get(field)
                raise UserError(f"{name}: {field}: expected {expected!r} as in {first}, found {value!r}")
    return run["recipe"]


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "config file without an architecture, such as configs/tiny.py")
    flags.DEFINE_string(
        "workdir", None, "folder for all runs, each in one of its own, and for the report", required=True
    )
    flags.DEFINE_list("architectures", list(ARCHITECTURES), "what to train and compare, in this order")
    flags.DEFINE_string("only", "", "train this one alone and draw nothing")
    flags.DEFINE_bool("report", False, "train nothing, draw what is there")
    flags.mark_flag_as_required("config")
    cli.run(main)
