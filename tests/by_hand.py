"""Trained models whose weights are then set by hand, so that the answer of an analysis is known."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.key_values import KeyValueModel, Sizes

LENGTH = 16  # of windows
# Sizes that divide nothing, so that every loop has several rounds and an incomplete last one.
SMALL = Sizes(tokens=100, neighbours=300, positions=3 * LENGTH, removals=20 * LENGTH, logits=512 * 7)
FIRES, HEARD, DENIED, SPOKEN, TWIN = 60, 61, 62, 63, 64  # token ids


@functools.cache
def opened(workdir: str) -> KeyValueModel:
    """A checkpoint takes a second to read, so the tests of a session share it."""
    return KeyValueModel(workdir, sizes=SMALL)


def changed(workdir: str, change, keep_weights: bool = False) -> KeyValueModel:
    """The model with small random weights, or its own, after `change`.

    Args:
      change: is given the parameters as NumPy arrays, those of layers stacked, and changes them in place.
    """
    model = copy.copy(opened(workdir))
    draw = np.random.default_rng(0)
    params = {}
    for group, tree in model.params.items():
        if isinstance(tree, list):
            tree = jax.tree.map(lambda *layers: np.stack(layers), *tree)
        params[group] = jax.tree.map(np.array, tree)
    if not keep_weights:
        params = jax.tree.map(lambda x: (0.3 * draw.standard_normal(x.shape)).astype(np.float32), params)
    change(params)
    model.__dict__.pop("head", None)  # which is cached
    for group in ("layers", "memory"):
        if group in params:
            stacked = params[group]
            params[group] = [jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(model.config.layers)]
    model.__dict__["params"] = jax.tree.map(jnp.asarray, params)  # which is cached too
    return model


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def quiet(params):
    """Attention and FFNs that add nothing, norms of one, an output embedding of unit rows."""
    for group in ("layers", "memory"):
        for path, x in jax.tree_util.tree_leaves_with_path(params.get(group, {})):
            x[:] = 1 if path[-1].key == "scale" else 0
    params["final_norm"]["scale"][:] = 1
    params["head"][:] = unit(params["head"])


def one_token_keys(params, group):
    """In layer 1, key 3 fires on FIRES alone and its value says HEARD; key 4 likewise, but with c < 0 and -DENIED."""
    quiet(params)
    params["embedding"][:, 0] = 0
    params["embedding"][FIRES] = 4 * np.eye(32)[0]
    params["embedding"][TWIN] = 2 * params["embedding"][TWIN + 1]
    ffn, head = params[group]["ffn"], params["head"]
    ffn["gate"][:, 0, 3:5] = 1
    ffn["up"][:, 0, 3], ffn["up"][:, 0, 4] = 1, -0.5
    ffn["down"][:, 3], ffn["down"][:, 4] = head[HEARD], -head[DENIED]
    ffn["up"][0] = 0
    ffn["gate"][:, 1:, 5:], ffn["up"][:, 1:, 5:] = 0.1, np.random.default_rng(1).normal(size=ffn["up"][:, 1:, 5:].shape)
    ffn["down"][:, 5:] = 1e-3 * np.random.default_rng(2).normal(size=ffn["down"][:, 5:].shape)
