"""What the compilers of accelerators make of the train step, ahead of time and without such a chip."""

import hlo
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common import config_files
from memoryllm_jax.config import MeshConfig, resolve
from memoryllm_jax.model import attention, sharding
from memoryllm_jax.training import chips, plan


@pytest.mark.parametrize("architecture", ["flex-3", "memory"])
def test_1b_trains_on_one_h100(chip_devices, architecture):
    """It fits with micro-batches, and copies no weight to pad it. FFN-C is 2,046 wide, FFN-M 3,418 or 5,464."""
    c = config_files.load(f"configs/1b.py:{architecture}")
    c.model.vocab_size, c.accumulate = 128_253, 128
    mesh = sharding.make_mesh(c.mesh, chip_devices("h100"))
    step = plan.LoweredStep(resolve(c), mesh).compile()
    assert step.memory["total"] < chips.get("h100").memory
    padded = hlo.results(step.executable.as_text(), "pad")
    assert not [kind for kind in padded if kind.startswith("bf16")]


def test_long_contexts_on_a_tpu_need_little_workspace(chip_devices):
    """One kernel for all of splash's backward pass would hold a copy of the queries' gradients for every 512 keys."""
    mesh = sharding.make_mesh(MeshConfig(), chip_devices("v5e"))
    x = jax.ShapeDtypeStruct((1, 32768, 2, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        backward = jax.jit(lambda q, k, v, g: jax.vjp(attention.splash, q, k, v)[1](g))
        stats = backward.lower(x, x, x, x).compile().memory_analysis()
    assert stats.temp_size_in_bytes < 10 * x.size * x.dtype.itemsize
