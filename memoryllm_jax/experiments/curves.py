"""Trains architectures with one recipe and compares their curves (MemoryLLM, Table 2, Figures 9 and 10)."""

import os
from typing import NamedTuple

from memoryllm_jax.checkpoint import description as description_lib
from memoryllm_jax.common import plots, report, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.fields import flatten
from memoryllm_jax.config import RESUMABLE_FIELDS, Config
from memoryllm_jax.model.flops import parameters
from memoryllm_jax.training import metrics

# Fields of the recipe that the caption shows.
_SHOWN = ("steps", "batch_size", "seq_len", "seed", "model.dim", "model.layers", "model.heads", "optimizer.peak_lr")


def compare(config: str, names: list[str], folder: str) -> str:
    """Draws the runs in folder/NAME.

    Args:
      config: path of the config file, for the caption.
    Returns: one line about the report.
    Raises: UserError if there is no run, or if the runs' recipes differ.
    """
    found = {name: run_of(os.path.join(folder, name)) for name in names}
    runs = {name: run for name, run in found.items() if run}
    if not runs:
        raise UserError(f"{folder}: expected runs of {', '.join(names)}, found none")
    recipe = common_recipe(runs)
    facts = {"config": config, "recipe": ", ".join(f"{name} {recipe[name]}" for name in _SHOWN)}
    facts["data"] = ", ".join(dict.fromkeys(run["data"] for run in runs.values()))
    missing = [name for name in names if name not in runs or not runs[name]["finished"]]
    if missing:
        facts["not finished"] = ", ".join(missing)
    return draw(runs, folder, facts)


def run_of(workdir: str) -> dict | None:
    """Reads a run from its workdir.

    Returns: None if the run has not been evaluated and saved yet, else a dict of
      parameters: as `flops.parameters` counts them.
      curve: for each evaluation {"step", "tokens", "seconds", "flops", "loss", "perplexity", "bits_per_byte"}. Seconds
        and FLOPs are those of training until then, without compiling, evaluating and saving.
      recipe: {field: value} of the config's fields that must agree in a comparison, and the data's identity.
      data: path of the prepared data.
      finished: whether the last step has been evaluated.
    """
    path = os.path.join(workdir, "metrics.jsonl")
    if not storage.exists(path):
        return None
    workdir = description_lib.folder(workdir)
    steps = description_lib.steps(workdir)
    if not steps:
        return None
    description = description_lib.read(workdir, steps[-1])
    config = description.run()
    curve = _curve(config, path)
    if not curve:
        return None
    # Two kinds of fields may differ: where and how fast a run was computed, and the architecture itself.
    free = (*RESUMABLE_FIELDS, "model.beta", "model.token_memory", "model.compute_input")
    recipe = {name: value for name, value in flatten(config).items() if name not in free}
    return {
        "parameters": parameters(config),
        "curve": curve,
        "recipe": recipe | description.data.identity(),
        "data": config.data.path,
        "finished": curve[-1]["step"] == config.steps,
    }


def _curve(config: Config, path: str) -> list[dict]:
    """The evaluations in a metrics.jsonl, as `run_of` returns them."""
    # A record of training holds no duration: it follows from the tokens since the record before and their speed, which
    # does not count compiling, evaluating and saving.
    curve, tokens, seconds, flops = [], 0, 0.0, 0.0
    for record in metrics.records(path):
        if isinstance(record, metrics.TrainRecord):
            lap = (record.tokens - tokens) / record.tokens_per_second
            tokens, seconds = record.tokens, seconds + lap
            flops += lap * record.model_flops_per_second
        else:
            # Computed from the step, as `tokens` is that of the last training record, up to log.every steps ago.
            seen = record.step * config.batch_size * config.seq_len
            quality = {name: getattr(record, name) for name in ("loss", "perplexity", "bits_per_byte")}
            curve.append({"step": record.step, "tokens": seen, "seconds": seconds, "flops": flops} | quality)
    return curve


def common_recipe(runs: dict[str, dict]) -> dict:
    """The recipe that all runs share. Raises: UserError that names a field in which they differ."""
    (first, run), *others = runs.items()
    for name, other in others:
        for field, value in other["recipe"].items():
            expected = run["recipe"].get(field)
            if value != expected:
                raise UserError(f"{name}: {field}: expected {expected!r} as in {first}, found {value!r}")
    return run["recipe"]


class _Axis(NamedTuple):
    """What curves are drawn against."""

    field: str  # of a curve's points
    label: str
    unit: float  # values are divided by this


_AXES = (
    _Axis("tokens", "tokens, millions", 1e6),
    _Axis("seconds", "minutes of training", 60.0),
    _Axis("flops", "training FLOPs", 1.0),
)


def draw(runs: dict[str, dict], folder: str, facts: dict[str, str]) -> str:
    """Writes the report of runs.

    Args:
      runs: {architecture: run as `run_of` returns it}.
      facts: for the caption.
    Returns: one line about the report. Raises: UserError.
    """
    with report.Report(folder, "comparison", "Architectures compared", facts) as page:
        page.text(
            "All have the same seed, data, batches and recipe. Base, memory and flex have equally many parameters in "
            "total. Active parameters are those that every token passes: attention, FFN-C, gates and norms; the token "
            "memory, embedding and output head are not among them, as in the paper."
        )
        caption = "Held-out loss in nats a token; speed without compiling, evaluating and saving"
        rows = [_row(name, run) for name, run in runs.items()]
        page.table(list(rows[0]), [list(row.values()) for row in rows], caption, csv="runs")
        _write_curves(page, runs)
        for axis in _AXES:
            caption = f"Held-out loss against {axis.label} (the paper's Figure 10 is against tokens)"
            page.figure(axis.field, _draw_curves(runs, axis), caption)
        page.figure("active", _draw_active(runs), "Perplexity against active parameters (the paper's Figure 9)")
        return page.write(runs)


def _row(name, run):
    end, counts = run["curve"][-1], run["parameters"]
    return {
        "architecture": name,
        "total, M": counts["total"] / 1e6,
        "active, M": counts["active"] / 1e6,
        "steps": end["step"],
        "loss": end["loss"],
        "perplexity": end["perplexity"],
        "bits per byte": end["bits_per_byte"],
        "tokens/s": end["tokens"] / end["seconds"],
        "MFLOP a token": end["flops"] / end["tokens"] / 1e6,
    }


def _write_curves(page, runs):
    fields = next(iter(runs.values()))["curve"][-1]
    with page.csv("curves", ["architecture", *fields]) as write:
        write([name, *point.values()] for name, run in runs.items() for point in run["curve"])


def _draw_curves(runs, against: _Axis):
    figure, axis = plots.new_figure()
    for number, (name, run) in enumerate(runs.items()):
        points = [point for point in run["curve"] if point["tokens"]]  # an evaluation before training has none
        x = [point[against.field] / against.unit for point in points]
        axis.plot(x, [point["loss"] for point in points], **plots.style_of(number), label=name)
    axis.set(xlabel=against.label, ylabel="held-out loss, nats a token")
    plots.legend(axis)
    return figure


def _draw_active(runs):
    figure, axis = plots.new_figure()
    for number, (name, run) in enumerate(runs.items()):
        at = run["parameters"]["active"] / 1e6, run["curve"][-1]["perplexity"]
        axis.plot(*at, **plots.style_of(number))
        axis.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    plots.log_scale(axis)
    axis.set(xlabel="active parameters, millions", ylabel="held-out perplexity")
    return figure
