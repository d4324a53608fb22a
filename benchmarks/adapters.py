"""What an adapter of base gains on texts that base has not seen, and loses on base's own, against full fine-tuning.

    python benchmarks/adapters.py --base=WORKDIR --english=DATA --workdir=DIR \\
        --output=benchmarks/results/adapters_cpu.json

Base was trained on English. Its adapter (configs/start.py:adapter), an adapter whose tokens share one row in each
layer, and base itself, whole, are trained on as many tokens of Python's own texts. The adapter with shared rows adds
one vector in each layer: what an adapter gains beyond it is what it knows about tokens. Held-out losses on both texts
are compared with base's, document by document. A ToL file of an adapter can be left out, which gives base's losses.
Adapter and base are also trained with replay: on the same tokens of Python, mixed with as many or seven times as many
of English, so that they do not forget it (Ibrahim et al. 2024, arXiv 2403.08763).

The first seed tries all peak rates; the others have the rate with its lowest validation loss, which is on Python, and
with replay on both texts. Python's texts are prepared with the tokenizer of `--english`. Kill it at any time and run
the same line again. Intervals are [value, low, high] and hold with 95% over documents and seeds, for this base.
"""

import os
from typing import Annotated, NamedTuple

import common
import numpy as np
from common import SHORT_RUN, STEP_TOKENS

from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import heldout, intervals, scoring
from memoryllm_jax.model import flops


class Way(NamedTuple):
    """What is trained.

    architecture: a name for configs/start.py.
    rows: config.model.rows.
    replay: tokens of English for each token of Python.
    """

    architecture: str
    rows: str = "own"
    replay: int = 0


WAYS = {
    "adapter": Way("adapter"),
    "adapter, replay": Way("adapter", replay=1),
    "adapter, replay of 7": Way("adapter", replay=7),
    "adapter, shared rows": Way("adapter", rows="shared"),
    "whole": Way("base"),
    "whole, replay": Way("base", replay=1),
    "whole, replay of 7": Way("base", replay=7),
}
_FIRST_SEED = 1  # base has seen the order of seed 0


def compared(losses: dict[str, dict[str, np.ndarray]], texts: dict[str, heldout.HeldOutText]) -> dict:
    """The losses on each text, and their differences from base's and from each other's.

    Args:
      losses: {way: {text: nats [seeds, D] by document}}, also of "base", with one seed.
    """
    out = {}
    for name, text in texts.items():
        documents, units = intervals.Documents(len(text.bytes_D)), text.by_document(np.ones(len(text.targets)))
        sums = {way: of_texts[name] for way, of_texts in losses.items()}
        base = sums.pop("base")
        spread = intervals.spread_of_seeds(np.array([sums_SD.sum(1) / units.sum() for sums_SD in sums.values()]))
        of_text = {"documents": len(units), "base": documents.mean(base, units)}
        for way, sums_SD in sums.items():
            of_text[way] = {
                "loss": documents.mean(sums_SD, units),
                # One base stands against all seeds, so that only the way's own seeds vary.
                "less base": documents.estimate(sums_SD - base, units, spread).interval,
            }
            for other in sums:
                if other not in (way, "adapter"):
                    of_text[way][f"less {other}"] = documents.difference(sums_SD, sums[other], units, spread)
        out[name] = of_text
    return out


def facts(base: str) -> dict:
    """What base is: its tokens of training, shape and parameters."""
    config = config_of(base)
    shape = {name: getattr(config.model, name) for name in ("vocab_size", "dim", "layers")}
    tokens = config.steps * config.batch_size * config.seq_len
    return {"tokens": tokens, "peak_lr": config.optimizer.peak_lr} | shape | flops.parameters(config)


def cost(folder: str) -> dict:
    """Parameters that a run trains, FLOPs a token of its steps, and seconds of its steps."""
    config = config_of(folder)
    counts = flops.parameters(config)
    trained = counts["memory"] if config.optimizer.train == "memory" else counts["total"]
    if config.model.rows == "shared":
        trained //= config.model.vocab_size  # one row of each layer's table
    rows = min(config.model.vocab_size, STEP_TOKENS)  # at most
    step_flops = flops.train_flops(config, STEP_TOKENS, rows)
    seconds = common.result(folder)["goodput"]["seconds"]["step"]
    return {"trained": trained, "total": counts["total"], "flops_a_token": step_flops / STEP_TOKENS, "seconds": seconds}


def main(
    base: Annotated[str, Option("workdir of base")],
    english: Annotated[str, Option("prepared English text that base was trained on")],
    workdir: Annotated[str, Option("folder for the other runs")],
    output: Annotated[str, Option("path of the results", writes=True)],
    tokens: Annotated[int, Option("tokens of Python that each run is trained on", least=1)] = 250_000,
    seeds: Annotated[int, Option("runs of each kind", least=1)] = 3,
    rates: Annotated[tuple[float, ...], Option("peak rates of adapters")] = (1e-2, 3e-2, 1e-1, 3e-1),
    whole_rates: Annotated[tuple[float, ...], Option("peak rates of full fine-tuning")] = (1e-3, 2e-3, 4e-3, 8e-3),
) -> None:
    python = os.path.join(workdir, "python")
    if not os.path.exists(os.path.join(python, "dataset.json")):
        shards.prepare("embedded", f"sentencepiece:{english}/tokenizer.model", python, validation_fraction=0.25)
    data = {"python": python, "english": english}
    texts = {name: heldout.open_text(Dataset(path), SHORT_RUN["seq_len"]) for name, path in data.items()}

    def by_document(folders: list[str]) -> dict[str, np.ndarray]:
        def of(folder: str, name: str) -> np.ndarray:
            path = os.path.join(workdir, f"{os.path.basename(folder)}_{name}.npz")
            return scoring.kept(path, folder, texts[name])

        return {name: np.stack([of(folder, name) for folder in folders]) for name in texts}

    def run(name: str, peak: float, seed: int) -> str:
        way = WAYS[name]
        path, count = python, tokens
        if way.replay:
            path, count = f"{python}:1,{english}:{way.replay}", (1 + way.replay) * tokens
        fields = SHORT_RUN | {"seed": seed, "tokens": count, "data.path": path, "optimizer.peak_lr": peak}
        warmup = max(1, count // (20 * STEP_TOKENS))
        fields |= {"optimizer.final_lr": peak / 10, "optimizer.warmup_steps": warmup, "model.rows": way.rows}
        folder = os.path.join(workdir, f"{name}_{peak:g}_{seed}".replace(", ", "_").replace(" ", "_"))
        common.train(folder, f"start.py:{way.architecture}@{base}", fields)
        return folder

    losses, costs, swept = {"base": by_document([base])}, {}, {}
    for name, way in WAYS.items():
        peaks = whole_rates if way.architecture == "base" else rates
        found = common.best_rate(
            {peak: common.result(run(name, peak, _FIRST_SEED))["validation"]["loss"] for peak in peaks}
        )
        folders = [run(name, found["best"], seed) for seed in range(_FIRST_SEED, _FIRST_SEED + seeds)]
        losses[name], costs[name], swept[name] = by_document(folders), cost(folders[0]), found
    common.write(output, compared(losses, texts), {"base": facts(base), "cost": costs, "loss_by_peak_rate": swept})


if __name__ == "__main__":
    cli.run(main)
