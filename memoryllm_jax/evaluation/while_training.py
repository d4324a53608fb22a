"""Tasks of the harness for a model that is still trained: `train` hands `open_tasks` to the train loop."""

from typing import TYPE_CHECKING

from memoryllm_jax.common import errors
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.config import EvalConfig

if TYPE_CHECKING:
    from memoryllm_jax.evaluation.harness import Tasks


def open_tasks(chosen: EvalConfig) -> "Tasks":
    """Finds the tasks of a config and reads their examples, which every scoring then uses.

    Returns: the tasks, as `training.during.Tasks` describes them.
    Raises: UserError that names the field, if the harness, a task or its examples are missing.
    """
    errors.require("lm_eval", "eval", "config.eval.tasks")
    from memoryllm_jax.evaluation import harness  # not at the top of the file, as it needs the optional lm_eval

    names = [name.strip() for name in chosen.tasks.split(",")]
    try:
        tasks = harness.Tasks(names, chosen.tasks_folder, chosen.tasks_folder)
        tasks.load()
    except ArgumentError as error:
        field = "tasks" if error.name == "tasks" else "tasks_folder"
        raise ArgumentError(f"config.eval.{field}", error.problem) from error
    return tasks
