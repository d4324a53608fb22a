"""Experiment trackers that a run's records go to beside its files: Weights & Biases, and trackio.

trackio (https://github.com/gradio-app/trackio) keeps runs in a folder of this machine, ~/.cache/huggingface/trackio or
TRACKIO_DIR, and `trackio show` draws them. It sends them elsewhere only if the user says where, in TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL. Weights & Biases sends runs to its server, unless WANDB_MODE says otherwise.
"""

import contextlib
import os
import types
import uuid
from collections.abc import Iterator

from memoryllm_jax.checkpoint.description import Description
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import require
from memoryllm_jax.config import LogConfig

_PROJECT = "memoryllm_jax"
_WHERE_TRACKIO_SENDS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Tracker:
    """One run in one tracker. A resumed run continues it, as its id is kept in the workdir.

    No tracker can drop records: what a resumed run makes again is there twice, at the same step.

    Args:
      name: wandb or trackio, the name of the module and of the extra that installs it.
      workdir: of the run; its last part is the name of the run.
      folder: on a disk, for files of Weights & Biases.
      description: its config is shown beside the run.
    Raises: UserError if the module is not installed.
    """

    def __init__(self, name: str, workdir: str, folder: str, description: Description):
        self._module = module = _module(name)
        run_id = _kept_id(workdir, name)
        run_name = os.path.basename(workdir)
        more = {"project": _PROJECT, "config": description.config, "resume": "allow"}
        self._takes_steps = name == "trackio"
        if self._takes_steps:
            # trackio finds a run again by its name, so that the runs of two folders with one name would be mixed.
            with _silent_hub(module):
                self._run = module.init(name=f"{run_name}-{run_id[:8]}", embed=False, **more)
        else:
            self._run = module.init(name=run_name, id=run_id, dir=folder, **more)
            # Steps of Weights & Biases can only grow. Those of a resumed run do not.
            self._run.define_metric("*", step_metric="step")

    def write(self, step: int, kind: str, values: dict) -> None:
        """Adds a record. The arguments are those of `metrics.Writer.write`."""
        named = dict(flat(kind, values))
        if self._takes_steps:
            self._run.log(named, step=step)
        else:
            self._run.log(named | {"step": step})

    def close(self) -> None:
        """Waits until the records are written or sent."""
        self._module.finish()  # that of the run alone lets trackio finish it again at the exit


def flat(name: str, values) -> Iterator[tuple[str, int | float | str]]:
    """Yields (name, value) of nested values: {"seconds": {"step": 2.0}} is NAME/seconds/step, [2.0] is NAME/00."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flat(f"{name}/{key}", value)
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from flat(f"{name}/{number:02}", value)
    else:
        yield name, values


def open_trackers(log: LogConfig, workdir: str, folder: str, description: Description) -> list[Tracker]:
    """The trackers that the config asks for. The other arguments are those of `Tracker`. Raises: UserError."""
    return [Tracker(name, workdir, folder, description) for name in _wanted(log)]


def check(log: LogConfig) -> None:
    """Refuses trackers that are not installed, before a run has opened and compiled anything. Raises: UserError."""
    for name in _wanted(log):
        _module(name)


def _wanted(log: LogConfig) -> list[str]:
    """The names of the trackers that the config asks for."""
    return [name for name in ("wandb", "trackio") if getattr(log, name)]


def _module(name: str) -> types.ModuleType:
    """The module of a tracker. Raises: UserError if it is not installed."""
    return require(name, name, f"config.log.{name}")


def _kept_id(workdir: str, name: str) -> str:
    """The id of the run in a tracker. The first process of the run chooses it."""
    path = os.path.join(workdir, f"{name}_id")
    if not storage.exists(path):
        storage.write_bytes(path, uuid.uuid4().hex.encode())
    return storage.read_bytes(path, "the id of the run").decode()


@contextlib.contextmanager
def _silent_hub(trackio) -> Iterator[None]:
    """Keeps trackio from asking huggingface.co for the user's name, unless the user lets it send runs somewhere.

    It asks wherever the user is logged in there, for another purpose perhaps.
    """
    constants = trackio.huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not any(os.environ.get(name) for name in _WHERE_TRACKIO_SENDS)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
