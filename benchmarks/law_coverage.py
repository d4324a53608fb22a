"""How often the 95% intervals of the law of `fits` hold the truth, on simulated runs.

    python benchmarks/law_coverage.py --output=benchmarks/results/law_coverage_cpu.json

The runs of configs/protocols/small.py at 4,096 ids, without a memory or with FFN-M, get losses of a known law, with
noise of each run (its seed), and noise that all runs of a variant and size share (what the law gets wrong along a
curve). An interval of a number or of a crossing holds the truth if the law's own value is inside; that of a left-out
run, if the run's loss is.

`fits.fit` takes 20 seconds, as it fits one draw of curves after the other. Here all are fitted at once, from the best
fit alone, by damped Gauss-Newton steps. `fits.fit` runs for the first simulation of each case, with CHECKED draws:
`same_minima` is the share of its minima that are found here too.
"""

import dataclasses
import math
from collections import defaultdict
from typing import Annotated, NamedTuple

import common
import numpy as np

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import Config
from memoryllm_jax.experiments import fits, laws
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.fits import Data, Fit, Law, Point
from memoryllm_jax.experiments.protocol import Run

CHECKED = 40
STEPS = 300  # at most
VOCABULARY = "4096"
KINDS = ("ffn",)  # plain tables have fewer curves than `laws` fits
SHARED = (math.log(0.9), math.log(25), 0.33, math.log(150), 0.4)  # log E, log A, alpha, log B, beta
USEFUL = Law(KINDS, np.array([*SHARED, 0.3, 0.9]), (1, 1))  # k, r
USELESS = Law(KINDS, np.array([*SHARED, 0, 0]), (1, 1))


class Case(NamedTuple):
    """law: the truth. seed_noise, curve_noise: standard deviations of the logarithm of the loss."""

    law: Law
    seed_noise: float
    curve_noise: float


CASES = {
    "noisy seeds": Case(USEFUL, 0.012, 0.0015),
    "quiet seeds": Case(USEFUL, 0.003, 0.0015),
    "noisy curves": Case(USEFUL, 0.003, 0.006),
    "useless memories": Case(USELESS, 0.012, 0.0015),
}


class Planned:
    """The runs that a protocol plans at one vocabulary, with simulated losses: what `laws` reads of `Results`."""

    def __init__(self, path: str):
        self.protocol = protocol_lib.load(path)
        rates = dict.fromkeys(map(self.protocol.swept, self.protocol.settings()), 4e-3)
        runs = [run for run in self.protocol.experiment_runs(rates) if run.vocabulary == VOCABULARY]
        self.runs = [run for run in runs if laws.model_of(self, run)[2] in ("", *KINDS)]

    def simulate(self, case: Case, seed: tuple[int, ...]) -> tuple[list[Point], list[Point]]:
        """Draws the losses. Returns: the settings to fit, and those of the size that the protocol leaves out."""
        rng = np.random.default_rng(seed)
        curves = defaultdict(lambda: rng.normal(0, case.curve_noise))
        self._losses = {}
        for run in self.runs:
            active, memory, kind = laws.model_of(self, run)
            noise = rng.normal(0, case.seed_noise) + curves[run.variant, run.size]
            self._losses[run.key] = case.law.loss(active, memory, run.tokens, kind) * math.exp(noise)
        return laws.points_of(self, VOCABULARY)

    def config(self, run: Run) -> Config:
        model = dataclasses.replace(run.config.model, vocab_size=int(VOCABULARY))
        return dataclasses.replace(run.config, model=model)

    def loss(self, run: Run) -> float:
        return self._losses[run.key]


def minima(data: Data, starts_RP: np.ndarray, counts_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimises as `fits.fit` does, from each start, with each point as often as its count.

    Returns: the numbers [R, P], what was minimised [R], and whether it converged [R].
    """
    (low_P, high_P), diagonal = data.bounds(), np.arange(starts_RP.shape[1])

    def cost(x_RP, counts_RN):
        apart_RN = np.abs(data.residuals(x_RP)) / fits.DELTA
        return (counts_RN * np.where(apart_RN <= 1, apart_RN**2 / 2, apart_RN - 0.5)).sum(1)

    x_RP = np.clip(starts_RP, low_P, high_P)
    cost_R, damping_R, still_R = cost(x_RP, counts_RN), np.full(len(x_RP), 1e-2), np.zeros(len(x_RP))
    for _ in range(STEPS):
        (rest,) = np.nonzero(still_R < 3)  # one step that changes next to nothing may be due to much damping
        if not len(rest):
            break
        x, counts, residuals = x_RP[rest], counts_RN[rest], data.residuals(x_RP[rest])
        weights = counts * np.minimum(1, fits.DELTA / np.maximum(np.abs(residuals), 1e-300))
        slopes = data.slopes(x)
        weighted = (slopes * weights[..., None]).swapaxes(1, 2)
        curvature = weighted @ slopes
        curvature[:, diagonal, diagonal] = curvature[:, diagonal, diagonal] * (1 + damping_R[rest, None]) + 1e-14
        step = np.linalg.solve(curvature, weighted @ residuals[..., None])[..., 0]
        new = np.clip(x - step, low_P, high_P)
        new_cost = cost(new, counts)
        helps, is_still = new_cost < cost_R[rest], np.abs(new_cost / cost_R[rest] - 1) < 1e-9
        damping_R[rest] = np.clip(damping_R[rest] * np.where(helps, 0.2, 4), 1e-8, 1e10)
        still_R[rest] = np.where(is_still, still_R[rest] + 1, np.where(helps, 0, still_R[rest]))
        x_RP[rest[helps]], cost_R[rest[helps]] = new[helps], new_cost[helps]
    return x_RP, cost_R, still_R >= 3


def fitted(points: list[Point], replicates: int) -> Fit:
    """As `fits.fit`."""
    data = Data.of(points, KINDS)
    starts_SP = np.array(list(fits.starting_points(data)))
    x_SP, cost_S, _ = minima(data, starts_SP, np.ones((len(starts_SP), len(points))))
    best_P = x_SP[cost_S.argmin()]
    draws = fits.resampled(points, np.random.default_rng(0), replicates)
    counts_RN = np.array([np.bincount(drawn, minlength=len(points)) for drawn in draws])
    x_RP, _, converged_R = minima(data, np.tile(best_P, (replicates, 1)), counts_RN)
    found = [Law(KINDS, x_P, data.scale) for x_P in x_RP[converged_R]]
    curves = {kind: len({point.curve for point in points if point.kind == kind}) for kind in KINDS}
    return Fit(Law(KINDS, best_P, data.scale), found, replicates - len(found), data.residuals(best_P), curves)


def held(planned: Planned, fit: Fit, truth: Law, left_out: list[Point]) -> dict[str, float]:
    """The share of intervals that hold the truth, by what they are of."""
    true = fit._replace(law=truth, replicates=[truth])
    found = {name: [(interval, truth.named()[name])] for name, interval in fit.numbers().items()}
    crossings, of_truth = (laws.crossings(planned, VOCABULARY, planned.protocol.sizes, law) for law in (fit, true))
    found["crossings"] = [(crossing.tokens, own.tokens.value) for crossing, own in zip(crossings, of_truth)]
    found["left-out runs"] = [(fit.predicted(point), point.loss) for point in left_out]
    return {what: float(np.mean([i.low <= value <= i.high for i, value in pairs])) for what, pairs in found.items()}


def same_minima(points: list[Point], fit: Fit) -> float:
    """The share of the minima of `fits.fit` that are among those of this fit, within 0.01% of losses."""

    def log_losses(laws):  # of those that converged, so that the two lists need not be parallel
        return np.log([[law.loss(*point[:3], point.kind) for point in points] for law in laws])

    wanted, found = log_losses(fits.fit(points, CHECKED).replicates), log_losses(fit.replicates)
    return float((np.abs(wanted[:, None] - found).max(-1).min(1) < 1e-4).mean())


def main(
    simulations: Annotated[int, Option("simulations of each case", least=1)] = 50,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    planned, results, everything = Planned("configs/protocols/small.py"), {}, defaultdict(list)
    for number, (name, case) in enumerate(CASES.items()):
        shares, dropped = defaultdict(list), []
        for simulation in range(simulations):
            points, left_out = planned.simulate(case, (number, simulation))
            fit = fitted(points, fits.REPLICATES)
            dropped.append(fit.dropped / fits.REPLICATES)
            if simulation == 0:
                same = same_minima(points, fit)
            for what, share in held(planned, fit, case.law, left_out).items():
                shares[what].append(share)
                everything[what].append(share)
        results[name] = {what: float(np.mean(found)) for what, found in shares.items()}
        results[name] |= {"same_minima": same, "dropped": float(np.mean(dropped))}
        print(name, results[name], flush=True)
    results["all"] = {  # intervals of one simulation are alike: the error is that of a mean over simulations
        what: {"share": float(np.mean(found)), "standard_error": float(np.std(found) / math.sqrt(len(found)))}
        for what, found in everything.items()
    }
    cases = {name: case._asdict() | {"law": case.law.named()} for name, case in CASES.items()}
    common.write(output, results, {"simulations": simulations, "cases": cases, "curves": fit.curves})


if __name__ == "__main__":
    cli.run(main)
