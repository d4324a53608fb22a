"""Compares the scores of exported models by the harness's own Hugging Face adapter with those of checkpoints by ours.

    python benchmarks/agreement.py --workdir=BASE --workdir=MEMORY --task_data=FOLDER --scratch=DIR --output=FILE.json

Runs lambada_local and piqa_local, whole unless --limit is given, in float32, and compares example by example. The
harness's adapter computes FFN-M live; ours does so too and, for memory and flex, also reads a ToL file of 32 bits. Kill
it at any time and run the same line again. Needs the extras `eval` and `hf`, and accelerate for the harness's adapter.
"""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Annotated, NamedTuple

import common
import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.common import cli, records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.evaluation import harness
from memoryllm_jax.hf.export import export_model
from memoryllm_jax.tol import compress, serving

TASKS = ("lambada_local", "piqa_local")
METRICS = ("acc", "acc_norm")


class Scores(NamedTuple):
    """The scores of one example.

    nats: log-likelihood of each continuation.
    greedy: whether greedy decoding gives the continuation, for each.
    metrics: by name, those of METRICS that the task has.
    """

    nats: tuple[float, ...]
    greedy: tuple[bool, ...]
    metrics: dict[str, float]


Samples = dict[tuple[int, str], Scores]  # by number and hash of the document


class Harness:
    """Runs the tasks, and keeps their samples in files: a run whose file exists is not repeated.

    Args:
      task_data: folder with the tasks' files.
      limit: examples of each task; None: all.
    """

    def __init__(self, task_data: str, limit: int | None):
        self._task_data, self._limit = task_data, limit

    def ours(self, path: str, workdir: str, tol: str = "") -> dict[str, Samples]:
        """Samples of each task by our adapter, from the checkpoint in `workdir`; `path` is the file for them."""
        with contextlib.ExitStack() as stack:

            def adapter():
                model = serving.open_engine(workdir, tol, dtype="float32")
                return harness.MemoryLLM(stack.enter_context(contextlib.closing(model)))

            return self._scores(path, adapter)

    def theirs(self, path: str, folder: str) -> dict[str, Samples]:
        """Samples of each task by the harness's adapter, from the exported model in `folder`."""
        how = f"pretrained={folder},trust_remote_code=True,dtype=float32"
        return self._scores(path, lambda: "hf", model_args=how, batch_size=16, device="cpu")

    def served(self, path: str, open_model: Callable[[], LM]) -> dict[str, Samples]:
        """Samples of each task by an adapter that asks a server."""
        return self._scores(path, open_model)

    def _scores(self, path, open_model, **more) -> dict[str, Samples]:
        # The model is opened only if the tasks must run.
        if not os.path.exists(path):
            print(path, flush=True)
            self._run(path, open_model(), **more)
        return {
            task: {(line["doc_id"], line["doc_hash"]): _scores_of(line) for line in lines}
            for task, lines in records.read(dict, path, "scores").items()
        }

    def _run(self, path, model, **more):
        tasks = os.path.join(os.path.dirname(harness.__file__), "tasks")
        metadata = {"task_data": self._task_data}
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(TASKS),
            limit=self._limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_path=tasks, include_defaults=False, metadata=metadata),
            **more,
        )
        keep = ("doc_id", "doc_hash", "filtered_resps", *METRICS)
        samples = {
            task: [{name: sample[name] for name in keep if name in sample} for sample in of_task]
            for task, of_task in found["samples"].items()
        }
        storage.write_json(path, samples)


def _scores_of(line):
    nats, greedy = zip(*line["filtered_resps"])
    return Scores(nats, greedy, {name: line[name] for name in METRICS if name in line})


def compare(ours: Samples, theirs: Samples) -> dict:
    """Compares two sides' samples of one task. Raises: UserError unless both have the same documents.

    Returns: the means of the metrics as [ours, theirs], and how much the scores of single examples differ.
    """
    if ours.keys() != theirs.keys():
        raise UserError(f"expected the same documents of both sides, found {len(ours)} and {len(theirs)}")
    pairs = [(ours[key], theirs[key]) for key in ours]
    metrics = {}
    for name in pairs[0][0].metrics:
        metrics[name] = [sum(scores.metrics[name] for scores in side) / len(pairs) for side in zip(*pairs)]
    nats = [(x, y) for a, b in pairs for x, y in zip(a.nats, b.nats)]
    return {
        "examples": len(pairs),
        **metrics,
        "examples_whose_metrics_differ": sum(a.metrics != b.metrics for a, b in pairs),
        "greedy_flags_that_differ": sum(x != y for a, b in pairs for x, y in zip(a.greedy, b.greedy)),
        "largest_difference_nats": max(abs(x - y) for x, y in nats),
        "largest_difference_relative": max(abs(x / y - 1) for x, y in nats),
    }


def main(
    workdir: Annotated[tuple[str, ...], Option("a model's checkpoints; one of each architecture", many=True)],
    task_data: Annotated[str, Option("folder with lambada.jsonl and piqa.jsonl")],
    scratch: Annotated[str, Option("folder for exported models, ToL files and samples")],
    limit: Annotated[int, Option("examples of each task, for trials; 0: all", least=0)] = 0,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    runs, results = Harness(task_data, limit or None), {}
    for path in workdir:
        name = config_of(path).model.architecture
        if f"{name}, live" in results:
            raise ArgumentError("workdir", f"expected one model of each architecture, found two of {name}")
        folder = os.path.join(scratch, name)
        os.makedirs(folder, exist_ok=True)
        if not os.path.exists(f"{folder}/hf"):
            export_model(path, f"{folder}/hf")
        theirs = runs.theirs(f"{folder}/theirs.json", f"{folder}/hf")
        ways = ["live"] if name == "base" else ["live", "ToL"]
        for way in ways:
            tol = f"{folder}/tol.safetensors" if way == "ToL" else ""
            if tol and not os.path.exists(tol):
                compress.precompute(path, tol, compress.Options(bits="32"))
            ours = runs.ours(f"{folder}/ours_{way}.json", path, tol)
            results[f"{name}, {way}"] = {task: compare(ours[task], theirs[task]) for task in TASKS}
            print(json.dumps({f"{name}, {way}": results[f"{name}, {way}"]}, indent=1), flush=True)
            common.write(output, results, {"pairs": "ours, theirs", "dtype": "float32", "device": "cpu"})


if __name__ == "__main__":
    cli.run(main)
