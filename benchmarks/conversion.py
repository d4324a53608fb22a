"""How many tokens memory and flex-3 save if they start from a trained base, against training from scratch.

    python benchmarks/conversion.py --protocol=configs/protocols/small.py --comparison=DIR --workdir=DIR \\
        --output=benchmarks/results/conversion_cpu

The models from scratch are the finished runs of a comparison (`compare --workdir=DIR`) of one size and vocabulary:
several lengths, each with a whole cosine schedule and the best rate of its sweep. Here base is trained longer,
converted with each value of config.start.memory in WAYS, and trained further with several peak rates and lengths. The
rate with the lowest held-out loss of seed 0 after the fewest tokens is used for all lengths and seeds. A seed decides
the order of the text. There is one base and one distillation.

A converted model begins as its run "start", which distils base with a learning rate of almost zero, so that its
held-out loss is that before training. Where it has an FFN-C, that reads what base's FFN read; the paper's, beside
attention, is measured before training alone.

The record has held-out losses, the loss of unigram frequencies on the same text, differences from scratch with --times
as many tokens, and the share of the tokens that scratch needs for the converted model's loss: losses from scratch are
interpolated against the logarithm of tokens. Where the longest run from scratch does not reach that loss, the share is
that of its tokens, and so at most this. Intervals hold with 95% over documents and seeds. The text of a distillation is
the first of the run, which then trains on it; its work is given beside.

Writes NAME.json and NAME.png; needs matplotlib (the extra `bench`). Kill it at any time and run the same line again.
"""

import math
import os
from typing import Annotated, NamedTuple

import common
import numpy as np
from common import SHORT_RUN, STEP_TOKENS

from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.common import cli, plots
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import heldout, intervals, outcomes, runner, scoring
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.protocol import Run
from memoryllm_jax.model import flops
from memoryllm_jax.training import distillation

SCRATCH, WAYS = "scratch", ("copy", "distill")
_WARMUP, _LEAST_WARMUP = 0.02, 5  # share of a run's steps, and steps at least
_NEAR = 0.05  # relative difference of lengths that count as equal, as runs have whole numbers of steps
Sums = dict[tuple[str, int], np.ndarray]  # as of `Losses`


class Runs(NamedTuple):
    """Base and what it is converted to, each in a folder of `workdir`.

    Attributes:
      fields: of all runs.
      distill_tokens: tokens of a distillation's text.
    """

    workdir: str
    fields: dict
    distill_tokens: int

    def train(self, name: str, config: str, tokens: int, peak: float, more: dict) -> str:
        """Trains with a whole cosine schedule, or reads the finished run. Returns: its folder."""
        steps = math.ceil(tokens / STEP_TOKENS)
        rates = {"peak_lr": peak, "final_lr": peak / 10, "warmup_steps": max(_LEAST_WARMUP, round(_WARMUP * steps))}
        fields = self.fields | {"steps": steps} | {f"optimizer.{key}": value for key, value in rates.items()}
        folder = os.path.join(self.workdir, name)
        common.train(folder, config, fields | more)
        return folder

    def base(self, tokens: int, peak: float) -> str:
        return self.train("base", "tiny.py:base", tokens, peak, {})

    def start(self, architecture: str, way: str, is_beside: bool = False) -> str:
        """A converted model before training.

        Args:
          is_beside: whether FFN-C stands beside attention, as in the paper.
        """
        more = {"start.memory": way} | ({"model.compute_input": "block_input"} if is_beside else {})
        if way == "distill":
            more["start.distill_tokens"] = self.distill_tokens
        config = f"start.py:{architecture}@{self.workdir}/base"
        name = f"{architecture}-{way}" + ("-beside" if is_beside else "")
        return self.train(name, config, self.distill_tokens, 1e-12, more)

    def converted(self, architecture: str, way: str, tokens: int, peak: float, seed: int) -> str:
        """A converted model after training."""
        config = f"start.py:{architecture}@{self.start(architecture, way)}"
        return self.train(f"{architecture}-{way}-{tokens}-{peak:g}-{seed}", config, tokens, peak, {"seed": seed})


def nats(folder: str, text: heldout.HeldOutText) -> np.ndarray:
    """Nats of each held-out document by a run, float64 [D]. The run's folder keeps them."""
    return scoring.kept(os.path.join(folder, scoring.FILE), folder, text)


def of_scratch(runs: list[Run], comparison: str, text: heldout.HeldOutText) -> dict[str, Sums]:
    """Nats of a comparison's runs by variant, as of `Losses`."""
    models: dict[tuple[str, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.variant, run.tokens, run.seed)):
        models.setdefault((run.variant, run.tokens), []).append(run)
    found: dict[str, Sums] = {}
    for (variant, tokens), of_seeds in models.items():
        sums_SD = np.stack([nats(run.folder(comparison), text) for run in of_seeds])
        found.setdefault(variant, {})[SCRATCH, tokens] = sums_SD
    return found


def unigram_nats(data: Dataset, text: heldout.HeldOutText) -> float:
    """The loss on held-out text of the frequencies of ids in the training text, each counted once more, in nats."""
    counts_V = 1 + np.bincount(data.train.read(0, data.train.tokens), minlength=data.vocab_size)
    return float(-np.log(counts_V / counts_V.sum())[text.targets].mean())


class Losses:
    """Held-out losses of all models of an architecture.

    Args:
      units_D: targets of each document.
      sums: {(way, tokens): nats [S, D] by seed and document}; converted models start after 0 tokens.
      spread: of losses from scratch over seeds.
    """

    def __init__(self, documents: intervals.Documents, units_D: np.ndarray, sums: Sums, spread: intervals.SeedSpread):
        self._documents, self._units_D, self._sums = documents, units_D, sums
        # Losses from scratch vary more with the seed than those of models with one start in common.
        converted = [self.by_seed(*key) for key in sums if key[0] != SCRATCH]
        self._spreads = {SCRATCH: spread, "converted": pooled(converted)}

    def by_seed(self, way: str, tokens: int) -> np.ndarray:
        return self._sums[way, tokens].sum(1) / self._units_D.sum()

    def lengths(self, way: str) -> list[int]:
        return sorted(tokens for of_way, tokens in self._sums if of_way == way)

    def estimate(self, way: str, tokens: int) -> intervals.Estimate:
        """The mean loss. Its seeds are drawn apart from those of other models, its documents with theirs."""
        draw = list(self._sums).index((way, tokens))
        spread = self._spreads[SCRATCH if way == SCRATCH else "converted"]
        return self._documents.estimate(self._sums[way, tokens], self._units_D, spread, draw)

    def less(self, one: tuple[str, int], other: tuple[str, int]) -> intervals.Interval:
        """The loss of one model less that of another."""
        a, b = self.estimate(*one), self.estimate(*other)
        return intervals.of_replicates(a.value - b.value, a.replicates_R - b.replicates_R)

    def share(self, way: str, tokens: int) -> intervals.Interval:
        """Tokens of a converted model over those that scratch needs to reach its loss.

        It is at most this where the longest run from scratch does not reach the loss, and infinite where the shortest
        one does.
        """
        lengths = self.lengths(SCRATCH)
        scratch_L, converted = [self.estimate(SCRATCH, length) for length in lengths], self.estimate(way, tokens)

        def of(loss: float, losses_L: np.ndarray) -> float:
            order = np.argsort(losses_L)
            needed = np.interp(loss, losses_L[order], np.log(lengths)[order], right=-np.inf)
            return math.inf if needed == -np.inf else float(tokens / np.exp(needed))

        losses_RL = np.stack([estimate.replicates_R for estimate in scratch_L], 1)
        replicates = [of(loss, losses_L) for loss, losses_L in zip(converted.replicates_R, losses_RL)]
        return intervals.of_replicates(of(converted.value, np.array([e.value for e in scratch_L])), replicates)

    def results(self, times: int) -> dict:
        """Losses, and what conversion saves, as the record has them."""
        out: dict = {"deviation_over_seeds": self._spreads}
        for way, tokens in self._sums:
            of_model: dict = {
                "loss": self.estimate(way, tokens).interval,
                "by_seed": self.by_seed(way, tokens).tolist(),
            }
            if way != SCRATCH and tokens:
                of_model["share_of_scratch_tokens"] = self.share(way, tokens)
                for length in self.lengths(SCRATCH):
                    if abs(length / (times * tokens) - 1) < _NEAR:
                        of_model[f"less scratch {length}"] = self.less((way, tokens), (SCRATCH, length))
            if way == "distill":
                of_model["less copy"] = self.less((way, tokens), ("copy", tokens))
            out[f"{way} {tokens}"] = of_model
        return out


def pooled(losses: list[np.ndarray]) -> intervals.SeedSpread:
    """The standard deviation of losses over seeds, pooled over models. Args: losses: by seed, of each model."""
    freedom = sum(len(by_seed) - 1 for by_seed in losses)
    if not freedom:
        return intervals.NO_SPREAD
    squares = sum(np.square(by_seed - by_seed.mean()).sum() for by_seed in losses)
    return intervals.SeedSpread(math.sqrt(squares / freedom), freedom)


def chart(sides: dict[str, Losses], base: float) -> plots.Chart:
    """Losses against tokens, with the farthest seed from their mean as bars, and base's."""
    lines = {}
    for name, of in sides.items():
        for way in (SCRATCH, *WAYS):
            losses = [of.by_seed(way, tokens) for tokens in of.lengths(way)]
            means, error = [x.mean() for x in losses], [np.abs(x - x.mean()).max() for x in losses]
            lines[f"{name}, {way}"] = plots.Line([t / 1e6 for t in of.lengths(way)], means, error)
    longest = max(max(line.x) for line in lines.values())
    lines["base"] = plots.Line([0, longest], [base, base], style={"color": "gray", "marker": "", "linestyle": "--"})
    return plots.Chart(lines, "millions of tokens of the run", "held-out loss, nats a token")


def cost(start: str) -> dict:
    """What a conversion costs before its first step: seconds, and the work in tokens of training."""
    config, seconds = config_of(start), common.result(start)["goodput"]["seconds"]
    found = {"seconds_before_first_step": seconds["start"]}
    if config.start.memory == "distill":
        rows = min(config.model.vocab_size, STEP_TOKENS)  # at most
        work = distillation.work(config, rows)
        found |= {
            "text_tokens": config.start.distill_tokens,
            "flops": work,
            "work_in_tokens": round(STEP_TOKENS * work / flops.train_flops(config, STEP_TOKENS, rows)),
        }
    return found


def main(
    protocol: Annotated[str, Option("the protocol's file")],
    comparison: Annotated[str, Option("workdir of `compare`, with the runs from scratch")],
    workdir: Annotated[str, Option("folder for the other runs")],
    output: Annotated[str, Option("path of the results, without an ending", writes=True)],
    size: Annotated[str, Option("size of the protocol")] = "S",
    vocabulary: Annotated[str, Option("vocabulary of the protocol")] = "512",
    architectures: Annotated[tuple[str, ...], Option("what to convert base to, variants of the protocol")] = (
        "memory",
        "flex-3",
    ),
    base_tokens: Annotated[int, Option("tokens of base", least=1)] = 10_000_000,
    base_rate: Annotated[float, Option("peak rate of base", least=1e-9)] = 4e-3,
    lengths: Annotated[tuple[int, ...], Option("tokens of converted runs")] = (250_000, 500_000, 1_000_000),
    times: Annotated[int, Option("a converted model is compared with this many times its tokens", least=1)] = 4,
    rates: Annotated[tuple[float, ...], Option("peak rates of converted models")] = (1e-3, 2e-3, 4e-3, 8e-3),
    seeds: Annotated[int, Option("seeds of each converted model", least=1)] = 3,
    distill_tokens: Annotated[int, Option("tokens of text to distil from", least=1)] = 65536,
) -> None:
    plots.check_available()
    bench, data = protocol_lib.load(protocol), runner.data_path(comparison, vocabulary)
    dataset = Dataset(data)
    text = heldout.open_text(dataset, SHORT_RUN["seq_len"])
    units_D = text.by_document(np.ones(len(text.targets)))
    documents = intervals.Documents(len(units_D))
    fields = SHORT_RUN | {"checkpoint.keep": 1, "data.path": data} | dict(bench.sizes[size])
    runs = Runs(workdir, fields, distill_tokens)
    base = runs.base(base_tokens, base_rate)
    of_base = documents.mean(nats(base, text)[None], units_D)
    facts: dict = {
        "base": {"tokens": base_tokens, "loss": of_base, "parameters": flops.parameters(config_of(base))},
        "documents": len(units_D),
        "unigram": unigram_nats(dataset, text),
        "cost": {},
        "loss_by_peak_rate": {},
    }
    finished = [run for run in outcomes.finished(bench, comparison) if (run.size, run.vocabulary) == (size, vocabulary)]
    scratch, sides = of_scratch(finished, comparison, text), {}
    # Of all variants, as each has few seeds
    spread = pooled([sums_SD.sum(1) / units_D.sum() for sums in scratch.values() for sums_SD in sums.values()])
    for name in architectures:
        if name not in scratch:
            raise UserError(f"{comparison}: expected finished runs of {name} in {size}, {vocabulary}, found none")
        sums = scratch[name]
        for way in WAYS:
            folders = {rate: runs.converted(name, way, min(lengths), rate, 0) for rate in rates}
            losses = {rate: common.result(folder)["validation"]["loss"] for rate, folder in folders.items()}
            found = facts["loss_by_peak_rate"][f"{name} {way}"] = common.best_rate(losses)
            start = runs.start(name, way)
            facts["cost"][f"{name} {way}"] = cost(start)
            sums[way, 0] = nats(start, text)[None]
            if config_of(start).model.compute_dim:
                sums[f"{way}, FFN-C beside attention", 0] = nats(runs.start(name, way, is_beside=True), text)[None]
            for tokens in lengths:
                folders = [runs.converted(name, way, tokens, found["best"], seed) for seed in range(seeds)]
                whole_steps = math.ceil(tokens / STEP_TOKENS) * STEP_TOKENS
                sums[way, whole_steps] = np.stack([nats(folder, text) for folder in folders])
        sides[name] = Losses(documents, units_D, sums, spread)
        common.write(f"{output}.json", {name: of.results(times) for name, of in sides.items()}, facts)
        chart(sides, of_base.value).draw().savefig(f"{output}.png", dpi=110)


if __name__ == "__main__":
    cli.run(main)
