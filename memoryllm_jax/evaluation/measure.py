"""A model's quality: perplexity on a text, and scores on tasks."""

import dataclasses
import functools
import math

from absl import flags

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import documents
from memoryllm_jax.evaluation import perplexity as perplexity_lib
from memoryllm_jax.evaluation.perplexity import Windows, text_of
from memoryllm_jax.inference.engine import Engine


def quality_facts(data, split, max_tokens, tasks, num_fewshot, limit) -> dict[str, str]:
    """The text and the tasks of `legacy.define_quality_flags`, as the page that measures on them is captioned."""
    out = {}
    if data:
        split = "" if documents.is_text(data) else f", {split}"
        out["text"] = f"{data}{split}" + (f", the first {max_tokens:,} tokens" if max_tokens else "")
    if tasks:
        share = f"{limit:g} documents each" if limit >= 1 else f"{limit:.0%} of the documents"
        shots = "" if num_fewshot is None else f", {num_fewshot} examples in a prompt"
        out["tasks"] = ", ".join(tasks) + (f", {share}" if limit else "") + shots
    return out


def harness_module():
    """memoryllm_jax.harness. Raises: UserError if lm_eval is not there."""
    try:
        from memoryllm_jax.evaluation import harness
    except ImportError as error:
        raise UserError(f"--tasks: needs lm_eval: pip install 'memoryllm_jax[eval]' ({error})") from error
    return harness


PERPLEXITY = "perplexity"
# How the paper groups its tasks (Table 1), by the beginnings of their names in the harness.
GROUPS = {
    "recall": ("lambada", "sciq", "arc_easy"),
    "reasoning": ("hellaswag", "winogrande", "boolq", "piqa"),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A model's perplexity on `data` and scores on `tasks`, by `legacy.define_quality_flags`. Raises: UserError."""

    data: str = ""
    split: str = "validation"
    max_tokens: int = 0
    tasks: tuple[str, ...] = ()
    task_path: str = ""
    task_data: str = ""
    num_fewshot: int | None = None
    limit: float = 0

    def __post_init__(self):
        if not self.data and not self.tasks:
            raise UserError("expected --data=TEXT, --tasks=NAMES or both, found neither")

    def facts(self) -> dict[str, str]:
        """For a page's caption."""
        return quality_facts(self.data, self.split, self.max_tokens, self.tasks, self.num_fewshot, self.limit)

    def __call__(self, model: Engine) -> dict[str, float]:
        """{"perplexity": of tokens, task: accuracy (or what the task has instead), ...}, of those asked for."""
        out = {PERPLEXITY: self.perplexity(model)} if self.data else {}
        if self.tasks:
            for task, (metric, value) in self._harness.scores(model, self.num_fewshot, self.limit).items():
                out[task if metric == "acc" else f"{task} {metric}"] = value
        return out

    def perplexity(self, model: Engine) -> float:
        """Of the tokens of `data`."""
        windows = Windows(model.context, model.context, self.max_tokens)
        return perplexity_lib.perplexity(model, self._text(model.tokenizer, windows), windows)["perplexity"]

    @functools.cached_property
    def _harness(self):
        return harness_module().Tasks(list(self.tasks), self.task_path, self.task_data)

    @functools.cached_property
    def _texts(self):
        return {}

    def _text(self, tokenizer, windows):
        key = tokenizer.digest, windows
        if key not in self._texts:
            self._texts[key] = text_of(self.data, self.split, "text", tokenizer, windows)
        return self._texts[key]


def measure_from_flags() -> Measure:
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Measure)}
    return Measure(**values | {"tasks": tuple(values["tasks"])})


def kinds(model: Engine, label: str) -> dict[str, str]:
    """{series: "" or "_compute"}: what can be scaled or dropped, and how the names of its options end."""
    both = model.config.row_dim and model.config.compute_dim
    memory = "FFN-M" if model.config.memory_dim else "table"
    return {f"{label}, {memory}": "", f"{label}, FFN-C": "_compute"} if both else {label: ""}


def change(value: float, full: float) -> float:
    """Relative, in percent."""
    return 100 * (value / full - 1) if full else math.nan


def group_of(task: str) -> str | None:
    """recall, reasoning or None."""
    for group, names in GROUPS.items():
        if task.startswith(names) and " " not in task:
            return group
    return None


def group_means(changes: dict[str, float]) -> dict[str, float]:
    """Mean change of the tasks of each group that are there, without those of which nothing is left to lose."""
    out = {}
    for group in GROUPS:
        found = [value for task, value in changes.items() if group_of(task) == group and math.isfinite(value)]
        if found:
            out[group] = sum(found) / len(found)
    return out
