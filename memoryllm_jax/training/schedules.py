"""Learning rates as functions of the step.

All rise linearly to the peak over `optimizer.warmup_steps`. Then:

  cosine    half a cosine down to the final rate at the last step (the paper's Table 3).
  wsd       warm-up, stable, decay: the peak until `Config.decay_begins`, then down to the final rate at the last step
            by 1 - sqrt(x) for x from 0 to 1. The shape of the schedule is that of MiniCPM (Hu et al. 2024,
            arXiv:2404.06395); the decay is that of Haegele et al. 2024 (arXiv:2405.18392), who found 1 - sqrt(x)
            better than a linear decay, and as good as a cosine over a fifth of the steps.
  constant  the peak, from which a decay can branch off (configs/start.py).

Before its decay, wsd has the same rates whatever the length of the run, and the same as constant.
"""

import jax.numpy as jnp
import optax

from memoryllm_jax.config import Config


def learning_rate(config: Config, peak: float | None = None) -> optax.Schedule:
    """The learning rate of each step, as `config.optimizer.schedule` says.

    Args:
      peak: the peak rate; the final rate has the same proportion to it as final_lr to peak_lr. None: peak_lr.
    Returns: a function of the number of steps done before the step.
    """
    o = config.optimizer
    peak, final = (o.peak_lr, o.final_lr) if peak is None else (peak, peak * o.final_lr / o.peak_lr)
    if o.schedule == "cosine":
        # optax refuses a schedule without decay, as that of a run which is all warm-up.
        last = max(config.steps, o.warmup_steps + 1)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, o.warmup_steps, last, final)
        # rate(0) is zero, with which the first step would change nothing.
        return lambda steps_done: rate(steps_done + 1)
    begins = config.decay_begins
    # A constant rate has no steps of decay, and none that would be divided by their number.
    decay_steps = max(config.steps - begins, 1)

    def warmup_stable_decay(steps_done):
        number = steps_done + 1  # with 0, the first step would change nothing
        rising = jnp.minimum(number / max(o.warmup_steps, 1), 1)
        decayed = jnp.maximum(number - begins, 0) / decay_steps
        # Without decay the peak itself, not a sum that rounds to it: the rates before a decay must not depend on it.
        return rising * (peak - (peak - final) * jnp.sqrt(decayed))

    return warmup_stable_decay


def text(config: Config) -> str:
    """The schedule as a clause to print."""
    o = config.optimizer
    rising = f"up to {o.peak_lr:g} in {o.warmup_steps:,} steps"
    if o.schedule == "constant":
        return f"constant: {rising}"
    return f"{o.schedule}: {rising}, from step {config.decay_begins:,} down to {o.final_lr:g}"
