"""Losses and log-probabilities of chunks of logits."""

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax import config
from memoryllm_jax.model import loss, sharding


def test_ids_that_pad_the_vocabulary_have_no_share():
    rng = np.random.default_rng(0)
    x, head, targets = rng.normal(size=(2, 7, 4)), rng.normal(size=(10, 4)), rng.integers(0, 8, (2, 7))
    head[8:] *= 9
    logits = x @ head[:8].T
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    with jax.set_mesh(sharding.make_mesh(config.MeshConfig(2, 1, 1), jax.devices()[:2])):
        found = loss.log_probs(*map(jnp.float32, (x, head)), jnp.int32(targets), loss.Options(8, 0.0, 3, "float32"))
    np.testing.assert_allclose(found[0], np.take_along_axis(expected, targets[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(found[1], logits.argmax(-1) == targets)
