"""AdamW with warm-up and cosine decay (the paper's Table 3), and the global-norm clipping usual for Llama."""

import jax
import optax

from memoryllm_jax.config import Config


def schedule(config: Config) -> optax.Schedule:
    """The learning rate of each step: linear to peak_lr over the warm-up, then a cosine to final_lr at the last step.

    Returns: a function of the number of steps done before the step.
    """
    o = config.optimizer
    # optax refuses a schedule without decay. A run that is shorter than its warm-up ends before the decay begins.
    last = max(config.steps, o.warmup_steps + 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, o.peak_lr, o.warmup_steps, last, o.final_lr)
    # rate(0) is zero, with which the first step would change nothing.
    return lambda steps_done: rate(steps_done + 1)


def decay_mask(params) -> dict:
    """Which parameters get weight decay: True for matrices and embeddings, False for norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make(config: Config) -> optax.GradientTransformation:
    """The optimizer of a run. AdamW's settings are the paper's; clipping is not given in the paper."""
    o = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(schedule(config), o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decay_mask),
    )
