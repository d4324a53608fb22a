"""What each option of docs/training.md is worth: short trainings with and without it, with the same seeds.

    python benchmarks/recipe.py --english=DIR --workdir=DIR --output=benchmarks/results/recipe_cpu.json

`--english` is a folder with train-*.json.gz and validation-*.json.gz, each with one {"text": ...} a line. Each run is
the command `train` in a process of its own, in a folder of its own; a side that serves several comparisons is trained
once. Kill it at any time and run the same line again. Differences are those of the held-out loss, seed by seed.
"""

import glob
import gzip
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from typing import Annotated, NamedTuple

import common
from scipy import stats

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option

# What all runs share: 0.8 M parameters without embedding and head, and 0.6 M tokens of sequences of 128
_SHARED = {
    "model.dim": 128,
    "model.layers": 4,
    "model.heads": 4,
    "seq_len": 128,
    "batch_size": 16,
    "steps": 300,
    "data.path": "ENGLISH",
    "data.epochs": 9,
    "optimizer.warmup_steps": 30,
    "checkpoint.every": 300,
    "eval.every": 300,
    "eval.batches": 32,
    "sample.tokens": 0,
    "log.tensorboard": False,
}


class Comparison(NamedTuple):
    """An option, with and without it.

    Attributes:
      without, using: config fields that differ from `_SHARED`; None: the field is not given.
      architecture: what is trained.
      source: whose held-out loss is compared, by the name of its folder; "": that of all.
    """

    without: dict
    using: dict
    architecture: str = "memory"
    source: str = ""


_MIXED = {"data.path": "ENGLISH:0.9,PYTHON:0.1"}, {"data.path": "ENGLISH:0.5,PYTHON:0.5"}
_PARAGRAPHS = {"data.path": "PARAGRAPHS", "seq_len": 512, "batch_size": 4}
_SKIPS = {"optimizer.max_skipped": 300, "optimizer.spike_deviations": 6.0}
COMPARISONS = {
    "muon": Comparison({}, {"optimizer.name": "muon"}),
    "muon in base": Comparison({}, {"optimizer.name": "muon"}, "base"),
    "wsd": Comparison({}, {"optimizer.schedule": "wsd"}),
    "constant": Comparison({}, {"optimizer.schedule": "constant"}),
    # 300 steps of 2,048 tokens
    "tokens": Comparison({}, {"steps": None, "tokens": 614_400.0}),
    "document_mask": Comparison(_PARAGRAPHS, _PARAGRAPHS | {"data.document_mask": True}),
    "english in a mixture": Comparison(*_MIXED, source="english"),
    "python in a mixture": Comparison(*_MIXED, source="python"),
    "skipping": Comparison({}, _SKIPS),
    "skipping in base at 10 times the rate": Comparison(
        {"optimizer.peak_lr": 3e-2}, {"optimizer.peak_lr": 3e-2} | _SKIPS, "base"
    ),
    "norms": Comparison({}, {"log.norms_every": 10}),
    "samples": Comparison({}, {"sample.tokens": 20, "sample.every": 100}),
    "qk_norm": Comparison({}, {"model.qk_norm": True}),
    "qk_norm in base": Comparison({}, {"model.qk_norm": True}, "base"),
    "qk_norm in base at 10 times the rate": Comparison(
        {"optimizer.peak_lr": 3e-2}, {"optimizer.peak_lr": 3e-2, "model.qk_norm": True}, "base"
    ),
    "logit_softcap": Comparison({}, {"model.logit_softcap": 30.0}),
}


class Runs:
    """Training runs, each in a folder of `workdir` that is named by its fields.

    Args:
      places: {name in a config field: path}, such as ENGLISH for the English data.
    """

    def __init__(self, workdir: str, places: dict[str, str]):
        self._workdir, self._places = workdir, places

    def train(self, architecture: str, changed: dict, seed: int) -> dict:
        """Trains, or resumes a run that was stopped. Returns: its result.json. Raises: UserError if training fails."""
        fields = _SHARED | {"seed": seed} | changed
        key = hashlib.sha256(json.dumps([architecture, fields], sort_keys=True).encode()).hexdigest()[:12]
        given = {name: self._placed(value) for name, value in fields.items() if value is not None}
        return common.train(os.path.join(self._workdir, key), f"tiny.py:{architecture}", given)

    def _placed(self, value):
        """The value of a config field, with paths in place of their names."""
        if isinstance(value, str):
            for name, path in self._places.items():
                value = value.replace(name, path)
        return value


def _run(command: str, *flags: str) -> None:
    """Runs a command of the package. Raises: UserError if it fails."""
    if subprocess.run([sys.executable, "-m", f"memoryllm_jax.{command}", *flags]).returncode:
        raise UserError(f"{command} {' '.join(flags)}: failed")


def prepared(english: str, workdir: str) -> dict[str, str]:
    """Prepares data of one tokenizer in the workdir, unless it is there.

    Returns: the folders of ENGLISH, of PARAGRAPHS, which are those of the English text as documents of their own, and
      of PYTHON, the texts that come with Python.
    """
    folders = {name: os.path.join(workdir, name.lower()) for name in ("ENGLISH", "PARAGRAPHS", "PYTHON")}
    tokenizer = f"sentencepiece:{folders['ENGLISH']}/tokenizer.model"
    _prepare(folders["ENGLISH"], english, "sentencepiece:train:4096")
    paragraphs = os.path.join(workdir, "paragraph_texts")
    _write_paragraphs(english, paragraphs)
    _prepare(folders["PARAGRAPHS"], paragraphs, tokenizer)
    if not os.path.exists(f"{folders['PYTHON']}/dataset.json"):
        fraction = "--validation_fraction=0.02"
        _run("prepare", "--input=embedded", fraction, f"--tokenizer={tokenizer}", f"--output={folders['PYTHON']}")
    return folders


def _prepare(output: str, texts: str, tokenizer: str) -> None:
    if not os.path.exists(f"{output}/dataset.json"):
        inputs = f"--input={texts}/train-*.json.gz", f"--validation_input={texts}/validation-*.json.gz"
        _run("prepare", *inputs, f"--tokenizer={tokenizer}", f"--output={output}")


def _write_paragraphs(english: str, output: str) -> None:
    """Writes each paragraph of the texts as a document."""
    os.makedirs(output, exist_ok=True)
    for path in glob.glob(f"{english}/*.json.gz"):
        with gzip.open(path, "rt") as file, gzip.open(f"{output}/{os.path.basename(path)}", "wt", 1) as out:
            for line in file:
                for text in json.loads(line)["text"].split("\n\n"):
                    if text.strip():
                        out.write(json.dumps({"text": text.strip()}) + "\n")


def difference(without: list[float], using: list[float]) -> dict[str, float]:
    """Mean of the differences seed by seed, and half the width of its 95% interval (Student's t)."""
    pairs = [b - a for a, b in zip(without, using, strict=True)]
    half = stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return {"mean": statistics.mean(pairs), "half_width": half}


def measure(runs: Runs, comparison: Comparison, seeds: int) -> dict:
    """The held-out losses of both sides by seed, their difference, and the steps that each run skipped, if any."""
    losses, skipped = {"without": [], "using": []}, {}
    for seed in range(seeds):
        for side, found in losses.items():
            result = runs.train(comparison.architecture, getattr(comparison, side), seed)
            validation = result["validation"]
            found.append((validation["sources"][comparison.source] if comparison.source else validation)["loss"])
            if "skipped" in result:
                skipped.setdefault(side, []).append(result["skipped"])
    return comparison._asdict() | {"losses": losses, "difference": difference(**losses), "skipped": skipped}


def main(
    english: Annotated[str, Option("folder of English texts")],
    workdir: Annotated[str, Option("folder for data and runs")],
    only: Annotated[tuple[str, ...], Option("names of comparisons; none: all")] = (),
    seeds: Annotated[int, Option("runs of each side", least=2)] = 3,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    runs = Runs(workdir, prepared(english, workdir))
    results = {}
    for name in only or COMPARISONS:
        results[name] = measure(runs, COMPARISONS[name], seeds)
        found = results[name]["difference"]
        print(f"{name}: {found['mean']:+.4f} +- {found['half_width']:.4f} nats a token", flush=True)
        common.write(output, results, {"shared": _SHARED, "seeds": seeds})


if __name__ == "__main__":
    cli.run(main)
