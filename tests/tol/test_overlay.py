"""Subtracting a key from rows."""

import jax
import numpy as np
from lab import OPTIMISED

from memoryllm_jax.tol.overlay import without_key


def test_a_key_is_subtracted_with_the_same_bits_on_the_host_and_in_a_compiled_function():
    rng = np.random.default_rng(0)
    y_UD, coefficients_U, value_D = (rng.standard_normal(shape, np.float32) for shape in ((64, 256), 64, 256))
    compiled = jax.jit(without_key, compiler_options=OPTIMISED)  # else no product and difference would be fused
    found = without_key(y_UD, coefficients_U, value_D)
    np.testing.assert_array_equal(compiled(y_UD, coefficients_U, value_D), found)
    exact = y_UD.astype(float) - coefficients_U[:, None].astype(float) * value_D
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)
