"""The harness's scores of exported models by its own Hugging Face adapter, against ours of the checkpoints.

    python benchmarks/agreement.py --workdir=BASE --workdir=MEMORY --task_data=FOLDER --scratch=DIR --output=FILE.json

Runs lambada_local and piqa_local, whole unless --limit is given, in float32: theirs with live FFN-M, ours too and, for
memory and flex, from a ToL file of 32 bits. Compares example by example. Kill it at any time and run the same line
again. Needs the extras `eval` and `hf`, and accelerate, which `lm_eval` asks for there.
"""

import contextlib
import json
import os

import common
import lm_eval
from absl import flags
from lm_eval.tasks import TaskManager

from memoryllm_jax.checkpoint import trained
from memoryllm_jax.common import legacy, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.evaluation import harness
from memoryllm_jax.hf.export import export_model
from memoryllm_jax.tol import compress, serving

FLAGS = flags.FLAGS
TASKS = ("lambada_local", "piqa_local")
METRICS = ("acc", "acc_norm")


def scores(path, model, **more):
    """{task: {document: ([log-likelihood], [whether greedy decoding gives it], {metric: value})}}, kept in a file.

    Args:
      model: () -> what the harness takes as a model.
    """
    if not os.path.exists(path):
        print(path, flush=True)
        tasks = os.path.join(os.path.dirname(harness.__file__), "tasks")
        found = lm_eval.simple_evaluate(
            model(),
            tasks=list(TASKS),
            limit=FLAGS.limit or None,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(
                include_path=tasks, include_defaults=False, metadata={"task_data": FLAGS.task_data}
            ),
            **more,
        )
        keep = ("doc_id", "doc_hash", "filtered_resps", *METRICS)
        samples = found["samples"].items()
        storage.write_json(path, {t: [{k: s[k] for k in keep if k in s} for s in of_task] for t, of_task in samples})
    out = {}
    for task, lines in storage.read_json(path, "scores").items():
        for line in lines:
            totals, greedy = zip(*line["filtered_resps"])
            metrics = {name: line[name] for name in METRICS if name in line}
            out.setdefault(task, {})[line["doc_id"], line["doc_hash"]] = totals, greedy, metrics
    return out


def ours(path, workdir, tol=""):
    with contextlib.ExitStack() as at_exit:

        def adapter():
            model = at_exit.enter_context(contextlib.closing(serving.open_engine(workdir, tol, dtype="float32")))
            return harness.MemoryLLM(model)

        return scores(path, adapter)


def theirs(path, folder):
    how = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    return scores(path, lambda: "hf", model_args=how, batch_size=16, device="cpu")


def compare(ours, theirs):
    """What differs between two sides' samples, which must be of the same documents."""
    if ours.keys() != theirs.keys():
        raise UserError(f"expected the same documents of both sides, found {len(ours)} and {len(theirs)}")
    pairs = [(ours[key], theirs[key]) for key in ours]
    names = list(pairs[0][0][2])
    return {
        "examples": len(pairs),
        **{name: [sum(side[2][name] for side in sides) / len(pairs) for sides in zip(*pairs)] for name in names},
        "examples_whose_metrics_differ": sum(a[2] != b[2] for a, b in pairs),
        "greedy_flags_that_differ": sum(x != y for a, b in pairs for x, y in zip(a[1], b[1])),
        "largest_difference_nats": max(abs(x - y) for a, b in pairs for x, y in zip(a[0], b[0])),
        "largest_difference_relative": max(abs(x / y - 1) for a, b in pairs for x, y in zip(a[0], b[0])),
    }


def main():
    results = {}
    for workdir in FLAGS.workdir:
        name = trained.config_of(workdir).model.architecture
        if f"{name}, live" in results:
            raise UserError(f"--workdir={workdir}: expected one model of each architecture, found two of {name}")
        folder = os.path.join(FLAGS.scratch, name)
        os.makedirs(folder, exist_ok=True)
        if not os.path.exists(f"{folder}/hf"):
            export_model(workdir, f"{folder}/hf")
        other = theirs(f"{folder}/theirs.json", f"{folder}/hf")
        for way in ("live",) if name == "base" else ("live", "ToL"):
            tol = f"{folder}/tol.safetensors" if way == "ToL" else ""
            if tol and not os.path.exists(tol):
                compress.precompute(workdir, tol, compress.Options(bits="32"))
            own = ours(f"{folder}/ours_{way}.json", workdir, tol)
            results[f"{name}, {way}"] = {task: compare(own[task], other[task]) for task in TASKS}
            print(json.dumps({f"{name}, {way}": results[f"{name}, {way}"]}, indent=1), flush=True)
            common.write(FLAGS.output, results, {"pairs": "ours, theirs", "dtype": "float32", "device": "cpu"})
    return 0


if __name__ == "__main__":
    flags.DEFINE_multi_string("workdir", None, "a model's checkpoints; one of each architecture", required=True)
    flags.DEFINE_string("task_data", None, "folder with lambada.jsonl and piqa.jsonl", required=True)
    flags.DEFINE_string("scratch", None, "folder for exported models, ToL files and samples", required=True)
    flags.DEFINE_integer("limit", 0, "examples of each task, for trials; 0: all")
    flags.DEFINE_string("output", "", "JSON file for the result")
    legacy.run(main)
