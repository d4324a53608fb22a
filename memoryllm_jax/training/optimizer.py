"""AdamW (the paper's Table 3) or Muon with AdamW, and the global-norm clipping usual for Llama."""

import jax
import optax
from jax.sharding import Mesh

from memoryllm_jax.config import Config
from memoryllm_jax.training import muon, schedules


def decay_mask(params) -> dict:
    """Which parameters get weight decay: True for matrices and embeddings, False for norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make(config: Config, params, mesh: Mesh) -> optax.GradientTransformation:
    """The optimizer of a run. AdamW's settings are the paper's; clipping is not given in the paper.

    Args:
      params: abstract parameters with their shardings, as stored.
    """
    o = config.optimizer
    rate = schedules.learning_rate(config)
    update = optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decay_mask)
    if o.name == "muon":
        of_muon = muon.make(config, muon.matrices(config, params, mesh), schedules.learning_rate(config, o.muon_lr))
        labels = jax.tree_util.tree_map_with_path(lambda path, _: "muon" if muon.is_matrix(path) else "adamw", params)
        update = optax.partition({"muon": of_muon, "adamw": update}, labels)
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), update)
