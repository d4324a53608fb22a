"""The law of `fits` for the finished runs of a protocol, and where it has base overtake models with a token memory."""

from typing import NamedTuple

import numpy as np

from memoryllm_jax.experiments import fits
from memoryllm_jax.experiments.fits import Fit, Point
from memoryllm_jax.experiments.intervals import Interval
from memoryllm_jax.experiments.protocol import Run, Setting
from memoryllm_jax.experiments.results import Results
from memoryllm_jax.model import flops

_FEWEST_LENGTHS = 3  # of the runs of a kind of memory that is fitted


class Prediction(NamedTuple):
    """A setting that the law was not fitted to, the mean of whose seeds was measured, in bits per byte."""

    setting: str
    measured: float
    predicted: Interval


class Crossing(NamedTuple):
    """Tokens after which base is ahead of a variant, by the law, and stays ahead.

    base_parameters: those of base's attention, FFNs and norms.
    tokens: infinite where base never is ahead, 0 where it always is.
    """

    variant: str
    size: str
    base_parameters: int
    tokens: Interval


class FittedLaw(NamedTuple):
    """The law of one vocabulary.

    points, left_out: the runs that it was fitted to, and those of the sizes that the protocol leaves out.
    """

    fit: Fit
    points: list[Point]
    left_out: list[Point]
    predictions: list[Prediction]
    crossings: list[Crossing]


def of_vocabulary(results: Results, vocabulary: str, replicates: int = fits.REPLICATES) -> FittedLaw:
    """Fits the law to the runs of a vocabulary, without controls.

    Raises: UserError if there are too few runs.
    """
    points, left_out = _points(results, vocabulary)
    fit = fits.fit(points, replicates)
    of_setting: dict[str, list[Point]] = {}
    for point in left_out:
        of_setting.setdefault(point.setting, []).append(point)
    predictions = [
        Prediction(setting, float(np.mean([point.loss for point in seeds])), fit.predicted(seeds[0]))
        for setting, seeds in of_setting.items()
    ]
    return FittedLaw(fit, points, left_out, predictions, _crossings(results, vocabulary, fit))


def _points(results: Results, vocabulary: str) -> tuple[list[Point], list[Point]]:
    """The runs that the law is fitted to, and those of the sizes that the protocol leaves out."""
    fitted, left_out = [], []
    lengths: dict[str, set[int]] = {}  # {kind of memory: lengths of its runs, in tokens}
    for run in results.runs:
        if run.vocabulary != vocabulary or results.controlled(run.variant):
            continue
        active, memory, kind = _model(results, run)
        setting = f"{run.variant} {run.size}, {run.tokens / 1e6:.3g} M tokens"
        point = Point(active, memory, run.tokens, results.loss(run), kind, setting)
        if run.size in results.protocol.held_out_sizes:
            left_out.append(point)
        else:
            fitted.append(point)
            lengths.setdefault(kind, set()).add(run.tokens)
    # With fewer lengths, the worth of a memory cannot be told from the gain in speed.
    known = {""} | {kind for kind, found in lengths.items() if len(found) >= _FEWEST_LENGTHS}
    return [point for point in fitted if point.kind in known], [point for point in left_out if point.kind in known]


def _model(results: Results, run: Run) -> tuple[int, int, str]:
    """(active parameters, those of the token memory, its kind) of a run's model."""
    config = results.config(run)
    counts = flops.parameters(config)
    return counts["active"], counts["memory"], config.model.token_memory if config.model.row_dim else ""


def _crossings(results: Results, vocabulary: str, fit: Fit) -> list[Crossing]:
    protocol, found = results.protocol, []
    names = [variant.name for variant in protocol.variants if not results.controlled(variant.name)]
    for size in protocol.sizes:
        # Any length and rate will do: the models are asked for.
        runs = {name: protocol.run(Setting(name, size, vocabulary), 1, 0, 1e-3) for name in names}
        bases = [_model(results, run) for run in runs.values() if run.config.model.architecture == "base"]
        if not bases:
            return []
        *base, _ = bases[0]
        for name, run in runs.items():
            *other, kind = _model(results, run)
            if kind in fit.law.kinds:
                found.append(Crossing(name, size, base[0], fit.crossing(tuple(base), tuple(other), kind)))
    return found
