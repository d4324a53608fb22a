"""The models, records and figures of docs/comparison.md that repeat the MemoryLLM paper on models that have learnt.

    python benchmarks/paper.py --english=DATA --work=DIR                       # hours; go on with the same line

Stages, each of which leaves alone what is finished:
    text      text and tasks of recall_reasoning.py, prepared with the tokenizer of --english, which `prepare` wrote
    train     --variants with --seeds: 6 layers of width 128, trained on 4 parts of English and 1 of this text
"""

import concurrent.futures
import json
import os
import subprocess
import sys
from typing import Annotated

import common

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option

STAGES = ("text", "train")
_MIXTURE = "english:0.8,tasks/data:0.2"
_FIELDS = {
    "data.epochs": 10,
    "model.dim": 128,
    "model.layers": 6,
    "model.heads": 4,
    "batch_size": 16,  # of 256 tokens
    "eval.every": 500,
    "eval.batches": 20,
    "checkpoint.every": 500,
    "log.every": 100,
    "sample.tokens": 0,
}


def run(work: str, log: str, *arguments: str) -> None:
    """Runs Python in the folder `work`, at low priority, with its output in WORK/`log`. Raises: UserError."""
    # Paths are relative to `work`, so that pages and records name no folder of this machine.
    environment = os.environ | {"PYTHONPATH": common.ROOT}
    path = os.path.join(work, log)
    with open(path, "a") as file:
        done = subprocess.run(
            ["nice", "-n", "15", sys.executable, *arguments], cwd=work, env=environment, stdout=file, stderr=file
        )
    if done.returncode:
        raise UserError(f"{path}: expected exit code 0, found {done.returncode} of python {' '.join(arguments)}")


def make_text(work: str, english: str) -> None:
    """Links the English data, and writes and prepares the text of recall and reasoning."""
    if not os.path.exists(f"{work}/english"):
        os.symlink(os.path.abspath(english), f"{work}/english")
    if os.path.exists(f"{work}/tasks/data/dataset.json"):
        return
    run(work, "text.log", f"{common.ROOT}/benchmarks/recall_reasoning.py", "--output=tasks")
    run(
        work,
        "text.log",
        *("-m", "memoryllm_jax.prepare", "--input=tasks/text/train-*.json.gz", "--output=tasks/data"),
        "--validation_input=tasks/text/validation-*.json.gz",
        f"--tokenizer=sentencepiece:{_tokenizer(english)}",
    )


def _tokenizer(english: str) -> str:
    """The path of the tokenizer in prepared data. Raises: ArgumentError."""
    described = json.loads(storage.read_bytes(os.path.join(english, "dataset.json"), "prepared data"))["tokenizer"]
    if described["kind"] != "sentencepiece":
        raise ArgumentError("english", f"expected a SentencePiece tokenizer, found {described['kind']}")
    return f"english/{described['file']}"


def train(work: str, variants: tuple[str, ...], seeds: int, steps: int, rates: dict[str, float], jobs: int) -> None:
    """Trains what has no result yet, some at a time; runs that were interrupted go on. Raises: UserError."""
    names = [(variant, seed) for seed in range(seeds) for variant in variants]
    missing = [name for name in names if not os.path.exists(f"{work}/{name[0]}-{name[1]}/result.json")]

    def one(name: tuple[str, int]) -> None:
        variant, seed = name
        workdir = f"{variant}-{seed}"
        rate = rates.get(variant, 3e-3)
        fields = _FIELDS | {"steps": steps, "seed": seed, "data.path": _MIXTURE}
        fields |= {"optimizer.peak_lr": rate, "optimizer.final_lr": f"{rate / 10:g}"}
        fields |= {"optimizer.warmup_steps": steps // 20}
        options = [f"--config.{field}={value}" for field, value in fields.items()]
        config = f"--config={common.ROOT}/configs/tiny.py:{variant}"
        run(work, f"{workdir}.log", "-m", "memoryllm_jax.train", config, f"--workdir={workdir}", *options)
        print(f"{workdir}: done", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(one, name) for name in missing]
        errors = [found for found in (r.exception() for r in runs) if found]  # the other runs go on
    if errors:
        raise errors[0]


def _rates(texts: tuple[str, ...]) -> dict[str, float]:
    """The option's rates by variant. Raises: ArgumentError."""
    try:
        return {name: float(rate) for name, rate in (text.split("=") for text in texts)}
    except ValueError as error:
        raise ArgumentError("rates", f"expected VARIANT=RATE such as base=2e-3, found {','.join(texts)}") from error


def main(
    english: Annotated[str, Option("folder of English that `prepare` wrote with a SentencePiece tokenizer")],
    work: Annotated[str, Option("folder for text, models and pages")],
    stages: Annotated[tuple[str, ...], Option(f"some of {', '.join(STAGES)}")] = STAGES,
    variants: Annotated[tuple[str, ...], Option("architectures to train")] = ("base", "memory", "flex-3"),
    seeds: Annotated[int, Option("runs of each, with seeds from 0 on", least=1)] = 3,
    steps: Annotated[int, Option("of 4,096 tokens", least=1)] = 6000,
    rates: Annotated[tuple[str, ...], Option("VARIANT=RATE, peak learning rates other than 3e-3")] = (),
    jobs: Annotated[int, Option("runs at a time", least=1)] = 2,
) -> None:
    if not set(stages) <= set(STAGES):
        raise ArgumentError("stages", f"expected some of {', '.join(STAGES)}, found {', '.join(stages)}")
    os.makedirs(work, exist_ok=True)
    if "text" in stages:
        make_text(work, english)
    if "train" in stages:
        train(work, variants, seeds, steps, _rates(rates), jobs)


if __name__ == "__main__":
    cli.run(main)
