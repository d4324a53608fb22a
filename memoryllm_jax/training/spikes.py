"""Skips a step whose loss or gradient norm is not finite or a spike, inside the compiled step.

A value is a spike if it is more than k = config.optimizer.spike_deviations standard deviations above the mean of the
last `WINDOW` steps that were applied. The deviation is that of a sample (n - 1). Nothing is a spike before `FEWEST`
steps were applied; what is not finite is skipped from the first step on. This is the rule of OLMo-core
(SkipStepOptimizer, used for OLMo 2, arXiv 2501.00656) and of Levanter, with two differences: they also skip what is far
below the mean, and they let a skipped step enter the mean, so that a few bad steps raise the limit for the next.

A skipped step leaves the parameters, the moments and the optimizer's counts as they were. The step number goes on, and
with it the data and the learning rate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from memoryllm_jax.checkpoint.reader import Reader
from memoryllm_jax.checkpoint.store import Checkpoints
from memoryllm_jax.config import Config

WINDOW = 128
FEWEST = WINDOW // 2


def init() -> dict[str, jax.Array]:
    """The statistics before the first step: the part "spikes" of a state.

    Returns: "skipped" and "applied", numbers of steps; "loss" and "grad_norm", the values of the last applied steps
      [WINDOW], where the value of the n-th applied step is at n % WINDOW.
    """
    return {
        "skipped": jnp.zeros((), jnp.int32),
        "applied": jnp.zeros((), jnp.int32),
        "loss": jnp.zeros(WINDOW, jnp.float32),
        "grad_norm": jnp.zeros(WINDOW, jnp.float32),
    }


def skipped(state: dict[str, Any]) -> int | None:
    """The number of steps that a run has skipped before this state; None if it skips none. Waits for the state."""
    return int(state["spikes"]["skipped"]) if "spikes" in state else None


def guard(config: Config, before: dict[str, Any], after: dict[str, Any], loss, grad_norm) -> tuple[dict, dict]:
    """Undoes a step that has to be skipped. Traced inside the step: the host decides nothing.

    Args:
      before, after: states before and after the step; `before` has the statistics, "spikes".
      loss: of the step, in nats per token; a scalar.
      grad_norm: global norm of its gradient before clipping; a scalar.
    Returns: (the state to go on with, scalar metrics: "skipped", the number of steps skipped so far; "is_skipped", 0 or
      1; "loss_limit" and "grad_norm_limit", the largest values that were no spike).
    """
    statistics = before["spikes"]
    values = {"loss": loss, "grad_norm": grad_norm}
    limits = {name: _limit(config, statistics[name], statistics["applied"]) for name in values}
    is_applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    for name, value in values.items():
        is_applied &= value <= limits[name]
    place = statistics["applied"] % WINDOW
    windows = {
        name: statistics[name].at[place].set(jnp.where(is_applied, value, statistics[name][place]))
        for name, value in values.items()
    }
    counts = {
        "skipped": statistics["skipped"] + jnp.where(is_applied, 0, 1),
        "applied": statistics["applied"] + jnp.where(is_applied, 1, 0),
    }
    state = after | {name: _chosen(is_applied, after[name], before[name]) for name in ("params", "opt_state")}
    metrics = {
        "skipped": counts["skipped"],
        "is_skipped": ~is_applied,
        "loss_limit": limits["loss"],
        "grad_norm_limit": limits["grad_norm"],
    }
    return state | {"spikes": counts | windows}, metrics


def _limit(config: Config, values_W: jax.Array, applied: jax.Array) -> jax.Array:
    """The largest value that is no spike, after `applied` steps; infinite where any finite value is none."""
    deviations = config.optimizer.spike_deviations
    if not deviations:
        return jnp.asarray(jnp.inf, jnp.float32)
    is_known_W = jnp.arange(WINDOW) < applied
    known = jnp.minimum(applied, WINDOW)
    mean = jnp.sum(values_W, where=is_known_W) / known
    # Squares of differences, as the difference of two means of squares would cancel.
    variance = jnp.sum((values_W - mean) ** 2, where=is_known_W) / (known - 1)
    return jnp.where(known < FEWEST, jnp.inf, mean + deviations * jnp.sqrt(variance))


def _chosen(is_applied: jax.Array, after, before):
    """The tree `after` where the step is applied, else `before`; but the schedule's count goes on either way."""

    def is_schedule(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    # XLA fuses the choice with the update, which reads the old values in any case. A `lax.cond` around the update needs
    # as much memory, and XLA for GPUs would copy its condition to the host and wait. Nothing is differentiated here, so
    # what is not finite in `after` does not get into the result.
    def choose(new, old):
        return new if is_schedule(new) else jnp.where(is_applied, new, old)

    return jax.tree.map(choose, after, before, is_leaf=is_schedule)


def restore(checkpoints: Checkpoints | Reader, step: int, shapes: dict[str, Any], saved: Config) -> dict[str, Any]:
    """The state of a checkpoint, with the statistics if this run keeps them.

    config.optimizer.max_skipped may change on resume, from and to 0 too: statistics that the checkpoint lacks begin
    anew, and those that the run does not keep are dropped.

    Args:
      checkpoints: those of this run, or the reader of those of another.
      step: number of the checkpoint.
      shapes: `Trainer.state_shape` of this run.
      saved: config that the checkpoint was saved with.
    Raises: UserError.
    """
    everywhere = shapes["step"].sharding
    wanted = {name: part for name, part in shapes.items() if name != "spikes"}
    if saved.optimizer.max_skipped:
        wanted["spikes"] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(init)
        )
    state = checkpoints.restore(step, wanted)
    statistics = state.pop("spikes", None)
    if "spikes" in shapes:
        state["spikes"] = statistics or jax.jit(init, out_shardings=everywhere)()
    return state
