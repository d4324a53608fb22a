"""Base pruned to the active parameters of memory and flex, compared with them (MemoryLLM, Figure 11)."""

import dataclasses
from typing import Annotated, NamedTuple

import numpy as np

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.common import plots, report
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import Config
from memoryllm_jax.evaluation import scores
from memoryllm_jax.evaluation.measure import PERPLEXITY, Measure
from memoryllm_jax.evaluation.scores import Score
from memoryllm_jax.experiments import sparsity
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.experiments.sparsity import METHODS, Pattern
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.model import flops

_BETAS = (0.0, 1.0, 2.0, 3.0)  # of memory, flex-1, flex-2 and flex-3, to whose active parameters base is pruned


class Point(NamedTuple):
    """One model of the picture, pruned or as it was trained.

    model: label of the trained model.
    method, pattern: how it was pruned; "" if it was not.
    active: active parameters that are not zero.
    quality: as `Measure` returns it.
    """

    model: str
    method: str
    pattern: str
    active: int
    quality: dict[str, Score]


def pruning(
    models: Models,
    page: report.Report,
    *,
    measure: Measure,
    calibration: Annotated[str, Option("prepared data to calibrate pruning on; by default that of the training")] = "",
    windows: Annotated[int, Option("windows of calibration text, each as long as the model's context", least=0)] = 128,
    methods: Annotated[tuple[str, ...], Option(f"methods to compare: {', '.join(METHODS)}")] = METHODS,
) -> dict:
    """Base pruned by magnitude, Wanda and SparseGPT against memory and flex (MemoryLLM, Figure 11).

    One model must be base. All of its matrices of attention and FFN get the same share of zeros. One share each leaves
    base as many active parameters as memory, flex-1, flex-2 and flex-3 of its shape have. Another pattern sets two of
    every four weights to zero (2:4), which at the usual shape leaves about flex-2's count. Methods are calibrated on
    the first --windows windows of the training split of --calibration. The other models are drawn on the same axes.
    Errors are standard errors over documents of the text and examples of the tasks.
    """
    # All that the configs can show is refused here, before the first model is loaded and measured.
    for method in methods:
        if method not in METHODS:
            raise ArgumentError("methods", f"expected some of {', '.join(METHODS)}, found {method}")
    bases = [label for label, config in zip(models.labels, models.configs) if config.architecture == "base"]
    if len(bases) != 1:
        raise ArgumentError("workdir", f"expected one base among the models, to be pruned, found {len(bases)}")
    calibration = calibration or models.data_of(bases[0], "calibration")
    page.facts |= {"calibration": f"{calibration}, {windows} windows"}
    points = []
    for label, model in models:
        active = flops.parameters(model.trained.run)["active"]
        points.append(Point(label, "", "", active, measure(model)))
        if label in bases:
            windows_NT = _calibration(calibration, windows, model)
            points += _pruned(model, label, measure, windows_NT, methods)
    page.facts |= scores.facts(points[0].quality)
    _show(page, points)
    return {"points": [_record(point) for point in points]}


def _record(point: Point) -> dict:
    """What the JSON file has of a point."""
    errors = {metric: score.error for metric, score in point.quality.items()}
    return point._asdict() | {"quality": scores.values(point.quality), "errors": errors}


def _calibration(path: str, windows: int, model: Engine) -> np.ndarray:
    """The calibration text: int32 [windows, context]. Raises: UserError if there are not as many windows."""
    shards = model.decoder.shards
    if windows % shards:
        raise ArgumentError("windows", f"expected a multiple of the {shards} devices, found {windows}")
    stream, length = run_data.open_data(model.trained, path).train, model.trained.context
    most = stream.tokens // length
    if not 0 < windows <= most:
        raise ArgumentError("windows", f"expected 1 to {most}, as {path} has, found {windows}")
    stream.verify([0], windows * length)
    return stream.read(0, windows * length).reshape(windows, length)


def _patterns(run: Config, workdir: str) -> list[Pattern]:
    """2:4, and the shares of zeros that leave base the active parameters of memory and flex. Raises: UserError."""
    for name in ("dim", "ffn_dim"):
        width = getattr(run.model, name)
        if width % 4:
            raise UserError(f"{workdir}: expected model.{name} to be a multiple of 4, for 2:4, found {width}")
    # Only the matrices of attention and FFN are pruned, so the share is one of these. Norms do not enter it.
    counts = flops.parameters(run)
    matrices = counts["attention"] + counts["ffn_c"]
    patterns = [Pattern(0.5, 4)]
    for beta in _BETAS:
        flex = flops.parameters(dataclasses.replace(run, model=dataclasses.replace(run.model, beta=beta)))
        patterns.append(Pattern(1 - (flex["attention"] + flex["ffn_c"]) / matrices))
    return sorted(patterns)


def _pruned(model: Engine, label: str, measure: Measure, windows_NT: np.ndarray, methods) -> list[Point]:
    """Prunes base by each method and pattern, and measures it. Returns: a point of each."""
    trained, whole = model.trained, model.decoder
    params = trained.load(lambda _: True)
    norms = flops.parameters(trained.run)["norms"]  # active parameters too, but never pruned
    points = []
    for pattern in _patterns(trained.run, trained.workdir):
        for method in methods:
            pruned = sparsity.prune(trained.config, params, trained.mesh, windows_NT, method, pattern)
            # The decoder keeps its compiled functions and takes other weights, so that no point compiles anew.
            model.decoder = whole.with_params(layers=pruned["layers"])
            points.append(Point(label, method, str(pattern), sparsity.nonzeros(pruned) + norms, measure(model)))
            found = scores.text(points[-1].quality)
            print(f"{label}, {method} {pattern}: {points[-1].active:,} active, {found}", flush=True)
    return points


def _show(page: report.Report, points: list[Point]) -> None:
    metrics = list(points[0].quality)
    head = ["model", "pruned by", "pattern", "active parameters"]
    head += [column for metric in metrics for column in (metric, "its error")]
    rows = []
    for p in points:
        numbers = [number for score in p.quality.values() for number in (score.value, score.error)]
        rows.append([p.model, p.method, p.pattern, p.active, *numbers])
    caption = "Pruned base beside whole models; active: weights of attention, FFN-C and norms that are not zero"
    page.table(head, rows, caption, csv="points")
    for metric in metrics:
        figure = _draw(points, metric)
        page.figure(metric.replace(" ", "-"), figure, f"{metric} against active parameters (Figure 11)")


def _draw(points: list[Point], metric: str) -> plots.Chart:
    lines = {}
    for number, method in enumerate(dict.fromkeys(p.method for p in points if p.method)):
        of_method = [p for p in points if p.method == method]
        style = plots.style_of(number)
        shares = sorted(_at(p, metric) for p in of_method if ":" not in p.pattern)
        lines[f"base, {method}"] = plots.Line(*zip(*shares), style=style)
        # 2:4 is a single point, a larger empty marker of the same colour.
        style = style | {"linestyle": "", "markersize": 9, "fillstyle": "none"}
        groups = [_at(p, metric) for p in of_method if ":" in p.pattern]
        lines[f"base, {method} 2:4"] = plots.Line(*zip(*groups), style=style)
    for number, p in enumerate(point for point in points if not point.method):
        style = {"linestyle": "", "marker": "*", "markersize": 9, "color": f"C{number}"}
        lines[p.model] = plots.Line(*zip(_at(p, metric)), style=style)
    scale = "log" if metric == PERPLEXITY else "linear"
    return plots.Chart(lines, "active parameters, millions", metric, y_scale=scale)


def _at(point: Point, metric: str) -> tuple[float, float, float]:
    score = point.quality[metric]
    return point.active / 1e6, score.value, score.error
