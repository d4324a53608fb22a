"""The prepared data of a training run, and the data that is read for a trained model."""

from __future__ import annotations

import os
import typing

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data import dataset, documents
from memoryllm_jax.data.dataset import Dataset

if typing.TYPE_CHECKING:  # it imports JAX, which a config file that names a run must not wait for
    from memoryllm_jax.checkpoint.trained import TrainedModel


def path_of(config: Config, workdir: str) -> str:
    """The prepared data of a run: config.data.path, or for "embedded" the folder in the workdir."""
    if config.data.path == documents.EMBEDDED:
        return os.path.join(workdir, "data")
    return config.data.path


def open_data(trained: TrainedModel, path: str = "", argument: str = "data") -> Dataset:
    """Opens prepared data for a trained model. Its workdir remembers which file shards are verified.

    Args:
      path: the data, as of `Dataset`; "": that of the model's run (`own_path`).
      argument: the argument that `path` is the value of, for error messages.
    Raises: UserError if the data was made with another tokenizer, or the run's own data is gone or has changed.
    """
    return dataset.open_for(path or own_path(trained, argument), trained.tokenizer.digest, trained.workdir)


def own_path(trained: TrainedModel, argument: str = "data") -> str:
    """The path that `find_own` returns; a printed line names it. Raises: UserError as `find_own`."""
    path = find_own(trained, argument)
    print(f"{argument}: none is given, so the data that the model was trained on is read: {path}", flush=True)
    return path


def find_own(trained: TrainedModel, argument: str = "data") -> str:
    """The path of the data that a model was trained on.

    Args:
      argument: the argument that names other data, for error messages.
    Raises: UserError if it is not known, is gone, or has changed.
    """
    if trained.description.data.digest == trained.run.data.path:
        # hf/import_.py writes one word in place of both.
        raise ArgumentError(argument, "expected prepared data, as the model is imported and its own is not known")
    path = path_of(trained.run, trained.workdir)
    try:
        found = Dataset(path)
    except UserError as error:
        where = "" if storage.is_url(path) or os.path.isabs(path) else ", from the folder where the run was started,"
        raise ArgumentError(
            argument, f"none is given, and the model's training data{where} cannot be opened: {error}"
        ) from error
    if found.digest != trained.description.data.digest:
        raise ArgumentError(
            argument, f"none is given, and {path} has changed since the model was trained on it; name the data to read"
        )
    return path
