"""Runs an analysis of one trained model, and writes its page."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated

import jax

from memoryllm_jax.analysis.key_values import KeyValueModel
from memoryllm_jax.common import options
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.report import Report


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options that name the trained model to analyse. Raises: ArgumentError."""

    workdir: Annotated[str, Option("folder with the trained model's checkpoints")]
    step: Annotated[int | None, Option("checkpoint to read; by default the newest")] = None
    dtype: Annotated[str, Option("dtype of the computation", choices=("float32", "bfloat16"))] = "float32"

    def __post_init__(self):
        options.check(self)

    def open_for(self, analysis: Callable[..., dict]) -> contextlib.closing[KeyValueModel]:
        """A context manager that gives the model to an analysis, and closes it at the end. Raises: UserError."""
        # Attention runs only where text does; without its weights a large model opens faster and takes less memory.
        runs_text = "text" in inspect.signature(analysis).parameters
        return contextlib.closing(KeyValueModel.open(self.workdir, self.step, self.dtype, with_attention=runs_text))


def run(analysis: Callable[..., dict], model: KeyValueModel, output: str, **chosen) -> str:
    """Runs an analysis, such as `values.values`, and writes its page.

    Args:
      output: folder for the page and the files beside it, which are named after the analysis.
      chosen: the analysis's options by name.
    Returns: one line that says what was written. Raises: UserError.
    """
    name = analysis.__name__
    with Report(output, name, f"{name}: {model.config.architecture}", model.trained.facts()) as page:
        page.text(inspect.getdoc(analysis))  # docstrings of analyses are definitions, and pages repeat them
        # By default, accelerators round the factors of float32 products, which changes ranks of close coefficients.
        with jax.default_matmul_precision("highest"):
            return page.write(analysis(model, page, **chosen))
