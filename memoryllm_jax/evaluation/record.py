"""The work of `evaluate`: measures a model, prints the result, and writes it as JSON and as a page."""

import contextlib
import dataclasses
from typing import Annotated

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import report, storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.evaluation import page as pages
from memoryllm_jax.evaluation.measure import TaskOptions, TextOptions, refuse_unused
from memoryllm_jax.evaluation.perplexity import Windows, first_id, perplexity, summary
from memoryllm_jax.inference.engine import Engine


@dataclasses.dataclass(frozen=True)
class WindowedText(TextOptions):
    """The text that `evaluate` scores, and how it is cut into windows. Raises: ArgumentError."""

    stride: Annotated[
        int | None, Option("tokens between the starts of windows; by default the model's context", least=1)
    ] = None
    save_tokens: Annotated[
        str,
        Option(
            ".npy file for the scored [windows, context + 1] ids; a last window that is not full is left out",
            writes=True,
        ),
    ] = ""

    document_mask: Annotated[
        bool | None,
        Option("score each document of a window alone; by default as config.data.document_mask of the model's run"),
    ] = None

    def _check_data(self) -> None:
        """Allows the other options without `data`: `text_or_own` names the data then."""

    def windows(self, context: int, first: int | None = None) -> Windows:
        """The windows for a model's context.

        Args:
          first: `first_id` of the windows.
        Raises: ArgumentError for a stride above the context, which would skip tokens.
        """
        stride = context if self.stride is None else self.stride
        if stride > context:
            raise ArgumentError("stride", f"expected 1 to {context}, the model's context, found {stride}")
        # Saved tokens are one rectangular array, which has no place for a shorter last window.
        return Windows(context, stride, self.max_tokens, whole=bool(self.save_tokens), first_id=first)

    def windows_for(self, model: Engine) -> Windows:
        """The windows for a model, with its documents apart if it was trained so. Raises: ArgumentError."""
        return self.windows(model.context, first_id(model, self.document_mask))


@dataclasses.dataclass(frozen=True)
class LoggedTasks(TaskOptions):
    """The tasks that `evaluate` runs, and whether it writes their samples. Raises: ArgumentError."""

    log_samples: Annotated[
        bool, Option("write each document's result beside --output, in files of the harness's format")
    ] = False


def text_or_own(text: WindowedText, tasks: LoggedTasks, workdir: str, step: int | None) -> WindowedText:
    """The text to score: if neither text nor tasks are named, the data that the model was trained on.

    Args:
      workdir, step: the model's checkpoint; None: the newest.
    Raises: UserError if both are named, or options of a text that is not.
    """
    if tasks.tasks:
        if text.data:
            raise UserError("expected --data=TEXT or --tasks=NAMES, found both")
        refuse_unused(text, "data")
    if text.data or tasks.tasks:
        return text
    with contextlib.closing(TrainedModel(workdir, step)) as trained:
        return dataclasses.replace(text, data=run_data.own_path(trained))


def on_text(
    model: Engine, about: dict, chosen: WindowedText, output: str = "", page: report.Report | None = None
) -> dict:
    """Measures perplexity on a text.

    Args:
      about: the description of the model that goes into the record.
      output: path of a JSON file for the record, or "" for none.
      page: a page to fill and write, or None.
    Returns: the record. Raises: UserError.
    """
    windows = chosen.windows_for(model)
    text = chosen.open(model.tokenizer, windows, model.trained.workdir)
    result = perplexity(model, text, windows, chosen.save_tokens)
    print(summary(result), flush=True)
    result |= chosen.source() | {"model": about, "rows": model.rows.stats()}
    # Before the page, so that no error in drawing loses the numbers.
    if output:
        storage.write_json(output, result)
    if page:
        pages.of_text(page, model, text, windows, result)
        print(page.write(result))
    return result


def on_tasks(
    model: Engine, about: dict, tasks, chosen: LoggedTasks, output: str = "", page: report.Report | None = None
) -> dict:
    """Scores the model on tasks.

    Args:
      tasks: the result of `chosen.open()`, which callers open before they load the model, so that it can refuse early.
      about, output, page: as for `on_text`, but the JSON file has the harness's format.
    Returns: the harness's results. Raises: UserError.
    """
    results = tasks.run(model, about, chosen.num_fewshot, chosen.limit, output, chosen.log_samples)
    print(tasks.table(results), flush=True)
    if page:
        pages.of_tasks(page, results)
        # The scores alone: the file at `output` has the rest, such as the tasks' whole configurations.
        print(page.write({name: results[name] for name in ("results", "n-shot", "n-samples")}))
    return results
