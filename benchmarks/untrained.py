"""A checkpoint of an untrained model of any size, for measurements whose speed does not depend on the values.

    python benchmarks/untrained.py --config=configs/1b.py:memory --data=DIR --workdir=DIR

It holds parameters but no optimizer state, so that making 1b fits 24 GB of memory. `precompute` and `generate` read it
like any other checkpoint.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.description import describe
from memoryllm_jax.common import cli, config_files
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import Config, MeshConfig, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.training import loop


def main(
    data: Annotated[str, Option("prepared data, for its tokenizer")],
    workdir: Annotated[str, Option("folder for the checkpoint")],
) -> None:
    write(resolve(flags.FLAGS.config), Dataset(data), workdir)


def write(config: Config, dataset: Dataset, workdir: str) -> None:
    """Saves random parameters of a model as the checkpoint of step 0.

    Args:
      dataset: prepared data, for its tokenizer and number of ids.
      workdir: folder for the checkpoint.
    """
    config = loop.complete(config, dataset)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes = transformer.abstract_params(transformer.LanguageModel(config.model), mesh)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    drawn = [draw(number, path, shape, config.model.init_std) for number, (path, shape) in enumerate(leaves)]
    checkpoints = store.Checkpoints(workdir)
    state = {"params": jax.tree.unflatten(tree, drawn)}
    checkpoints.save(0, state, describe(config, dataset.digest, dataset.tokenizer()))
    checkpoints.wait()
    checkpoints.close()


def draw(number: int, path, shape: jax.ShapeDtypeStruct, std: float) -> jax.Array:
    """Draws a parameter: ones for the scale of a norm, else normal values.

    Args:
      number: of the parameter, which seeds its values.
      path: its path in the tree of parameters.
      shape: with the sharding that it gets.
      std: standard deviation.
    """
    if path[-1].key == "scale":
        return jnp.ones(shape.shape, shape.dtype, device=shape.sharding)
    key = jax.random.key(number, impl="rbg")  # much faster than the default generator for a billion values
    return jax.jit(lambda: jnp.float32(std) * jax.random.normal(key, shape.shape), out_shardings=shape.sharding)()


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/SIZE.py:ARCHITECTURE; override as --config.FIELD=VALUE")
    flags.mark_flag_as_required("config")
    cli.run(main, check=config_files.check_flags)
