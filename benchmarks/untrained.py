"""A checkpoint of an untrained model of any size, for measurements whose speed does not depend on the values.

    python benchmarks/untrained.py --config=configs/1b.py:memory --data=DIR --workdir=DIR

It holds parameters, no optimizer, so that 1b fits 24 GB of memory; `precompute` and `generate` read it as any other.
"""

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common import legacy
from memoryllm_jax.config import MeshConfig, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.training import loop


def main():
    dataset = Dataset(flags.FLAGS.data)
    config = loop.complete(resolve(flags.FLAGS.config), dataset)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes = transformer.abstract_params(transformer.LanguageModel(config.model), mesh)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def draw(number, path, shape):
        if path[-1].key == "scale":
            return jnp.ones(shape.shape, shape.dtype, device=shape.sharding)
        std = jnp.float32(config.model.init_std)
        key = jax.random.key(number, impl="rbg")
        return jax.jit(lambda: std * jax.random.normal(key, shape.shape), out_shardings=shape.sharding)()

    params = jax.tree.unflatten(tree, [draw(i, path, shape) for i, (path, shape) in enumerate(leaves)])
    checkpoints = store.Checkpoints(flags.FLAGS.workdir)
    checkpoints.save(0, {"params": params}, store.describe(config, dataset, dataset.tokenizer()))
    checkpoints.wait()
    checkpoints.close()


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/SIZE.py:ARCHITECTURE; override as --config.FIELD=VALUE")
    flags.DEFINE_string("data", None, "prepared data, for its tokenizer", required=True)
    flags.DEFINE_string("workdir", None, "folder for the checkpoint", required=True)
    flags.mark_flag_as_required("config")
    legacy.run(main)
