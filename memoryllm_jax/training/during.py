"""What a run does between steps while it trains: it samples a text, and scores the model on tasks.

The model under training is opened as an `Engine`, so that both are what `generate` and `evaluate` do with a checkpoint.
Nothing is written and read back: the parameters are converted for inference on the devices, from where they are. The
copy is in the dtype of the computation, and takes no more memory than the gradients do during a step.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from jax.sharding import Mesh

from memoryllm_jax.checkpoint.trained import for_serving, serving_shapes
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import Config, EvalConfig, ModelConfig, SampleConfig
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.generation import STEPS_PER_CALL
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.training.metrics import Kind
from memoryllm_jax.training.step import Trainer


class Observer(Protocol):
    """Looks at the parameters between steps, while the clock stands.

    Attributes:
      kind: of its records.
      every: steps between its records; 0: after the last step only. The last step always has one.
      asked: what the config asks it for, which its records hold. A record in which this differs is made again by a run
        that resumes at its step; with "", every one is.
    """

    kind: Kind
    every: int
    asked: str

    def __call__(self, params) -> dict | None:
        """The values of its record, by name; None if a signal stopped it. Args: params: those of the training state."""

    def text(self, result: dict) -> str:
        """A result as a line to print."""


def observers(
    trainer: Trainer, tokenizer: Tokenizer, tasks: "Tasks | None", stopped: Callable[[], bool]
) -> list[Observer]:
    """The observers that the config asks for, besides validation.

    Args:
      tasks: the opened tasks of config.eval, or None.
      stopped: as of `Tasks.__call__`.
    """
    config = trainer.config
    if not config.sample.tokens and tasks is None:
        return []
    model = LiveModel(trainer, tokenizer)
    wanted: list[Observer] = []
    if config.sample.tokens:
        wanted.append(Sample(config, model))
    if tasks is not None:
        wanted.append(Scores(config.eval, tasks, model, stopped))
    return wanted


class LiveModel:
    """The model under training as an engine, which holds weights only inside `holding`.

    There is one engine for the whole run, so that its functions compile once.

    Attributes:
      engine: the engine, which between two uses holds the shapes of the weights alone.
    """

    def __init__(self, trainer: Trainer, tokenizer: Tokenizer):
        config = trainer.config
        self._model = config.model
        self._shapes = serving_shapes(trainer.params_shape, self._model)
        about = _Untrained(self._model, tokenizer, config.seq_len, trainer.mesh)
        self.engine = Engine(about, self._shapes, LiveRows(self._model, self._shapes, trainer.mesh))

    @contextlib.contextmanager
    def holding(self, params) -> Iterator[Engine]:
        """The engine with these parameters of a training state. They are copied in the dtype of the computation."""
        self.engine.fill(for_serving(params, self._model))
        try:
            yield self.engine
        finally:
            self.engine.fill(self._shapes)  # frees the copies: the next step needs their memory


class _Untrained(NamedTuple):
    """What an engine asks of its `TrainedModel`, for a model that has no checkpoint."""

    config: ModelConfig
    tokenizer: Tokenizer
    context: int
    mesh: Mesh


class Sample:
    """An `Observer` that continues the prompt of config.sample. The draws are the same each time."""

    kind: Kind = "sample"

    def __init__(self, config: Config, model: LiveModel):
        self._config, self._model = config.sample, model
        self._seed = config.seed % 2**32
        self.every = config.sample.every
        self.asked = _asked(config.sample)

    def __call__(self, params) -> dict:
        """Returns: {"text": the prompt and what follows}."""
        with self._model.holding(params) as engine:
            prompt = engine.prompt(self._config.prompt) or [0]  # a decoder needs a token to start from
            prompt = prompt[: engine.context - 1]  # and room for the next one
            steps = engine.generate(
                [prompt],
                self._config.tokens,
                Sampling(self._config.temperature),
                self._seed,
                engine.tokenizer.stop_ids,
                STEPS_PER_CALL,
            )
            new = [token for step in steps for _, token in step]
            return {"text": engine.tokenizer.decode(prompt + new)}

    def text(self, result: dict) -> str:
        return f"sample at temperature {self._config.temperature:g}:\n{result['text']}"


def _asked(sample: SampleConfig) -> str:
    return f"{sample.tokens} tokens at temperature {sample.temperature:g} after {sample.prompt!r}"


class Tasks(Protocol):
    """Tasks of the evaluation harness, opened. Training may not import evaluation, so a command hands them over."""

    def check(self, model: Engine, limit: int) -> None:
        """Prepares all requests, and refuses those that the model cannot serve.

        Args:
          model: without weights, as nothing is computed.
          limit: examples of each task; 0: all.
        Raises: UserError.
        """

    def all_scores(self, model: Engine, limit: int, stopped: Callable[[], bool]) -> dict[str, dict[str, float]] | None:
        """Scores a model.

        Args:
          limit: as of `check`.
          stopped: called between batches, on all hosts alike; if it returns True, the scoring ends without a result.
        Returns: {task: {metric: value}}, with the number of examples as "n"; None if it was stopped.
        Raises: UserError.
        """


OpenTasks = Callable[[EvalConfig], Tasks]  # raises UserError for what is missing, before the run starts


class Scores:
    """An `Observer` that scores the model on the tasks of config.eval."""

    kind: Kind = "tasks"

    def __init__(self, config: EvalConfig, tasks: Tasks, model: LiveModel, stopped: Callable[[], bool]):
        self._tasks, self._model, self._stopped, self._limit = tasks, model, stopped, config.tasks_limit
        self.every = config.tasks_every
        self.asked = f"{config.tasks}: {config.tasks_limit or 'all'} examples of each"

    def __call__(self, params) -> dict | None:
        """Returns: {task: {metric: value}}; None if a signal stopped it."""
        with self._model.holding(params) as engine:
            return self._tasks.all_scores(engine, self._limit, self._stopped)

    def check(self) -> None:
        """Refuses now what would end the run at its first scores, hours from now: texts that do not fit the context.

        Raises: UserError.
        """
        try:
            self._tasks.check(self._model.engine, self._limit)
        except UserError as error:
            problem = error.problem if isinstance(error, ArgumentError) else error
            raise ArgumentError("config.eval.tasks", str(problem)) from error

    def text(self, result: dict) -> str:
        return "\n".join(["tasks", *score_lines(result)])


def score_lines(result: dict) -> list[str]:
    """A line to print for each task in a result of `Scores`."""
    lines = []
    for task, metrics in result.items():
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "n")
        lines.append(f"  {task}: {values} ({metrics['n']:,} examples)")
    return lines


def check(observers: list[Observer]) -> None:
    """Lets the observers refuse what they could not do later. Raises: UserError."""
    for observer in observers:
        if isinstance(observer, Scores):
            observer.check()
