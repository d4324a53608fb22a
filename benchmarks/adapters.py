"""What an adapter of base gains on the texts that it is trained on, and loses on base's own, against full fine-tuning.

    python benchmarks/adapters.py --english=DATA --workdir=DIR --output=benchmarks/results/adapters_cpu.json

Base is trained on English. Then its adapter (configs/start.py:adapter) and base itself, whole, are trained on as many
tokens of Python's own texts, and on English again. Held-out losses of all of them on both texts are compared with those
of base, document by document and seed by seed. Seed 1 tries all peak rates; the others have the rate with the lowest
held-out loss on the text that is trained on.

`--english` is prepared data; Python's texts are prepared with its tokenizer. Each run is the command `train` in a
folder of its own: kill it at any time and run the same line again. Intervals are [value, low, high].
"""

import itertools
import json
import os
import subprocess
import sys
from typing import Annotated

import common
import numpy as np

from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.experiments import heldout, intervals
from memoryllm_jax.model import flops

_CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "configs")
_SHARED = {
    "seq_len": 256,
    "batch_size": 16,
    "sample.tokens": 0,
    "checkpoint.every": 300,
    "eval.every": 300,
    "eval.batches": 8,
    "log.tensorboard": False,
}
_BASE = {"model.dim": 128, "model.layers": 6, "model.heads": 4, "optimizer.warmup_steps": 40}
_FIRST_SEED = 1  # base has seen the order of seed 0
WAYS = {"adapter": "adapter", "whole": "base"}  # {what is trained: architecture for configs/start.py}


def train(folder: str, config: str, fields: dict) -> str:
    """Trains, or resumes a run that was stopped. Returns: its folder. Raises: UserError if training fails."""
    if not os.path.exists(os.path.join(folder, "result.json")):
        flags = [f"--config.{name}={value}" for name, value in (_SHARED | fields).items()]
        command = [sys.executable, "-m", "memoryllm_jax.train", f"--config={_CONFIGS}/{config}", f"--workdir={folder}"]
        if subprocess.run([*command, *flags]).returncode:
            raise UserError(f"{folder}: training failed")
    return folder


def validation_loss(folder: str) -> float:
    """The held-out loss on its own text that a run ended with, in nats a token."""
    with open(os.path.join(folder, "result.json")) as file:
        return json.load(file)["validation"]["loss"]


def nats(folder: str, name: str, data: str) -> np.ndarray:
    """Nats of each held-out target of a text by a run. They are kept in the run's folder."""
    path = os.path.join(folder, f"heldout_{name}.npy")
    if not os.path.exists(path):
        _, found = heldout.nats(folder, data)
        np.save(path, found)
    return np.load(path)


def compared(losses: dict, texts: dict[str, heldout.HeldOutText], seeds: int) -> dict:
    """The losses on each text, and their differences from base's and from each other's, with 95% intervals.

    Args:
      losses: {(way, text that it was trained on): {text: nats [seeds, D] by document}}, also of ("base", "").
    """
    out = {}
    for name, text in texts.items():
        documents, units = intervals.Documents(len(text.bytes_D)), text.by_document(np.ones(len(text.targets)))
        runs = {key: of_texts[name] for key, of_texts in losses.items()}
        trained = np.array([runs[key].sum(1) / units.sum() for key in runs if key[0] != "base"])
        spread = intervals.spread_of_seeds(trained) if seeds > 1 else intervals.NO_SPREAD
        base = runs["base", ""]
        of_text = {"documents": len(units), "base": documents.mean(base, units)}
        for (way, domain), sums_SD in runs.items():
            if way == "base":
                continue
            of_text[f"{way} on {domain}"] = {
                "loss": documents.mean(sums_SD, units),
                "less base": documents.difference(sums_SD, np.repeat(base, seeds, 0), units, spread),
                "less whole": documents.difference(sums_SD, runs["whole", domain], units, spread),
            }
        out[name] = of_text
    return out


def cost(folder: str) -> dict:
    """Parameters that a run trains, and FLOPs a token of its steps."""
    config = config_of(folder)
    counts = flops.parameters(config)
    trained = counts["memory"] if config.optimizer.train == "memory" else counts["total"]
    return {"trained": trained, "total": counts["total"], "flops_a_token": flops.train_flops(config, 1, 0)}


def main(
    english: Annotated[str, Option("prepared English text")],
    workdir: Annotated[str, Option("folder for the runs")],
    output: Annotated[str, Option("path of the results", writes=True)],
    base_tokens: Annotated[int, Option("tokens that base is trained on", least=1)] = 2_500_000,
    tokens: Annotated[int, Option("tokens that each other run is trained on", least=1)] = 1_000_000,
    seeds: Annotated[int, Option("runs of each kind", least=1)] = 3,
    rates: Annotated[tuple[float, ...], Option("peak rates of adapters")] = (3e-2, 1e-1, 3e-1),
    whole_rates: Annotated[tuple[float, ...], Option("peak rates of full fine-tuning")] = (1e-3, 3e-3, 1e-2),
) -> None:
    python = os.path.join(workdir, "python")
    shards.prepare("embedded", f"sentencepiece:{english}/tokenizer.model", python, validation_fraction=0.05)
    data = {"python": python, "english": english}
    fields = _BASE | {"tokens": base_tokens, "data.path": english}
    base = train(os.path.join(workdir, "base"), "tiny.py:base", fields)
    texts = {name: heldout.open_text(Dataset(path), _SHARED["seq_len"]) for name, path in data.items()}

    def by_document(folders: list[str]) -> dict[str, np.ndarray]:
        return {
            name: np.stack([text.by_document(nats(folder, name, data[name])) for folder in folders])
            for name, text in texts.items()
        }

    def run(way: str, domain: str, peak: float, seed: int) -> str:
        fields = {"seed": seed, "tokens": tokens, "data.path": data[domain], "optimizer.peak_lr": peak}
        fields |= {"optimizer.final_lr": peak / 10, "optimizer.warmup_steps": 20}
        folder = os.path.join(workdir, f"{way}_{domain}_{peak:g}_{seed}")
        return train(folder, f"start.py:{WAYS[way]}@{base}", fields)

    losses, costs, swept = {("base", ""): by_document([base])}, {}, {}
    for way, domain in itertools.product(WAYS, data):
        peaks = rates if way == "adapter" else whole_rates
        of_peaks = {peak: validation_loss(run(way, domain, peak, _FIRST_SEED)) for peak in peaks}
        best = min(of_peaks, key=of_peaks.get)
        folders = [run(way, domain, best, seed) for seed in range(_FIRST_SEED, _FIRST_SEED + seeds)]
        losses[way, domain], costs[way], swept[f"{way} on {domain}"] = by_document(folders), cost(folders[0]), of_peaks
    common.write(output, compared(losses, texts, seeds), {"cost": costs, "loss_by_peak_rate": swept})


if __name__ == "__main__":
    cli.run(main)
