"""Runs an analysis of one trained model, or of several seeds of it, and writes its page."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated

import jax

from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.checkpoint.seeds import by_seed
from memoryllm_jax.common import options, seeds
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.report import Report


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options that name the trained model to analyse, or seeds of it. Raises: ArgumentError."""

    workdir: Annotated[
        tuple[str, ...],
        Option(
            "folder with the trained model's checkpoints; give several that differ in the seed for a mean", many=True
        ),
    ]
    step: Annotated[int | None, Option("checkpoint to read; by default the newest")] = None
    dtype: Annotated[str, Option("dtype of the computation", choices=("float32", "bfloat16"))] = "float32"

    def __post_init__(self):
        options.check(self)

    def check(self) -> None:
        """Raises: UserError if the workdirs are not seeds of one model."""
        models = by_seed(self.workdir, self.step)[0]
        if len(models) > 1:
            found = f"another model in {models[1]} than in {models[0]}"
            raise ArgumentError("workdir", f"expected one model, or runs that differ in the seed alone, found {found}")

    def each(self, analysis: Callable[..., dict]) -> Iterator[KeyValueModel]:
        """Opens the model of each seed for an analysis, and closes it when the next is asked for. Raises: UserError."""
        # Attention runs only where text does; without its weights a large model opens faster and takes less memory.
        runs_text = "text" in inspect.signature(analysis).parameters
        for workdir in self.workdir:
            opened = KeyValueModel.open(workdir, self.step, self.dtype, with_attention=runs_text)
            with contextlib.closing(opened) as model:
                yield model


def run(analysis: Callable[..., dict], models: Iterable[KeyValueModel], output: str, count: int = 1, **chosen) -> str:
    """Runs an analysis, such as `values.values`, and writes its page; of several seeds as `seeds.write` does.

    Args:
      models: the model of each seed, opened one after another.
      output: folder for the page and the files beside it, which are named after the analysis.
      count: the number of models.
      chosen: the analysis's options by name.
    Returns: one line that says what was written. Raises: UserError.
    """
    name = analysis.__name__
    every = (
        seeds.Seed(
            f"{name}: {model.config.architecture}",
            model.trained.facts(),
            functools.partial(_measure, analysis, model, chosen),
        )
        for model in models
    )
    # Docstrings of analyses are definitions, and pages repeat them.
    return seeds.write(output, name, inspect.getdoc(analysis), every, count)


def _measure(analysis, model: KeyValueModel, chosen: dict, page: Report) -> dict:
    # By default, accelerators round the factors of float32 products, which changes ranks of close coefficients.
    with jax.default_matmul_precision("highest"):
        return analysis(model, page, **chosen)
