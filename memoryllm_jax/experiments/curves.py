"""Architectures trained alike, and how their curves compare (the paper's Table 2, Figures 9 and 10)."""

import contextlib
import os
import signal
import subprocess
import sys

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common import plots, report, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import RESUMABLE_FIELDS, flatten, from_saved
from memoryllm_jax.model.flops import parameters
from memoryllm_jax.training import metrics

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
    if not storage.exists(path):
        return None
    with contextlib.closing(store.Checkpoints(store.folder(workdir), read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            return None
        description = checkpoints.description(max(steps))
    config = from_saved(description["config"])
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
    free = (*RESUMABLE_FIELDS, "model.beta", "model.token_memory", "model.compute_input")
    recipe = {name: value for name, value in flatten(config).items() if name not in free}
    return {
        "parameters": parameters(config),
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
            figure, axis = plots.new_figure()
            for number, (name, run) in enumerate(runs.items()):
                points = [p for p in run["curve"] if p["tokens"]]
                style = plots.style_of(number)
                axis.plot([p[field] / unit for p in points], [p["loss"] for p in points], **style, label=name)
            axis.set(xlabel=label, ylabel="held-out loss, nats a token")
            plots.legend(axis)
            page.figure(field, figure, f"Held-out loss against {label} (the paper's Figure 10 is against tokens)")
        figure, axis = plots.new_figure()
        for number, (name, run) in enumerate(runs.items()):
            at = run["parameters"]["active"] / 1e6, last[name]["perplexity"]
            axis.plot(*at, **plots.style_of(number))
            axis.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
        plots.log_scale(axis)
        axis.set(xlabel="active parameters, millions", ylabel="held-out perplexity")
        page.figure("active", figure, "Perplexity against active parameters (the paper's Figure 9)")
        return page.write(runs)


def _common_recipe(runs):
    """Of all runs. Raises: UserError that names a field in which they differ."""
    (first, run), *others = runs.items()
    for name, other in others:
        for field, value in other["recipe"].items():
            if value != run["recipe"].get(field):
                expected = run["recipe"].get(field)
                raise UserError(f"{name}: {field}: expected {expected!r} as in {first}, found {value!r}")
    return run["recipe"]
