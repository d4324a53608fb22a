"""What the probes have in common: models by label, and their quality on a text and on tasks."""

import contextlib
import dataclasses
import functools
import math

from absl import flags

from memoryllm_jax import config, evaluate, generate, report, sharding
from memoryllm_jax.cli import UserError
from memoryllm_jax.saved import SavedModel

PERPLEXITY = "perplexity"
# How the paper groups its tasks (Table 1), by the beginnings of their names in the harness.
GROUPS = {
    "recall": ("lambada", "sciq", "arc_easy"),
    "reasoning": ("hellaswag", "winogrande", "boolq", "piqa"),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A model's perplexity on `data` and scores on `tasks`, by `cli.define_quality_flags`. Raises: UserError."""

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
        return report.quality_facts(self.data, self.split, self.max_tokens, self.tasks, self.num_fewshot, self.limit)

    def __call__(self, model: generate.Model) -> dict[str, float]:
        """{"perplexity": of tokens, task: accuracy (or what the task has instead), ...}, of those asked for."""
        out = {PERPLEXITY: self.perplexity(model)} if self.data else {}
        if self.tasks:
            for task, (metric, value) in self._harness.scores(model, self.num_fewshot, self.limit).items():
                out[task if metric == "acc" else f"{task} {metric}"] = value
        return out

    def perplexity(self, model: generate.Model) -> float:
        """Of the tokens of `data`."""
        windows = evaluate.Windows(model.saved.context, model.saved.context, self.max_tokens)
        return evaluate.perplexity(model, self._text(model.tokenizer, windows), windows)["perplexity"]

    @functools.cached_property
    def _harness(self):
        return evaluate.harness_module().Tasks(list(self.tasks), self.task_path, self.task_data)

    @functools.cached_property
    def _texts(self):
        return {}

    def _text(self, tokenizer, windows):
        key = tokenizer.digest, windows
        if key not in self._texts:
            self._texts[key] = evaluate.text_of(self.data, self.split, "text", tokenizer, windows)
        return self._texts[key]


def from_flags() -> Measure:
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Measure)}
    return Measure(**values | {"tasks": tuple(values["tasks"])})


@dataclasses.dataclass
class Models:
    """Trained models to look at side by side, loaded one at a time.

    Args:
      workdirs: of the models.  tol: a ToL file to serve the rows of the only one, or "".
    """

    workdirs: list[str]
    tol: str = ""
    place: str = ""
    dtype: str = ""

    def __post_init__(self):
        if self.place and not self.tol:
            raise UserError("--rows: expected --tol too, as it says where its rows are served from")
        if self.tol and len(self.workdirs) > 1:
            raise UserError(f"--tol={self.tol}: expected one --workdir, found {len(self.workdirs)}")
        self.mesh = sharding.make_mesh(config.MeshConfig(data=-1, fsdp=1, tensor=1))
        self.facts, self.labels, self.configs = {}, [], []
        for workdir in self.workdirs:
            with contextlib.closing(SavedModel(workdir, dtype=self.dtype)) as saved:
                label = saved.config.architecture
                self.labels.append(f"{label} {workdir}" if label in self.labels else label)
                self.configs.append(saved.config)
                about = report.saved_facts(saved)
                self.facts |= {f"{self.labels[-1]}: {name}": text for name, text in about.items()}
        self.facts |= {"rows": f"{self.tol}, on {self.place or 'disk'}"} if self.tol else {}

    def __iter__(self):
        """(label, generate.Model) of each in turn: its architecture, and its folder where two have the same."""
        for label, workdir in zip(self.labels, self.workdirs):
            model = generate.Model(workdir, self.tol, self.place or "disk", dtype=self.dtype, mesh=self.mesh)
            with contextlib.closing(model):
                yield label, model


def kinds(model: generate.Model, label: str) -> dict[str, str]:
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
