"""Measures a trained model: perplexity on text, or scores on tasks of EleutherAI's harness (lm_eval).

    python -m memoryllm_jax.evaluate --workdir=DIR --data=DATA --output=FILE.json --page=FOLDER
    python -m memoryllm_jax.evaluate --workdir=DIR --tol=tol.safetensors --data='books/*.txt'
    python -m memoryllm_jax.evaluate --workdir=DIR --tasks=hellaswag,piqa --output=FILE.json
    python -m memoryllm_jax.evaluate --workdir=DIR --tasks=lambada_local,piqa_local --task_data=FOLDER

--output is for machines; --page=FOLDER gets evaluate.html for people, with evaluate.json, CSV and PNG files beside it.
All devices of this machine share the work. --data is prepared data (folder or URL), or text files (.json, .jsonl, .txt,
each also .gz or .zst, or .parquet), whose documents are put between bos and eos, one after another, as `prepare` does.
The tokens are one stream. It is cut into windows of the model's context, as in training, and every token but the
stream's first is predicted once, from what is before it in its window. With --stride=S below the context T, windows
start every S tokens, and all but the first score only what the one before did not: their last S tokens, each predicted
from T-S tokens or more.
"""

import contextlib
import multiprocessing
import os

from absl import flags

from memoryllm_jax import config
from memoryllm_jax.common import legacy, options, report, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset, documents
from memoryllm_jax.evaluation import measure
from memoryllm_jax.evaluation.measure import harness_module
from memoryllm_jax.evaluation.page import of_tasks, of_text
from memoryllm_jax.evaluation.perplexity import Windows, perplexity, quality_text, text_of
from memoryllm_jax.model import sharding
from memoryllm_jax.tol import serving

_FOR_DATA = ("split", "text_key", "stride", "max_tokens", "save_tokens")
_CHANGES = ("alpha", "alpha_compute", "drop_layers", "drop_compute")
_FOR_TASKS = ("num_fewshot", "limit", "task_path", "task_data", "log_samples")


def _on_data(model, page):
    f = flags.FLAGS
    context = model.context
    stride = context if f.stride is None else f.stride
    if not 1 <= stride <= context:
        raise UserError(f"--stride: expected 1 to {context}, the model's context, found {stride}")
    windows = Windows(context, stride, f.max_tokens, whole=bool(f.save_tokens))
    text = text_of(f.data, f.split, f.text_key, model.tokenizer, windows)
    result = perplexity(model, text, windows, f.save_tokens)
    print(quality_text(result), flush=True)
    where = {"data": f.data} | ({} if documents.is_text(f.data) else {"split": f.split})
    result |= where | {"model": _about(model), "rows": model.rows.stats()}
    if f.output:
        storage.write_json(f.output, result)
    if page:
        of_text(page, model, text, result)
        print(page.write(result))


def _on_tasks(model, tasks, page):
    f = flags.FLAGS
    results = tasks.run(model, _about(model), f.num_fewshot, f.limit, f.output, f.log_samples)
    print(tasks.table(results), flush=True)
    if page:
        of_tasks(page, results)
        print(page.write({name: results[name] for name in ("results", "n-shot", "n-samples")}))


def _about(model) -> dict:
    f, trained = flags.FLAGS, model.trained
    about = {"path": trained.workdir, "step": trained.step, "architecture": trained.config.architecture}
    about |= {"dtype": trained.config.dtype} | ({"tol": f.tol, "overlay": f.overlay} if f.tol else {})
    return about | {name: f[name].value for name in _CHANGES if f[name].present}


def _open_page(model):
    """The page that --page asks for, or a context without one."""
    f = flags.FLAGS
    if not f.page:
        return contextlib.nullcontext()
    facts = model.trained.facts() | ({"rows": f"{f.tol}, on {f.rows}"} if f.tol else {})
    facts |= {name.replace("_", " "): f"{f[name].value}" for name in _CHANGES if f[name].present}
    facts |= measure.quality_facts(f.data, f.split, f.max_tokens, f.tasks, f.num_fewshot, f.limit)
    return report.Report(f.page, "evaluate", f"{model.config.architecture} on {f.data or ', '.join(f.tasks)}", facts)


def _check(f):
    """Refuses flags that do not go together, before anything is loaded. Raises: UserError."""
    if bool(f.data) == bool(f.tasks):
        raise UserError(f"expected --data=TEXT or --tasks=NAMES, found {'both' if f.data else 'neither'}")
    for name in _FOR_TASKS if f.data else _FOR_DATA:
        if f[name].present:
            raise UserError(f"--{name}: expected {'--tasks' if f.data else '--data'} too, which it is about")
    if f.data and f["split"].present and documents.is_text(f.data):
        raise UserError(f"--split: expected prepared data, found text: --data={f.data}")
    if f.data:
        (documents.expand if documents.is_text(f.data) else dataset.Dataset)(f.data)
    for name in ("output", "save_tokens"):
        path = f[name].value
        if path and not storage.is_url(path) and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UserError(f"--{name}={path}: expected a file in a folder that is there, found no such folder")


def main():
    f = flags.FLAGS
    _check(f)
    harness = harness_module() if f.tasks else None
    mesh = sharding.make_mesh(config.MeshConfig(data=-1, fsdp=1, tensor=1))
    tasks = harness.Tasks(f.tasks, f.task_path, f.task_data) if harness else None
    multiprocessing.set_start_method("forkserver")  # the harness has processes for some metrics, and JAX has threads
    with (
        contextlib.closing(serving.EngineOptions(**options.values(serving.EngineOptions)).open(mesh)) as model,
        _open_page(model) as page,
    ):
        if f.data:
            _on_data(model, page)
        else:
            _on_tasks(model, tasks, page)
    return 0


if __name__ == "__main__":
    options.define(serving.EngineOptions)
    legacy.define_quality_flags()
    flags.DEFINE_string("text_key", "text", "JSON field or parquet column that holds the text")
    flags.DEFINE_integer("stride", None, "tokens between the starts of windows; by default the model's context")
    flags.DEFINE_string(
        "save_tokens",
        "",
        ".npy file for the scored [windows, context + 1] ids; a last window that is not full is left out",
    )
    flags.DEFINE_bool("log_samples", False, "write each document's result beside --output, as the harness does")
    flags.DEFINE_string("output", "", "JSON file for the result; of tasks, in the harness's format")
    flags.DEFINE_string("page", "", "folder for evaluate.html, evaluate.json, and CSV and PNG files")
    legacy.run(main)
