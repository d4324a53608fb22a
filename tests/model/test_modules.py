"""The product of the layers, whose gradients are not those of autodiff."""

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.config import MeshConfig
from memoryllm_jax.model import modules, sharding


def test_gradients_of_weights_in_float32_are_rounded_nowhere():
    """The product itself and the gradient of its input are those of the weight in bfloat16."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(512, 16)), jnp.bfloat16) for _ in range(2))
    w = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        y, vjp = jax.vjp(jax.jit(modules.matmul), x, w)
        expected_y, expected_vjp = jax.vjp(jax.jit(modules.matmul), x, w.astype(jnp.bfloat16))
        (dx, dw), (expected_dx, rounded_dw) = vjp(g), expected_vjp(g)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(dx, expected_dx)
    exact = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    assert dw.dtype == jnp.float32 and np.abs(dw - exact).max() < 1e-4
    assert np.abs(np.asarray(rounded_dw, np.float64) - exact).max() > 1e-2
