"""The paper's optimizer: weight decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryllm_jax.training import optimizer


def test_matrices_decay_and_norm_scales_do_not(make_config):
    config = make_config(**{"optimizer.peak_lr": 1e-4, "optimizer.warmup_steps": 1})
    params = {
        "layers": {"norm": {"scale": jnp.ones(3)}, "ffn": {"up": jnp.ones((3, 3))}},
        "embedding": jnp.ones((2, 3)),
    }
    tx = optimizer.make(config, params, None)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["layers"]["ffn"]["up"], -1e-4 * 0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["embedding"], -1e-4 * 0.1, rtol=1e-5)
    np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], 0)


def test_gradients_are_clipped_by_their_global_norm(make_config):
    tx = optimizer.make(make_config(), None, None)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    for size, kept in ((30.0, 1.0), (0.5, 0.5)):
        grads = {"a": jnp.full(3, size / 7**0.5), "b": jnp.full(4, size / 7**0.5)}
        _, state = tx.update(grads, tx.init(params), params)
        moment = np.concatenate(jax.tree.leaves(state[1][0].mu))
        assert np.linalg.norm(moment) == pytest.approx(0.1 * kept, rel=1e-5)  # (1 - b1) of the gradient
