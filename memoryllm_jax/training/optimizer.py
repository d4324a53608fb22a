"""AdamW (the paper's Table 3) or Muon with AdamW, and the global-norm clipping usual for Llama.

With `optimizer.train=memory` all of this sees the parameters of the token memory alone: gradients, their norm and its
clipping, moments, updates and weight decay. The other parameters are frozen.
"""

import math
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from memoryllm_jax.config import Config
from memoryllm_jax.model import transformer
from memoryllm_jax.training import muon, schedules


def decay_mask(params) -> dict:
    """Which parameters get weight decay: True for matrices and embeddings, False for norm scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def trained(config: Config, params: dict) -> dict:
    """The part of a tree of parameters, or of anything by parameter, that the run trains (`optimizer.train`)."""
    return params if config.optimizer.train == "all" else {"memory": params["memory"]}


def make(config: Config, params, mesh: Mesh) -> optax.GradientTransformation:
    """The optimizer of a run. AdamW's settings are the paper's; clipping is not given in the paper.

    Args:
      params: abstract parameters that are trained, with their shardings, as stored.
    """
    o = config.optimizer
    rate = schedules.learning_rate(config)
    update = optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decay_mask)
    if o.name == "muon":
        of_muon = muon.make(config, muon.matrices(config, params, mesh), schedules.learning_rate(config, o.muon_lr))
        labels = jax.tree_util.tree_map_with_path(lambda path, _: "muon" if muon.is_matrix(path) else "adamw", params)
        update = optax.partition({"muon": of_muon, "adamw": update}, labels)
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), update)


class Group(NamedTuple):
    """Parameters that are trained alike.

    Attributes:
      what: muon or adamw, and which parameters; or frozen.
      arrays: number of arrays. Those of the layers are stacked, so the count does not depend on the depth.
      parameters: number of parameters, without padding.
      peak_lr, weight_decay: of the group.
    """

    what: str
    arrays: int
    parameters: int
    peak_lr: float
    weight_decay: float

    @property
    def text(self) -> str:
        """The group as a line to print."""
        size = f"{self.what}: {self.parameters:,} parameters in {self.arrays} arrays"
        if self.what == "frozen":
            return size
        return f"{size}, peak rate {self.peak_lr:g}, weight decay {self.weight_decay:g}"


def groups(config: Config, device: jax.Device) -> list[Group]:
    """The groups of parameters that `make` trains alike, and the frozen ones; each with at least one parameter."""
    o = config.optimizer
    kinds = {
        "muon, matrices of the layers": (o.muon_lr, o.muon_weight_decay),
        "adamw, embeddings and head": (o.peak_lr, o.weight_decay),
        "adamw, matrices and embeddings": (o.peak_lr, o.weight_decay),
        "adamw, scales of norms": (o.peak_lr, 0.0),
        "frozen": (0.0, 0.0),
    }
    params = transformer.unpadded_params(config.model, device)
    parts = trained(config, params)

    def kind(path, decays: bool) -> str:
        if path[0].key not in parts:
            return "frozen"
        if not decays:
            return "adamw, scales of norms"
        if o.name == "adamw":
            return "adamw, matrices and embeddings"
        return "muon, matrices of the layers" if muon.is_matrix(path) else "adamw, embeddings and head"

    sizes: dict[str, list[int]] = {}
    leaves, decays = jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(decay_mask(params))
    for (path, leaf), decay in zip(leaves, decays, strict=True):
        sizes.setdefault(kind(path, decay), []).append(math.prod(leaf.shape))
    return [Group(what, len(sizes[what]), sum(sizes[what]), *kinds[what]) for what in kinds if what in sizes]
