"""How the runs of a protocol ended, as their folders say: WORKDIR/runs/KEY (runner.py)."""

import json
import math
import os
from collections.abc import Iterable

from memoryllm_jax.checkpoint import description
from memoryllm_jax.common import storage
from memoryllm_jax.experiments import rates, scoring
from memoryllm_jax.experiments.protocol import Protocol, Run, Setting

DESCRIPTION, RESULT, DIVERGED = "run.json", "result.json", "diverged.json"


def can_be_scored(run: Run, workdir: str) -> bool:
    """Whether the run's last step is done and its checkpoint is there."""
    folder = run.folder(workdir)
    return storage.exists(os.path.join(folder, RESULT)) and bool(description.steps(folder))


def has_diverged(run: Run, workdir: str) -> bool:
    """Whether the run ended because its loss was not finite."""
    return storage.exists(os.path.join(run.folder(workdir), DIVERGED))


def loss(run: Run, workdir: str) -> float | None:
    """The loss of the run's last validation in nats a token; infinite if it diverged, None if it is not trained yet."""
    if has_diverged(run, workdir):
        return math.inf
    path = os.path.join(run.folder(workdir), RESULT)
    if not storage.exists(path):
        return None
    return json.loads(storage.read_bytes(path, "the result of a run"))["validation"]["loss"]


def sweep_choice(protocol: Protocol, workdir: str, setting: Setting) -> rates.Choice:
    """What the sweep of a setting says so far."""
    found: dict[float, float] = {}
    while True:
        choice = rates.choose(protocol.sweep, found)
        losses = {rate: loss(protocol.sweep_run(setting, rate), workdir) for rate in choice.missing}
        new = {rate: value for rate, value in losses.items() if value is not None}
        if not new:
            return choice
        found |= new


def chosen_rates(protocol: Protocol, workdir: str, settings: Iterable[Setting] | None = None) -> dict[Setting, float]:
    """The peak rates that are chosen already.

    Args:
      settings: swept settings; None: those of all experiments.
    """
    if settings is None:
        settings = dict.fromkeys(protocol.swept(setting) for setting in protocol.settings())
    choices = {setting: sweep_choice(protocol, workdir, setting).rate for setting in settings}
    return {setting: rate for setting, rate in choices.items() if rate is not None}


def finished(protocol: Protocol, workdir: str) -> list[Run]:
    """The runs of the experiments that are scored, in the protocol's order. `run.folder(workdir)` has their files."""
    runs = protocol.experiment_runs(chosen_rates(protocol, workdir))
    return [run for run in runs if scoring.is_scored(run.folder(workdir))]
