"""Measures of a model's quality: perplexity on a text, and scores on tasks of EleutherAI's harness (lm_eval)."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Annotated

import numpy as np

from memoryllm_jax.common import errors, options
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import dataset, documents
from memoryllm_jax.data.dataset import Split
from memoryllm_jax.evaluation import perplexity
from memoryllm_jax.evaluation.perplexity import ScoredWindow, Text, Windows
from memoryllm_jax.evaluation.scores import Score
from memoryllm_jax.inference.engine import Engine

PERPLEXITY = "perplexity"


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """The text that a model's loss is measured on; no text if `data` is empty. Raises: ArgumentError."""

    data: Annotated[str, Option("prepared data (folder or URL) or text files (globs, comma-separated)")] = ""
    split: Split = "validation"
    text_key: Annotated[str, Option("JSON field or parquet column that holds the text")] = "text"
    max_tokens: Annotated[int, Option("predict at most this many tokens, from the start; 0: all", least=0)] = 0

    def __post_init__(self):
        options.check(self)
        self._check_data()
        if self.split == "train" and documents.is_text(self.data):
            raise ArgumentError("split", f"expected prepared data, which has splits, found text files: {self.data}")

    def _check_data(self) -> None:
        refuse_unused(self, "data")

    def check_data(self) -> None:
        """Finds missing data before time is spent on loading a model. Raises: UserError."""
        if documents.is_text(self.data):
            documents.expand(self.data)
        else:
            dataset.Dataset(self.data)

    def open(self, tokenizer, windows: Windows, workdir: str = "") -> Text:
        """Opens the text as ids of this tokenizer.

        Args:
          workdir: remembers which file shards of prepared data are verified; "": nothing does.
        Raises: UserError if the text is missing, damaged or too short.
        """
        if documents.is_text(self.data):
            return perplexity.raw_text(self.data, self.text_key, tokenizer, windows)
        return perplexity.prepared_text(self.data, self.split, tokenizer, windows, workdir)

    def source(self) -> dict[str, str]:
        """The fields of a record that say which text was scored: data and, for prepared data, split."""
        split = {} if documents.is_text(self.data) else {"split": self.split}
        return {"data": self.data} | split

    def facts(self) -> dict[str, str]:
        """Facts for the caption of a page."""
        if not self.data:
            return {}
        text = ", ".join(self.source().values())
        if self.max_tokens:
            text += f", the first {self.max_tokens:,} tokens"
        return {"text": text}


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """The tasks that a model is scored on, and how; no tasks if `tasks` is empty. Raises: ArgumentError."""

    tasks: Annotated[
        tuple[str, ...], Option("names of the harness's tasks, groups or tags, or of tasks in --task_path; may have *")
    ] = ()
    num_fewshot: Annotated[int | None, Option("examples in a prompt; by default as the task says", least=0)] = None
    limit: Annotated[
        float, Option("documents of each task, or if below 1 a share of them, for trials; 0: all", least=0)
    ] = 0.0
    task_path: Annotated[str, Option("folder with task files (.yaml) of your own")] = ""
    task_data: Annotated[str, Option("folder with lambada.jsonl and piqa.jsonl, for lambada_local and piqa_local")] = ""

    def __post_init__(self):
        options.check(self)
        refuse_unused(self, "tasks")

    def open(self):
        """Finds the tasks, as `harness.Tasks`. Raises: UserError, also if the harness is not installed."""
        errors.require("lm_eval", "eval", "tasks")
        from memoryllm_jax.evaluation import harness  # not at the top of the file, as it needs the optional lm_eval

        return harness.Tasks(self.tasks, self.task_path, self.task_data)

    def facts(self) -> dict[str, str]:
        """Facts for the caption of a page."""
        if not self.tasks:
            return {}
        text = ", ".join(self.tasks)
        if self.limit:
            text += f", {self.limit:g} documents each" if self.limit >= 1 else f", {self.limit:.0%} of the documents"
        if self.num_fewshot is not None:
            text += f", {self.num_fewshot} examples in a prompt"
        return {"tasks": text}


def refuse_unused(chosen, needed: str) -> None:
    """Raises: ArgumentError if the option `needed` is empty, but another one is set, which has no effect then."""
    if getattr(chosen, needed):
        return
    # Compared with the defaults, because a command line passes on the options that nobody set as well.
    for field in dataclasses.fields(chosen):
        if getattr(chosen, field.name) != field.default:
            raise ArgumentError(field.name, f"expected {needed} too, without which it has no effect")


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measures engines on a text, on tasks, or on both."""

    text: TextOptions = TextOptions()
    tasks: TaskOptions = TaskOptions()

    def facts(self) -> dict[str, str]:
        """Facts for the caption of a page."""
        return self.text.facts() | self.tasks.facts()

    def __call__(self, model: Engine) -> dict[str, Score]:
        """Measures a model.

        Returns: {"perplexity": of the text's tokens, "TASK": accuracy, "TASK METRIC": where a task has no accuracy}.
        """
        found = {}
        if self.text.data:
            found[PERPLEXITY] = self.perplexity(model)
        if self.tasks.tasks:
            found |= self._harness.scores(model, self.tasks.num_fewshot, self.tasks.limit)
        return found

    def perplexity(self, model: Engine) -> Score:
        """Perplexity of the text's tokens, in windows of the model's context."""
        # Windows that do not overlap: experiments measure many variants, and need differences more than the last digit.
        first_id = perplexity.first_id(model)
        windows = Windows(model.context, model.context, self.text.max_tokens, first_id=first_id)
        text = self._opened_text(model.trained, windows)
        tokenizer = model.tokenizer
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        return Score.of_losses(*_by_document(perplexity.scored_windows(model, text, windows), first))

    # Opened when first needed and then kept: an experiment measures many variants on the same text and tasks.
    # `cached_property` can do so in a frozen dataclass, as it writes to __dict__ and not through __setattr__.
    @functools.cached_property
    def _harness(self):
        return self.tasks.open()

    @functools.cached_property
    def _opened(self) -> dict[tuple[str, Windows], Text]:
        return {}

    def _opened_text(self, trained, windows):
        """The text in a model's ids, kept for further models with the same tokenizer and context."""
        key = trained.tokenizer.digest, windows
        if key not in self._opened:
            self._opened[key] = self.text.open(trained.tokenizer, windows, trained.workdir)
        return self._opened[key]


def _by_document(windows: Iterable[ScoredWindow], first: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums of nats, and numbers of targets, of each document of a stream.

    Args:
      first: the token id that each document begins with; None: nothing shows it, and each window counts as a document.
    """
    nats_N, document_N, document = [], [], 0
    for window in windows:
        inputs_T = window.ids[-len(window.log_probs_T) - 1 : -1]
        # A target is of the document of the token before it: the last one of a document is the id that ends it.
        begins_T = np.arange(len(inputs_T)) == 0 if first is None else inputs_T == first
        nats_N.append(-window.log_probs_T)
        document_N.append(document + np.cumsum(begins_T))
        document = document_N[-1][-1]
    document_N = np.concatenate(document_N)
    document_N -= document_N[0]
    return np.bincount(document_N, np.concatenate(nats_N)), np.bincount(document_N)
