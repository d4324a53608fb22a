"""Branches: runs that go on from a checkpoint of another run, with its moments, its step and its place in the data.

Before a decay begins, the schedules wsd and constant have the same learning rates whatever the length of the run. A
checkpoint of that part is therefore one of every run that decays later, and a branch with a decay of its own ends
where that run would have ended (Haegele et al. 2024, arXiv:2405.18392, section 3). No JAX.
"""

import dataclasses
from typing import NamedTuple

import ml_collections

from memoryllm_jax.checkpoint import description as description_lib
from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.checkpoint.description import Description
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import RULES, Config, StartConfig

# What has no effect on the steps before a decay, so that a branch may set it anew
_MAY_DIFFER = frozenset(
    ["steps", "optimizer.schedule", "optimizer.decay_share", "optimizer.final_lr"]
    + [name for name in RULES if name.startswith("start.")]
)


class Origin(NamedTuple):
    """The checkpoint that a branch goes on from, and its description."""

    workdir: str
    step: int
    description: Description


def decay_of(workdir: str) -> ml_collections.ConfigDict:
    """The config of a branch that decays: that of the run in a workdir, from its newest checkpoint before a decay.

    With another --config.start.step or --config.optimizer.decay_share, its steps follow: the decay begins at that step.
    Raises: UserError if no checkpoint is of the stable part.
    """
    workdir = description_lib.folder(workdir)
    run = description_lib.config_of(workdir)
    c = ml_collections.ConfigDict(dataclasses.asdict(run))
    c.start.update(workdir=workdir, step=_newest_stable(workdir, run), optimizer="continue", memory=StartConfig.memory)
    c.data.path = run_data.path_of(run, workdir)
    c.model.attention = "auto"  # the backend of the other run may not exist on this accelerator
    c.tokens = c.tokens_per_parameter = 0.0
    c.optimizer.schedule = "wsd"
    # A reference, so that the flags of step and decay_share change it. A share of 1 is refused later: % keeps it from
    # being a division by zero here.
    c.steps = (c.start.get_ref("step") / (1 - c.optimizer.get_ref("decay_share") % 1)).to_int()
    return c


def origin(config: Config, current: Description) -> Origin:
    """The checkpoint that a run with start.optimizer=continue goes on from.

    Args:
      current: the description of this run's checkpoints (`description.describe`).
    Raises: UserError that names what keeps this run from going on from there.
    """
    workdir = description_lib.folder(config.start.workdir)
    step = config.start.step
    if step < 0:
        step = _newest_stable(workdir, description_lib.config_of(workdir))
    step = description_lib.choose_step(workdir, step, "config.start.step")
    saved = description_lib.read(workdir, step)
    _check_stable(saved.run(), step, workdir)
    different = description_lib.differences(saved, current, _MAY_DIFFER)
    if different:
        raise UserError(
            f"{'; '.join(different)}; expected the settings of {workdir}/{step}, as config.start.optimizer=continue "
            "goes on from it"
        )
    _check_decay(config, step)
    return Origin(workdir, step, saved)


def _newest_stable(workdir: str, run: Config) -> int:
    """The newest step in the stable part of a workdir's run. Raises: UserError if there is none."""
    steps = description_lib.steps(workdir)
    stable = [step for step in steps if run.optimizer.warmup_steps <= step <= run.decay_begins]
    if not stable:
        _check_stable(run, steps[-1], workdir)
    return stable[-1]


def _check_stable(run: Config, step: int, workdir: str) -> None:
    """Refuses a step at which the learning rate of a run depends on the run's length. Raises: UserError."""
    o = run.optimizer
    if o.schedule == "cosine":
        raise UserError(
            f"config.start.workdir: expected a run with the schedule wsd or constant, found cosine in {workdir}: its "
            "rates depend on its length from the warm-up on"
        )
    if not o.warmup_steps <= step <= run.decay_begins:
        raise UserError(
            f"config.start.step: expected a checkpoint of the stable part of {workdir}, from step {o.warmup_steps:,} "
            f"to {run.decay_begins:,}, found step {step:,}"
        )


def _check_decay(config: Config, step: int) -> None:
    """Refuses a branch that would have decayed before its first step. Raises: UserError."""
    if config.optimizer.schedule == "cosine":
        raise UserError("config.optimizer.schedule: expected wsd or constant, as of the run that this one goes on from")
    if config.steps <= step:
        raise UserError(f"config.steps: expected more than config.start.step = {step:,}, found {config.steps:,}")
    if config.decay_begins < step:
        raise UserError(
            f"config.optimizer.decay_share: expected a decay that begins at config.start.step = {step:,} or later, "
            f"found {config.optimizer.decay_share:g} of {config.steps:,} steps, so that it begins after "
            f"{config.decay_begins:,}"
        )
