"""How often the 95% intervals of the law of `fits` hold the truth, on simulated runs.

    python benchmarks/law_coverage.py --output=benchmarks/results/law_coverage_cpu.json

The runs of configs/protocols/small.py at 4,096 ids get losses of a known law, with noise of each run (its seed), and
noise that all runs of a variant and size share (what the law gets wrong along a curve). `laws.of_vocabulary` fits them
as it fits measured ones. An interval of a number or a crossing holds the truth if the law's own value is inside; that
of a left-out run, if the run's loss is.

For speed, fits to resampled curves start from the best fit alone, where `fits.fit` has two more starting points. For
the first simulation of each case they are repeated with all three: `same_minima` is the share of minima that are alike.
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
from memoryllm_jax.experiments.fits import Law
from memoryllm_jax.experiments.laws import FittedLaw
from memoryllm_jax.experiments.protocol import Run

VOCABULARY = "4096"
SHARED = (math.log(0.9), math.log(25), 0.33, math.log(150), 0.4)  # log E, log A, alpha, log B, beta
USEFUL = Law(("ffn", "rows"), np.array([*SHARED, 0.3, 0.02, 0.9, 0.5]), (1, 1))  # k ffn, k rows, r ffn, r rows
USELESS = Law(("ffn", "rows"), np.array([*SHARED, 0, 0, 0, 0]), (1, 1))


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
        self.runs = [run for run in runs if laws.model_of(self, run)[2] in ("", *USEFUL.kinds)]

    def simulate(self, case: Case, seed: tuple[int, ...]) -> None:
        """Draws the losses."""
        rng = np.random.default_rng(seed)
        curves = defaultdict(lambda: rng.normal(0, case.curve_noise))
        self._losses = {}
        for run in self.runs:
            active, memory, kind = laws.model_of(self, run)
            noise = rng.normal(0, case.seed_noise) + curves[run.variant, run.size]
            self._losses[run.key] = case.law.loss(active, memory, run.tokens, kind) * math.exp(noise)

    def config(self, run: Run) -> Config:
        model = dataclasses.replace(run.config.model, vocab_size=int(VOCABULARY))
        return dataclasses.replace(run.config, model=model)

    def loss(self, run: Run) -> float:
        return self._losses[run.key]


def held(planned: Planned, found: FittedLaw, truth: Law) -> dict[str, list[bool]]:
    """Whether each interval holds the truth, by what it is of."""
    numbers = found.fit.numbers()
    by_name = {name: [numbers[name].low <= value <= numbers[name].high] for name, value in truth.named().items()}
    sizes = dict.fromkeys(crossing.size for crossing in found.crossings)
    true = laws.crossings(planned, VOCABULARY, sizes, found.fit._replace(law=truth, replicates=[truth]))
    pairs = [(crossing.tokens, of_truth.tokens.value) for crossing, of_truth in zip(found.crossings, true)]
    by_name["crossings"] = [tokens.low <= value <= tokens.high for tokens, value in pairs]
    by_name["left-out runs"] = [p.predicted.low <= p.measured <= p.predicted.high for p in found.predictions]
    return by_name


def same_minima(one: FittedLaw, several: FittedLaw) -> float:
    """The share of the laws fitted from one start that are among those fitted from several, within 0.01% of losses."""

    def log_losses(found):
        # Fits that did not converge are left out, so that the two lists need not be parallel.
        return np.log([[law.loss(*p[:3], p.kind) for p in found.points] for law in found.fit.replicates])

    apart = np.abs(log_losses(one)[:, None] - log_losses(several)).max(-1)
    return float((apart.min(1) < 1e-4).mean())


def main(
    simulations: Annotated[int, Option("simulations of each case", least=1)] = 50,
    replicates: Annotated[int, Option("fits to resampled curves of each simulation", least=1)] = fits.REPLICATES,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    planned, results, everything = Planned("configs/protocols/small.py"), {}, defaultdict(list)
    for number, (name, case) in enumerate(CASES.items()):
        by_name, dropped = defaultdict(list), 0
        for seed in range(simulations):
            planned.simulate(case, (number, seed))
            found = laws.of_vocabulary(planned, VOCABULARY, replicates, starts=1)
            dropped += found.fit.dropped
            for what, is_held in held(planned, found, case.law).items():
                by_name[what].append(np.mean(is_held))
            if seed == 0:
                same = same_minima(found, laws.of_vocabulary(planned, VOCABULARY, replicates))
        results[name] = {what: float(np.mean(shares)) for what, shares in by_name.items()}
        print(name, results[name], f"same minima {same:.1%}", flush=True)
        results[name] |= {"same_minima": same, "dropped": dropped / (simulations * replicates)}
        for what, shares in by_name.items():
            everything[what] += shares
    # Intervals of one simulation are alike, so that the error is that of the mean over simulations.
    results["all"] = {
        what: {"share": float(np.mean(shares)), "error": float(np.std(shares) / math.sqrt(len(shares)))}
        for what, shares in everything.items()
    }
    print("all", results["all"])
    cases = {name: case._asdict() | {"law": case.law.named()} for name, case in CASES.items()}
    more = {"cases": cases, "curves": found.fit.curves, "settings": len(found.points)}
    common.write(output, results, more | {"simulations": simulations, "replicates": replicates})


if __name__ == "__main__":
    cli.run(main)
