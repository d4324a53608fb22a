"""AdamW (the paper's Table 3), and the global-norm clipping usual for Llama."""

import jax
import optax

from memoryllm_jax.config import Config
from memoryllm_jax.training import schedules


def decay_mask(params) -> dict:
    """Which parameters get weight decay: True for matrices and embeddings, False for norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make(config: Config) -> optax.GradientTransformation:
    """The optimizer of a run. AdamW's settings are the paper's; clipping is not given in the paper."""
    o = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(schedules.learning_rate(config), o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decay_mask),
    )
