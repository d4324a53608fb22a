"""Trained models with weights that are changed by hand, so that the result of an analysis is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis.key_values import KeyValueModel, Sizes

LENGTH = 16  # tokens of a window
# None of these sizes divides what it cuts, so that every loop has several rounds and an incomplete last one.
SMALL = Sizes(tokens=100, neighbours=300, positions=3 * LENGTH, removals=20 * LENGTH, logits=512 * 7)

# Ids of the tokens that the weights below are set for.
FIRES = 60  # the one token that keys fire on
HEARD = 61  # what a value says
DENIED = 62  # what minus a value says
SPOKEN = 63  # what another value says
TWIN = 64  # twice the embedding of the token TWIN + 1


@functools.cache
def key_value_model(workdir: str) -> KeyValueModel:
    """The model of a checkpoint, opened once, because a checkpoint takes a second to read."""
    return KeyValueModel.open(workdir, sizes=SMALL)


def changed(workdir: str, change, keep_weights: bool = False) -> KeyValueModel:
    """A copy of the model in which `change` has set weights.

    Args:
      change: a function that gets the parameters as NumPy arrays, those of layers stacked, and changes them in place.
      keep_weights: it gets the model's own weights; by default it gets small random weights.
    """
    model = key_value_model(workdir)
    draw = np.random.default_rng(0)
    params = {}
    for group, tree in model.params.items():
        if isinstance(tree, list):
            tree = jax.tree.map(lambda *layers: np.stack(layers), *tree)
        params[group] = jax.tree.map(np.array, tree)
    if not keep_weights:
        params = jax.tree.map(lambda x: (0.3 * draw.standard_normal(x.shape)).astype(np.float32), params)
    change(params)
    for group in ("layers", "memory"):
        if group in params:
            stacked = params[group]
            params[group] = [jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(model.config.layers)]
    return KeyValueModel(model.trained, jax.tree.map(jnp.asarray, params), SMALL)


def unit(x):
    """Vectors of unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def quiet(params):
    """Sets attention and FFNs to zero, the scales of norms to one, and rows of the output embedding to unit length."""
    for group in ("layers", "memory"):
        for path, x in jax.tree_util.tree_leaves_with_path(params.get(group, {})):
            x[:] = 1 if path[-1].key == "scale" else 0
    params["final_norm"]["scale"][:] = 1
    params["head"][:] = unit(params["head"])


def one_token_keys(params, group):
    """Sets two keys of layer 1 to fire on the token FIRES alone.

    Key 3 fires with c > 0, and its value says HEARD. Key 4 fires with c < 0, and minus its value says DENIED.
    """
    quiet(params)
    # FIRES is the only token whose embedding has a first coordinate, and keys 3 and 4 read nothing else.
    params["embedding"][:, 0] = 0
    params["embedding"][FIRES] = 4 * np.eye(32)[0]
    params["embedding"][TWIN] = 2 * params["embedding"][TWIN + 1]
    ffn, head = params[group]["ffn"], params["head"]
    ffn["gate"][:, 0, 3:5] = 1
    ffn["up"][1, 0, 3] = 1  # in layer 0 the two keys never fire
    ffn["up"][1, 0, 4] = -0.5
    ffn["down"][:, 3] = head[HEARD]
    ffn["down"][:, 4] = -head[DENIED]
    # The keys from 5 on read the other coordinates and add little, so that tokens other than FIRES have rows too.
    ffn["gate"][:, 1:, 5:] = 0.1
    ffn["up"][:, 1:, 5:] = np.random.default_rng(1).normal(size=ffn["up"][:, 1:, 5:].shape)
    ffn["down"][:, 5:] = 1e-3 * np.random.default_rng(2).normal(size=ffn["down"][:, 5:].shape)
