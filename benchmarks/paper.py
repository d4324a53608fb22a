"""The models, records and figures of docs/comparison.md that repeat the MemoryLLM paper on models that have learnt.

    python benchmarks/paper.py --english=DATA --work=DIR          # hours; killed, it goes on with the same line
    python benchmarks/paper.py --work=DIR --stages=show           # redraws the record and the figures

Stages, each of which leaves alone what is finished:
    text      text and tasks of recall_reasoning.py, prepared with the tokenizer of --english, which `prepare` wrote
    train     --variants with --seeds: 6 layers of width 128, trained on 7 parts of English and 3 of this text
    analyze   the commands of `analyze` in PAGES, with all seeds of a model together; WORK/pages/NAME has their pages
    show      the record of their results at --output, and their pictures in --figures
Models that another command trained, such as one run of a protocol for each seed, are named by links WORK/VARIANT-SEED.
"""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import common

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option

STAGES = ("text", "train", "analyze", "show")
_MIXTURE = "english:0.7,tasks/data:0.3"
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


class Page(NamedTuple):
    """A command of `analyze`.

    Attributes:
      name: of the folder of its page, and of its results in the record.
      command: with its options.
      variants: models that it takes, with all of their seeds.
      kept: keys of its results that the record has; (): all.
      pictures: {name of a picture of the page: its path below --figures}.
      is_timing: whether it measures time, of which one seed is enough.
    """

    name: str
    command: tuple[str, ...]
    variants: tuple[str, ...]
    kept: tuple[str, ...] = ()
    pictures: Mapping[str, str] = {}
    is_timing: bool = False


_ALL = ("base", "memory", "flex-3")
_TEXT = ("--data=english", "--max_tokens=131072")
_TASKS = ("--tasks=recall_*,reasoning_*", "--task_path=tasks/tasks")
PAGES = [
    Page(
        "alpha",
        ("alpha", *_TEXT, *_TASKS),
        _ALL,
        pictures={name: f"comparison/alpha-{name}.png" for name in ("perplexity", "recall", "reasoning")},
    ),
    Page(
        "layers",
        ("layers", *_TEXT),
        _ALL,
        pictures={"perplexity": "comparison/layers.png", "cumulative": "comparison/cumulative.png"},
    ),
    Page(
        "pruning",
        ("pruning", *_TEXT, "--calibration=english"),
        _ALL,
        pictures={"perplexity": "comparison/pruning.png"},
    ),
    # Budgets are planned on held-out text, so that the loss is measured on other text.
    Page(
        "compression",
        ("compression", *_TEXT, "--split=train", "--calibration=english"),
        ("memory",),
        pictures={"perplexity": "comparison/compression.png", "singular": "comparison/singular.png"},
    ),
    Page(
        "decode_cost",
        ("decode_cost", "--data=english", "--cache=4MiB"),
        _ALL,
        pictures={"sides": "comparison/cost.png"},
        is_timing=True,
    ),
]
_KEPT = {"coefficients": ("concentration",), "triggers": ("selectivity",), "neighbours": ("shared_with_all",)}
_OF_TEXT = ("triggers", "annotate", "agreement", "active", "residual", "compose", "mutate")  # those with --data
_OF_FFN_M = ("coefficients", "clusters", "clustering", "outliers", "neighbours")
_OF_FFNS = ("triggers", "annotate", "agreement", "active", "values")
_PICTURES = {
    "agreement-base-compute": {"agreement": "look-inside/agreement-base.png"},
    "agreement-memory-memory": {"agreement": "look-inside/agreement-memory.png"},
    "residual-base": {"wins": "look-inside/wins-base.png"},
    "residual-memory": {"wins": "look-inside/wins-memory.png"},
    "mutate-base": {"mean": "look-inside/mutate-base.png"},
    "clusters-memory": {"layer0": "look-inside/clusters-memory.png"},
}


def _analyses(variants: tuple[str, ...]) -> Iterator[Page]:
    """The analyses of each model, with the FFNs that it has."""
    for variant in variants:
        ffns = [ffn for ffn, lacks in (("memory", "base"), ("compute", "memory")) if variant != lacks]
        of_one = [(command, "") for command in ("residual", "compose", "mutate")[: 3 if "compute" in ffns else 2]]
        of_one += [(command, "") for command in _OF_FFN_M if "memory" in ffns]
        for command, ffn in [*of_one, *((command, ffn) for command in _OF_FFNS for ffn in ffns)]:
            name = "-".join(filter(None, (command, variant, ffn)))
            options = ["--data=english"] if command in _OF_TEXT else []
            options += [f"--ffn={ffn}"] if ffn else []
            yield Page(name, (command, *options), (variant,), _KEPT.get(command, ()), _PICTURES.get(name, {}))


def analyze(work: str, pages: Sequence[Page], seeds: int) -> None:
    """Runs the commands whose page is missing, or older than a model. Raises: UserError after all have run."""
    errors = []
    for page in pages:
        numbers = range(1 if page.is_timing else seeds)
        models = [f"{variant}-{seed}" for variant in page.variants for seed in numbers]
        made = os.path.join(work, "pages", page.name, f"{page.command[0]}.json")
        newest = max(os.path.getmtime(f"{work}/{model}/result.json") for model in models)
        if os.path.exists(made) and os.path.getmtime(made) > newest:
            continue
        line = [*page.command, *(f"--workdir={model}" for model in models), f"--output=pages/{page.name}"]
        os.makedirs(f"{work}/pages", exist_ok=True)
        try:
            run(work, f"pages/{page.name}.log", "-m", "memoryllm_jax.analyze", *line)
            print(f"{page.name}: done", flush=True)
        except UserError as error:  # the others are measured all the same
            print(f"error: {error}", flush=True)
            errors.append(error)
    if errors:
        raise errors[0]


def show(work: str, pages: Sequence[Page], output: str, figures: str) -> None:
    """Writes the record of all pages that exist, and copies their pictures."""
    results = {}
    for page in pages:
        folder = os.path.join(work, "pages", page.name)
        path = os.path.join(folder, f"{page.command[0]}.json")
        if not os.path.exists(path):
            print(f"{page.name}: has no page yet")
            continue
        found = json.loads(storage.read_bytes(path, "the results of a page"))
        for tree in ("results", "sd"):
            if page.kept and tree in found:
                found[tree] = {key: found[tree][key] for key in page.kept}
        results[page.name] = _for_record(found, work)
        for name, picture in page.pictures.items():
            target = os.path.join(figures, picture)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            file = f"{page.command[0]}-{name}.png"
            # Pictures that seeds have no mean of, such as t-SNE, are those of the first.
            places = [os.path.join(folder, file), os.path.join(folder, "seed-0", file)]
            shutil.copyfile(next(filter(os.path.exists, places)), target)
    common.write(output, results, {})


def _for_record(tree, work: str):
    """Numbers with six digits, as a record needs no more, and paths relative to the folder of the work."""
    if isinstance(tree, dict):
        return {key: _for_record(value, work) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_for_record(value, work) for value in tree]
    if isinstance(tree, str):
        return tree.replace(f"{os.path.abspath(work)}/", "")
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree


def _rates(texts: tuple[str, ...]) -> dict[str, float]:
    """The option's rates by variant. Raises: ArgumentError."""
    try:
        return {name: float(rate) for name, rate in (text.split("=") for text in texts)}
    except ValueError as error:
        raise ArgumentError("rates", f"expected VARIANT=RATE such as base=2e-3, found {','.join(texts)}") from error


def main(
    work: Annotated[str, Option("folder for text, models and pages")],
    english: Annotated[str, Option("folder of English that `prepare` wrote with a SentencePiece tokenizer")] = "",
    stages: Annotated[tuple[str, ...], Option(f"some of {', '.join(STAGES)}")] = STAGES,
    variants: Annotated[tuple[str, ...], Option("architectures to train")] = _ALL,
    seeds: Annotated[int, Option("runs of each, with seeds from 0 on", least=1)] = 3,
    steps: Annotated[int, Option("of 4,096 tokens", least=1)] = 6000,
    rates: Annotated[tuple[str, ...], Option("VARIANT=RATE, peak learning rates other than 3e-3")] = (),
    jobs: Annotated[int, Option("runs at a time", least=1)] = 2,
    only: Annotated[tuple[str, ...], Option("names of pages; by default all")] = (),
    output: Annotated[str, Option("file for the record", writes=True)] = "benchmarks/results/paper_cpu.json",
    figures: Annotated[str, Option("folder for the pictures")] = "docs",
) -> None:
    if not set(stages) <= set(STAGES):
        raise ArgumentError("stages", f"expected some of {', '.join(STAGES)}, found {', '.join(stages)}")
    pages = [*PAGES, *_analyses(_ALL)]
    names = [page.name for page in pages]
    if not set(only) <= set(names):
        raise ArgumentError("only", f"expected some of {', '.join(names)}, found {', '.join(only)}")
    pages = [page for page in pages if page.name in only or not only]
    os.makedirs(work, exist_ok=True)
    if "text" in stages:
        if not english:
            raise ArgumentError("english", "expected a folder of prepared data for the stage text, found none")
        make_text(work, english)
    if "train" in stages:
        train(work, variants, seeds, steps, _rates(rates), jobs)
    if "analyze" in stages:
        analyze(work, pages, seeds)
    if "show" in stages:
        show(work, pages, output, figures)


if __name__ == "__main__":
    cli.run(main)
