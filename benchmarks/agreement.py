"""The harness's scores of exported models by its own Hugging Face adapter, against ours of the checkpoints.

    python benchmarks/agreement.py --workdir=BASE --workdir=MEMORY --task_data=FOLDER --scratch=DIR --output=FILE.json

Runs lambada_local and piqa_local, whole unless --limit is given, in float32: theirs with live FFN-M, ours too and, for
memory and flex, from a ToL file of 32 bits. Compares example by example. Kill it at any time and run the same line
again. Needs the extras `eval` and `hf`.
"""

import glob
import json
import os
import shutil
import subprocess
import sys

import common
from absl import flags

from memoryllm_jax import cli, saved
from memoryllm_jax.cli import UserError

FLAGS = flags.FLAGS
HERE = os.path.dirname(os.path.abspath(__file__))
TASKS = ("lambada_local", "piqa_local")
METRICS = ("acc", "acc_norm")


def run(output, module, *arguments):
    """Runs a command, unless its output is there."""
    if not os.path.exists(output):
        print(output, flush=True)
        if subprocess.run([sys.executable, "-m", module, *arguments]).returncode:
            raise UserError(f"{output}: {module} failed")


def ours(folder, workdir, tol):
    """Folder with the harness's samples of our adapter."""
    os.makedirs(folder, exist_ok=True)
    how = [f"--tasks={','.join(TASKS)}", f"--task_data={FLAGS.task_data}", "--log_samples", f"--limit={FLAGS.limit}"]
    how += [f"--output={folder}/results.json", "--dtype=float32", *([f"--tol={tol}"] if tol else [])]
    run(f"{folder}/results.json", "memoryllm_jax.evaluate", f"--workdir={workdir}", *how)
    return folder


def theirs(folder, model):
    """Folder with the harness's samples of its own adapter."""
    given = f"pretrained={model},trust_remote_code=True,dtype=float32"
    how = ["--include_path", f"{HERE}/../memoryllm_jax/tasks", "--metadata", json.dumps({"task_data": FLAGS.task_data})]
    how += ["--tasks", ",".join(TASKS), "--batch_size", "16", "--device", "cpu", "--log_samples"]
    shutil.rmtree(f"{folder}.part", ignore_errors=True)
    how += ["--output_path", f"{folder}.part", *(["--limit", str(FLAGS.limit)] if FLAGS.limit else [])]
    run(folder, "lm_eval", "--model", "hf", "--model_args", given, *how)
    if os.path.exists(f"{folder}.part"):
        os.rename(f"{folder}.part", folder)
    return folder


def samples(folder, task):
    """{document: ([log-likelihood], [whether greedy decoding gives it], {metric: value})}."""
    (path,) = glob.glob(f"{folder}/**/samples_{task}_*.jsonl", recursive=True)
    found = {}
    with open(path) as file:
        for line in map(json.loads, file):
            scores, greedy = zip(*line["filtered_resps"])
            metrics = {name: line[name] for name in METRICS if name in line}
            found[line["doc_id"], line["doc_hash"]] = [float(s) for s in scores], [str(g) for g in greedy], metrics
    return found


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
        name = saved.config_of(workdir).model.architecture
        if f"{name}, live" in results:
            raise UserError(f"--workdir={workdir}: expected one model of each architecture, found two of {name}")
        folder = os.path.join(os.path.abspath(FLAGS.scratch), name)
        os.makedirs(folder, exist_ok=True)
        hf, tol = f"{folder}/hf", f"{folder}/tol.safetensors"
        run(hf, "memoryllm_jax.export", f"--workdir={workdir}", f"--output={hf}")
        ways = {"live": ""}
        if name != "base":
            run(tol, "memoryllm_jax.precompute", f"--workdir={workdir}", f"--output={tol}", "--bits=32")
            ways["ToL"] = tol
        for way, tol in ways.items():
            sides = ours(f"{folder}/ours_{way}", workdir, tol), theirs(f"{folder}/theirs", hf)
            results[f"{name}, {way}"] = {task: compare(*(samples(side, task) for side in sides)) for task in TASKS}
            print(json.dumps({f"{name}, {way}": results[f"{name}, {way}"]}, indent=1), flush=True)
            common.write(FLAGS.output, results, {"pairs": "ours, theirs", "dtype": "float32", "device": "cpu"})
    return 0


if __name__ == "__main__":
    flags.DEFINE_multi_string("workdir", None, "a model's checkpoints; one of each architecture", required=True)
    flags.DEFINE_string("task_data", None, "folder with lambada.jsonl and piqa.jsonl", required=True)
    flags.DEFINE_string("scratch", None, "folder for exported models, ToL files and samples", required=True)
    flags.DEFINE_integer("limit", 0, "examples of each task, for trials; 0: all")
    flags.DEFINE_string("output", "", "JSON file for the result")
    cli.run(main)
