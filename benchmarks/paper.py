"""The MemoryLLM paper's analyses on models that have learnt something: record and figures of docs/experiments.md.

    python benchmarks/paper.py --work=DIR --english=TEXTS --stages=text
    python -m memoryllm_jax.compare --protocol=configs/protocols/paper.py --workdir=DIR --texts=DIR/texts --jobs=2
    python benchmarks/paper.py --work=DIR --stages=analyze,show

Stages, each of which leaves alone what is finished:
    text      DIR/texts: a fifth English, from the files train-* and validation-* in TEXTS, the rest the text of
              recall_reasoning.py, whose questions are in DIR/exercises/tasks
    analyze   the commands of `analyze` in PAGES on the models of the protocol, with all seeds of a model together;
              DIR/pages/NAME has their pages
    show      the record of their results at --output, and their pictures in --figures
Each can be killed, and goes on with the same line.
"""

import collections
import glob
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import common
from facts_text import write_lines

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.experiments import outcomes
from memoryllm_jax.experiments import protocol as protocol_lib

PROTOCOL = "configs/protocols/paper.py"
STAGES = ("text", "analyze", "show")
_HELD_OUT = 20  # the training text has so many times as much English as the held-out text
_PIECE = 20_000  # most characters of an English document, so that no text is half a book


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


def make_text(work: str, english: str, characters: int) -> None:
    """Writes DIR/texts and DIR/exercises/tasks.

    Args:
      english: folder with train-*.json.gz and validation-*.json.gz, each with one {"text": ...} a line.
      characters: of the training text; a fifth of them are English.
    Raises: UserError.
    """
    texts = os.path.join(work, "texts")
    if os.path.exists(texts):
        return
    of_english = characters // 5
    pieces = _pieces(english, "train", of_english)
    held_out = _pieces(english, "validation", of_english // _HELD_OUT)
    options = ("--output=exercises", f"--characters={characters - of_english}")
    run(work, "text.log", f"{common.ROOT}/benchmarks/recall_reasoning.py", *options)
    part = f"{texts}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(os.path.join(work, "exercises", "text"), part)
    write_lines(os.path.join(part, "train-english.json.gz"), pieces)
    path = os.path.join(part, "validation-0.json.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        held_out += [json.loads(line)["text"] for line in file]
    # Analyses read the first tokens of the held-out text, so that its kinds must be mixed.
    random.Random(0).shuffle(held_out)
    write_lines(path, held_out)
    os.replace(part, texts)


def _pieces(folder: str, split: str, characters: int) -> list[str]:
    """Pieces of the documents of a split, of `characters` in all if it has as many. Raises: ArgumentError."""
    paths = sorted(glob.glob(os.path.join(folder, f"{split}-*.json.gz")))
    if not paths:
        raise ArgumentError("english", f"expected a folder with {split}-*.json.gz, found none in {folder!r}")
    pieces: list[str] = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                pieces += [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
    random.Random(0).shuffle(pieces)
    size = 0
    for number, piece in enumerate(pieces):
        size += len(piece)
        if size >= characters:
            return pieces[: number + 1]
    return pieces


class Page(NamedTuple):
    """A command of `analyze`.

    Attributes:
      name: of the folder of its page, and of its results in the record.
      command: with its options.
      variants: models that it takes, with all of their seeds.
      kept: keys of its results that the record has; (): all.
      pictures: {name of a picture of the page: its path below --figures}.
      by_seed: keys of its results that the record has for each seed too, for differences in pairs.
      is_timing: whether it measures time, of which one seed is enough.
    """

    name: str
    command: tuple[str, ...]
    variants: tuple[str, ...]
    kept: tuple[str, ...] = ()
    pictures: Mapping[str, str] = {}
    by_seed: tuple[str, ...] = ()
    is_timing: bool = False


_ALL = ("base", "memory", "flex-3")
_TEXT = ("--data=data/1024", "--max_tokens=65536")
_TASKS = ("--tasks=recall_*,reasoning_*", "--task_path=exercises/tasks", "--limit=120")
PAGES = [
    Page(
        "alpha",
        ("alpha", "--alphas=0.9,0.7,0.5", *_TEXT, *_TASKS),
        _ALL,
        by_seed=("changes", "points"),
        pictures={
            name: f"experiments/alpha-{name}.png" for name in ("perplexity", "recall-points", "reasoning-points")
        },
    ),
    Page(
        "layers",
        ("layers", *_TEXT),
        _ALL,
        pictures={"perplexity": "experiments/layers.png", "cumulative": "experiments/cumulative.png"},
    ),
    Page(
        "pruning",
        ("pruning", *_TEXT, "--calibration=data/1024"),
        _ALL,
        pictures={"perplexity": "experiments/pruning.png"},
        by_seed=("points",),
    ),
    # Budgets are planned on held-out text, so that the loss is measured on other text.
    Page(
        "compression",
        ("compression", *_TEXT, "--split=train", "--calibration=data/1024"),
        ("memory",),
        pictures={"perplexity": "experiments/compression.png", "singular": "experiments/singular.png"},
    ),
    Page(
        "decode_cost",
        ("decode_cost", "--data=data/1024", "--cache=4MiB"),
        _ALL,
        is_timing=True,
    ),
]
_KEPT = {  # numbers, and not the keys that they are of
    "agreement": ("layers",),
    "coefficients": ("concentration",),
    "neighbours": ("shared_with_all",),
    "triggers": ("selectivity",),
    "values": ("max_probability",),
}
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
            options = ["--data=data/1024"] if command in _OF_TEXT else []
            options += [f"--ffn={ffn}"] if ffn else []
            yield Page(name, (command, *options), (variant,), _KEPT.get(command, ()), _PICTURES.get(name, {}))


def link_models(work: str) -> list[int]:
    """Names the finished models of the protocol DIR/VARIANT-SEED. Returns: the seeds of which all models are finished.

    Raises: UserError if there are none.
    """
    protocol = protocol_lib.load(PROTOCOL)
    runs = outcomes.finished(protocol, work)
    for run in runs:
        link = os.path.join(work, f"{run.variant}-{run.seed}")
        if not os.path.lexists(link):
            os.symlink(os.path.relpath(run.folder(work), work), link)
    found = collections.Counter(run.seed for run in runs)
    complete = [seed for seed, count in found.items() if count == len(_ALL)]
    if not complete:
        raise ArgumentError("work", f"expected models that compare trained by {PROTOCOL}, found none in {work}")
    return sorted(complete)


def analyze(work: str, pages: Sequence[Page], seeds: Sequence[int]) -> None:
    """Runs the commands whose page is missing, or older than a model. Raises: UserError after all have run."""
    errors = []
    for page in pages:
        models = [f"{variant}-{seed}" for variant in page.variants for seed in seeds[: 1 if page.is_timing else None]]
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
    """Writes the record of the models and of all pages that exist, and copies the pages' pictures."""
    results: dict[str, dict] = {"models": _models(work)}
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
        if page.by_seed:
            found["by_seed"] = _by_seed(folder, page)
        results[page.name] = _for_record(found, work)
        for name, picture in page.pictures.items():
            target = os.path.join(figures, picture)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            file = f"{page.command[0]}-{name}.png"
            # Pictures that seeds have no mean of, such as t-SNE, are those of the first.
            places = [os.path.join(folder, file), os.path.join(folder, "seed-0", file)]
            shutil.copyfile(next(filter(os.path.exists, places)), target)
    common.write(output, results, {})


def _by_seed(folder: str, page: Page) -> dict[str, dict]:
    """{"seed-NUMBER": the results of this seed that the record has}."""
    found = {}
    for path in sorted(glob.glob(f"{glob.escape(folder)}/seed-*/{page.command[0]}.json")):
        of_seed = json.loads(storage.read_bytes(path, "the results of a seed"))["results"]
        found[os.path.basename(os.path.dirname(path))] = {key: of_seed[key] for key in page.by_seed}
    return found


def _models(work: str) -> dict[str, dict]:
    """How each model of the protocol was trained: {name: tokens, seed, peak rate and held-out loss}."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(work), "*-[0-9]*", outcomes.DESCRIPTION))):
        run, folder = json.loads(storage.read_bytes(path, "the description of a run")), os.path.dirname(path)
        shown = {name: run[name] for name in ("tokens", "seed", "rate")}
        found[os.path.basename(folder)] = shown | {"loss": common.result(folder)["validation"]["loss"]}
    return found


def _for_record(tree, work: str):
    """Numbers with six digits, as a record needs no more, and paths relative to the folder of the work."""
    if isinstance(tree, dict):
        return {key: _for_record(value, work) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_for_record(value, work) for value in tree]
    if isinstance(tree, str):
        return tree.replace(f"{os.path.abspath(work)}/", "")
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree


def main(
    work: Annotated[str, Option("folder for text, models and pages")],
    english: Annotated[str, Option("for the stage text: folder with files train-* and validation-* of English")] = "",
    characters: Annotated[int, Option("of the training text", least=1)] = 20_000_000,
    stages: Annotated[tuple[str, ...], Option(f"some of {', '.join(STAGES)}")] = STAGES,
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
        make_text(work, english, characters)
    if "analyze" in stages:
        analyze(work, pages, link_models(work))
    if "show" in stages:
        show(work, pages, output, figures)


if __name__ == "__main__":
    cli.run(main)
