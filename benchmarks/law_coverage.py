"""How often the 95% intervals of the law of `fits` hold the truth, on simulated runs.

    python benchmarks/law_coverage.py --output=benchmarks/results/law_coverage_cpu.json

The runs of configs/protocols/small.py at 4,096 ids get losses of a known law, with noise of each run (its seed), and
noise that all runs of a variant and size share (what the law gets wrong along a curve). An interval of a number or of
a crossing holds the truth if the law's own value is inside; that of a left-out run, if the run's loss is.
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
from memoryllm_jax.model import flops

VOCABULARY = "4096"
KINDS = ("ffn", "rows")
SHARED = (math.log(0.9), math.log(25), 0.33, math.log(150), 0.4)  # log E, log A, alpha, log B, beta
USEFUL = Law(KINDS, np.array([*SHARED, 0.3, 0.02, 0.9, 0.5]), (1, 1))  # k ffn, k rows, r ffn, r rows
USELESS = Law(KINDS, np.array([*SHARED, 0, 0, 0, 0]), (1, 1))


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


class Simulated:
    """The runs that a protocol plans at one vocabulary, with simulated losses: what `laws` reads of `Results`."""

    def __init__(self, path: str):
        self.protocol = protocol_lib.load(path)
        rates = dict.fromkeys(map(self.protocol.swept, self.protocol.settings()), 4e-3)
        runs = [run for run in self.protocol.experiment_runs(rates) if run.vocabulary == VOCABULARY]
        self._models = {(run.variant, run.size): self._model(run) for run in runs}
        self.runs = [run for run in runs if self._models[run.variant, run.size][2] in ("", *KINDS)]

    def draw(self, case: Case, seed: tuple[int, ...]) -> None:
        """Draws the losses of all runs anew."""
        rng = np.random.default_rng(seed)
        curves = defaultdict(lambda: rng.normal(0, case.curve_noise))
        self._losses = {}
        for run in self.runs:
            active, memory, kind = self._models[run.variant, run.size]
            noise = rng.normal(0, case.seed_noise) + curves[run.variant, run.size]
            self._losses[run.key] = case.law.loss(active, memory, run.tokens, kind) * math.exp(noise)

    def crossing(self, law: Law, variant: str, size: str) -> float:
        """Where the law has base overtake a variant."""
        (*base, _), (*other, kind) = self._models["base", size], self._models[variant, size]
        return law.crossing(tuple(base), tuple(other), kind)

    def config(self, run: Run) -> Config:
        model = dataclasses.replace(run.config.model, vocab_size=int(VOCABULARY))
        return dataclasses.replace(run.config, model=model)

    def loss(self, run: Run) -> float:
        return self._losses[run.key]

    def _model(self, run: Run) -> tuple[int, int, str]:
        counts, model = flops.parameters(self.config(run)), run.config.model
        return counts["active"], counts["memory"], model.token_memory if model.row_dim else ""


def held(simulated: Simulated, found: FittedLaw, truth: Law) -> dict[str, float]:
    """The share of intervals that hold the truth, by what they are of."""
    pairs = {name: [(interval, truth.named()[name])] for name, interval in found.fit.numbers().items()}
    pairs["crossings"] = [(c.tokens, simulated.crossing(truth, c.variant, c.size)) for c in found.crossings]
    pairs["left-out runs"] = [(prediction.predicted, prediction.measured) for prediction in found.predictions]
    return {what: float(np.mean([i.low <= value <= i.high for i, value in of])) for what, of in pairs.items()}


def main(
    simulations: Annotated[int, Option("simulations of each case", least=1)] = 50,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    simulated, results, everything = Simulated("configs/protocols/small.py"), {}, defaultdict(list)
    for number, (name, case) in enumerate(CASES.items()):
        shares = defaultdict(list)
        for simulation in range(simulations):
            simulated.draw(case, (number, simulation))
            found = laws.of_vocabulary(simulated, VOCABULARY)
            shares["dropped"].append(found.fit.dropped / fits.REPLICATES)
            for what, share in held(simulated, found, case.law).items():
                shares[what].append(share)
                everything[what].append(share)
        results[name] = {what: float(np.mean(of)) for what, of in shares.items()}
        print(name, results[name], flush=True)
    results["all"] = {  # intervals of one simulation are alike: the error is that of a mean over simulations
        what: {"share": float(np.mean(of)), "standard_error": float(np.std(of) / math.sqrt(len(of)))}
        for what, of in everything.items()
    }
    cases = {name: case._asdict() | {"law": case.law.named()} for name, case in CASES.items()}
    common.write(output, results, {"simulations": simulations, "cases": cases, "curves": found.fit.curves})


if __name__ == "__main__":
    cli.run(main)
