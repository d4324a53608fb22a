"""Trained models to compare, opened one after another."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

from memoryllm_jax import config
from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.checkpoint.seeds import by_seed
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import seeds
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.model import sharding
from memoryllm_jax.tol import serving


class Models:
    """Trained models to compare. Only one is loaded at a time.

    Args:
      workdirs: folders of the models.
      tol: a ToL file that serves the rows of the only model, or "".
      place: where the file's rows are served from: device, host or, by default, disk.
      dtype: of the computation; by default that of the training.
    Attributes:
      labels: the models' names: the architecture, and the folder too if an earlier model has the same architecture.
      configs: the models' configs.
      facts: facts about all models, for the caption of a page.
      mesh: all devices of this machine as batch shards.
    Raises: UserError.
    """

    def __init__(self, workdirs: Sequence[str], tol: str = "", place: str = "", dtype: str = ""):
        # Errors name the commands' options, `rows` for `place`.
        if place and not tol:
            raise ArgumentError("rows", "expected a ToL file too, as it says where the rows of one are served from")
        if tol and len(workdirs) > 1:
            raise ArgumentError("tol", f"expected one workdir, whose rows the file holds, found {len(workdirs)}")
        self.workdirs, self.tol, self.place, self.dtype = workdirs, tol, place, dtype
        # Each device holds a whole model and scores its share of the sequences: fast, as nothing is gathered.
        self.mesh = sharding.make_mesh(config.MeshConfig(data=-1, fsdp=1, tensor=1))
        self.facts: dict[str, str] = {}
        self.labels: list[str] = []
        self.configs: list[config.ModelConfig] = []
        for workdir in workdirs:  # reads only the configs, so that experiments can refuse before they load weights
            with contextlib.closing(TrainedModel(workdir, dtype=dtype)) as trained:
                label = trained.config.architecture
                if label in self.labels:
                    label = f"{label} {workdir}"
                self.labels.append(label)
                self.configs.append(trained.config)
                self.facts |= {f"{label}: {name}": text for name, text in trained.facts().items()}
        if tol:
            self.facts["rows"] = f"{tol}, on {place or 'disk'}"

    def __iter__(self) -> Iterator[tuple[str, Engine]]:
        """Yields (label, engine) of each model, and closes the engine when the next one is asked for."""
        for label, workdir in zip(self.labels, self.workdirs):
            with contextlib.closing(self.open(workdir)) as engine:
                yield label, engine

    def data_of(self, label: str, argument: str) -> str:
        """The prepared data that a model was trained on, as `run_data.own_path` finds it. Raises: UserError."""
        workdir = self.workdirs[self.labels.index(label)]
        with contextlib.closing(TrainedModel(workdir, dtype=self.dtype)) as trained:
            return run_data.own_path(trained, argument)

    def open(self, workdir: str) -> Engine:
        """Loads one of the models. Raises: UserError."""
        return serving.open_engine(workdir, self.tol, self.place, dtype=self.dtype, mesh=self.mesh)


@dataclasses.dataclass(frozen=True)
class ModelsOptions:
    """The options of commands that compare trained models."""

    workdir: Annotated[
        tuple[str, ...],
        Option(
            "folder with a trained model's checkpoints; give several to compare models, or seeds of each", many=True
        ),
    ]
    tol: Annotated[str, Option("ToL file that serves the rows of the only --workdir")] = ""
    rows: Annotated[str, Option("where the ToL file's rows are served from: device, host or, by default, disk")] = ""
    dtype: Annotated[str, Option("float32 or bfloat16, for the computation; by default that of the training")] = ""

    def open(self) -> list[Models]:
        """Reads the models' configs, seed by seed (`seeds.by_seed`). Raises: UserError."""
        return [Models(of_seed, self.tol, self.rows, self.dtype) for of_seed in by_seed(self.workdir)]


def run(experiment: Callable[..., dict], models: Sequence[Models], output: str, **chosen) -> str:
    """Runs an experiment, such as `contribution.alpha`, and writes its page; of several seeds as `seeds.write` does.

    Args:
      models: of each seed.
      output: folder for the page and the files beside it, which are named after the experiment.
      chosen: the experiment's options. If its `measure` names neither text nor tasks, it measures on the data that the
        first model was trained on.
    Returns: one line that says what was written. Raises: UserError.
    """
    measure = chosen.get("measure")
    if measure and not measure.text.data and not measure.tasks.tasks:
        text = dataclasses.replace(measure.text, data=models[0].data_of(models[0].labels[0], "data"))
        measure = chosen["measure"] = dataclasses.replace(measure, text=text)
    name, more = experiment.__name__, measure.facts() if measure else {}
    every = (
        seeds.Seed(
            f"{name}: {', '.join(of_seed.labels)}",
            of_seed.facts | more,
            functools.partial(experiment, of_seed, **chosen),
        )
        for of_seed in models
    )
    # The docstring is the definition of what was measured: the help text and the page give the same one.
    return seeds.write(output, name, inspect.getdoc(experiment), every, len(models))
