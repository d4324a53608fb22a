"""Measures a trained model: perplexity on text, or scores on tasks of EleutherAI's harness (lm_eval).

    python -m memoryllm_jax.evaluate --workdir=DIR --data=DATA --output=FILE.json --page=FOLDER
    python -m memoryllm_jax.evaluate --workdir=DIR --tol=tol.safetensors --data='books/*.txt'
    python -m memoryllm_jax.evaluate --workdir=DIR --tasks=hellaswag,piqa --output=FILE.json
    python -m memoryllm_jax.evaluate --workdir=DIR --tasks=lambada_local,piqa_local --task_data=FOLDER

--output is for machines; --page=FOLDER gets evaluate.html for people, with evaluate.json, CSV and PNG files beside it.
The work is spread over all devices of this machine. --data is prepared data (folders or URLs), or text files (.json,
.jsonl, .txt, each also .gz or .zst, or .parquet); without it and --tasks, it is the data that the model was trained on.
Text files become one stream of tokens, as in `prepare`: all documents in order, each between bos and eos. The stream is
cut into windows of the model's context, as in training, and every token but the first is predicted once, from the
tokens before it in its window. With --stride=S below the context T, windows start every S tokens, and all windows but
the first score their last S tokens only, so that each token is predicted from at least T-S tokens. If the model was
trained with config.data.document_mask, each document of a window is scored alone; --document_mask and --nodocument_mask
choose.
"""

import contextlib
import dataclasses
import multiprocessing
from typing import Annotated

from memoryllm_jax import config
from memoryllm_jax.common import cli, plots, report
from memoryllm_jax.common.options import Option
from memoryllm_jax.evaluation import record
from memoryllm_jax.evaluation.record import LoggedTasks, WindowedText
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.model import sharding
from memoryllm_jax.tol.serving import EngineOptions


def main(
    engine: EngineOptions,
    text: WindowedText,
    tasks: LoggedTasks,
    output: Annotated[str, Option("JSON file for the result; for tasks in the harness's format", writes=True)] = "",
    page: Annotated[str, Option("folder for evaluate.html, evaluate.json, and CSV and PNG files")] = "",
) -> None:
    text = record.text_or_own(text, tasks, engine.workdir, engine.step)
    if page:
        plots.check_available()
    if text.data:
        text.check_data()
    opened_tasks = tasks.open() if tasks.tasks else None
    # The harness starts processes for some metrics. A fork would copy JAX's locks but not the threads that hold them.
    multiprocessing.set_start_method("forkserver")
    mesh = sharding.make_mesh(config.MeshConfig(data=-1, fsdp=1, tensor=1))
    with contextlib.closing(engine.open(mesh)) as model, contextlib.ExitStack() as stack:
        about = _about(engine, model)
        opened_page = None
        if page:
            title = f"{model.config.architecture} on {text.data or ', '.join(tasks.tasks)}"
            facts = _facts(engine, model) | text.facts() | tasks.facts()
            opened_page = stack.enter_context(report.Report(page, "evaluate", title, facts))
        if text.data:
            record.on_text(model, about, text, output, opened_page)
        else:
            record.on_tasks(model, about, opened_tasks, tasks, output, opened_page)


def _about(engine: EngineOptions, model: Engine) -> dict:
    """Describes the model for the JSON file."""
    trained = model.trained
    about = {"path": trained.workdir, "step": trained.step, "architecture": trained.config.architecture}
    about["dtype"] = trained.config.dtype
    if engine.tol:
        about["tol"] = engine.tol
    if engine.tol or engine.overlay:
        about["overlay"] = engine.overlay
    return about | _contribution(engine)


def _facts(engine: EngineOptions, model: Engine) -> dict[str, str]:
    """Describes the model for the caption of the page."""
    facts = model.trained.facts()
    if engine.tol:
        facts["rows"] = f"{engine.tol}, on {engine.rows or 'disk'}"
    if engine.overlay:
        facts["edits of the rows"] = engine.overlay
    for name, value in _contribution(engine).items():
        facts[name.replace("_", " ")] = ", ".join(value) if isinstance(value, tuple) else f"{value}"
    return facts


def _contribution(engine: EngineOptions) -> dict:
    """The options of `Contribution` that differ from their defaults: how much the FFNs contribute."""
    changed = {}
    for field in dataclasses.fields(Contribution):
        value = getattr(engine, field.name)
        if value != field.default:
            changed[field.name] = value
    return changed


if __name__ == "__main__":
    cli.run(main)
