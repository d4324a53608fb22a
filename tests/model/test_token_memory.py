"""The gradients of rows that positions take."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.model.token_memory import take_rows


def test_frequent_rows_sum_their_gradient_in_float32():
    """4,096 positions share one row, each with gradient 1 + 1/128. A sum in bfloat16 would stop growing at 256.

    On a CPU, XLA sums bfloat16 in float32 anyway, so the test also reads the dtype of the sum in the traced function.
    """
    rows = jnp.ones((1, 2, 4), jnp.bfloat16)
    index = jnp.zeros((1, 4096), jnp.int32)
    _, vjp = jax.vjp(lambda r: take_rows(r, index), rows)
    grad = vjp(jnp.full((1, 4096, 4), 1 + 1 / 128, jnp.bfloat16))[0]
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad[0, 0], jnp.full(4, 4096 * (1 + 1 / 128), jnp.bfloat16))
    np.testing.assert_array_equal(grad[0, 1], 0)
    asked = str(jax.make_jaxpr(vjp)(jnp.ones((1, 4096, 4), jnp.bfloat16)))
    assert re.findall(r"(\w+)\[[\d,]+\] = scatter-add", asked) == ["f32"], asked
