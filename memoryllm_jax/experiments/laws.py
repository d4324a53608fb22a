"""The law of `fits` for the finished runs of a protocol, and where it has base overtake models with a token memory."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from memoryllm_jax.experiments import answers, fits
from memoryllm_jax.experiments.answers import Crossing
from memoryllm_jax.experiments.fits import Fit, Point
from memoryllm_jax.experiments.intervals import Interval
from memoryllm_jax.experiments.protocol import Run, Setting
from memoryllm_jax.experiments.results import Results, cell_of
from memoryllm_jax.model import flops

# Curves and lengths that a fitted kind of memory has at least. With two curves, the intervals of k and r are too
# narrow, in spite of their widening (`fits`).
_FEWEST_CURVES = 3
_FEWEST_LENGTHS = 3


class Prediction(NamedTuple):
    """A setting that the law was not fitted to, the mean of whose seeds was measured, in bits per byte."""

    setting: str
    measured: float
    predicted: Interval


class FittedLaw(NamedTuple):
    """The law of one vocabulary.

    points, left_out: the settings that it was fitted to, and those of the sizes that the protocol leaves out.
    without: kinds of memory that have too few sizes, curves or lengths to be fitted.
    """

    fit: Fit
    points: list[Point]
    left_out: list[Point]
    without: list[str]
    predictions: list[Prediction]
    crossings: list[Crossing]


def of_vocabulary(results: Results, vocabulary: str, replicates: int = fits.REPLICATES) -> FittedLaw:
    """Fits the law to the runs of a vocabulary, without controls.

    Raises: UserError if they do not determine the law.
    """
    points, left_out = points_of(results, vocabulary)
    without = sorted((set(fits.few_sizes(points)) | _too_few(points)) - {""})
    points, left_out = ([p for p in found if p.kind not in without] for found in (points, left_out))
    fit = fits.fit(points, replicates)
    predictions = [
        Prediction(f"{point.curve}, {point.tokens / 1e6:.3g} M tokens", point.loss, fit.predicted(point))
        for point in left_out
    ]
    sizes = list(dict.fromkeys(point.size for point in (*points, *left_out)))
    return FittedLaw(fit, points, left_out, without, predictions, crossings(results, vocabulary, sizes, fit))


def points_of(results: Results, vocabulary: str) -> tuple[list[Point], list[Point]]:
    """The settings that the law is fitted to, and those of the sizes that the protocol leaves out."""
    protocol, seeds = results.protocol, {}
    for run in results.runs:
        if run.vocabulary == vocabulary and not protocol.variant(run.variant).control_of:
            seeds.setdefault((run.variant, cell_of(run)), []).append(run)
    fitted, left_out = [], []
    for (variant, cell), runs in seeds.items():
        active, memory, kind = model_of(results, runs[0])
        loss = float(np.mean([results.loss(run) for run in runs]))
        point = Point(active, memory, cell.tokens, loss, kind, cell.size, f"{variant} {cell.size}")
        (left_out if cell.size in protocol.held_out_sizes else fitted).append(point)
    return fitted, left_out


def _too_few(points: list[Point]) -> set[str]:
    """Kinds of memory with too few curves or lengths to tell their worth from their gain in data efficiency."""
    curves, lengths = defaultdict(set), defaultdict(set)
    for point in points:
        curves[point.kind].add(point.curve)
        lengths[point.kind].add(point.tokens)
    return {kind for kind in curves if len(curves[kind]) < _FEWEST_CURVES or len(lengths[kind]) < _FEWEST_LENGTHS}


def model_of(results: Results, run: Run) -> tuple[int, int, str]:
    """(active parameters, those of the token memory, its kind) of a run's model."""
    config = results.config(run)
    counts = flops.parameters(config)
    return counts["active"], counts["memory"], config.model.token_memory if config.model.row_dim else ""


def crossings(results: Results, vocabulary: str, sizes: Iterable[str], fit: Fit) -> list[Crossing]:
    """Where a fitted law has base overtake each variant that the protocol compares with it, but for controls."""
    protocol, found = results.protocol, []
    for base_name, variant in answers.with_base(protocol):
        if protocol.variant(base_name).control_of or protocol.variant(variant).control_of:
            continue
        for size in sizes:
            # Any length and rate will do: the models are asked for.
            runs = [protocol.run(Setting(name, size, vocabulary), 1, 0, 1e-3) for name in (base_name, variant)]
            (*base, _), (*other, kind) = (model_of(results, run) for run in runs)
            if kind in fit.law.kinds:
                tokens = fit.crossing(tuple(base), tuple(other), kind)
                found.append(Crossing(variant, size, vocabulary, base[0], tokens, 0.0, math.inf, True))
    return found
