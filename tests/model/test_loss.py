"""Losses and log-probabilities that are computed in chunks, against the same without chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.config import MeshConfig
from memoryllm_jax.model import loss, sharding


def test_weights_multiply_and_padding_adds_nothing():
    """50 positions in chunks of 16, so that the last chunk is padded. bfloat16 stays near float32."""
    options = loss.Options(32, z_loss=0.1, chunk=16, dtype="float32", softcap=0.0)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    x, head = jax.random.normal(jax.random.key(0), (1, 50, 8)), jax.random.normal(jax.random.key(1), (32, 8))
    targets = jax.random.randint(jax.random.key(2), (1, 50), 0, 32)
    weights = jnp.asarray(np.arange(50) % 3, jnp.float32)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def sums(x, dtype):
        return loss.cross_entropy(x.astype(dtype), head, targets, weights, options._replace(dtype=dtype))

    with jax.set_mesh(mesh):
        total, nll = sums(x, "float32")
        rough, _ = sums(x, "bfloat16")
    logits = x @ head.T
    lse = jax.nn.logsumexp(logits, -1)
    each = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, (each * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(total, ((each + 0.1 * lse**2) * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(rough, total, rtol=1e-2)


def test_ids_that_pad_the_vocabulary_get_no_probability():
    rng = np.random.default_rng(0)
    x, head, targets = rng.normal(size=(2, 7, 4)), rng.normal(size=(10, 4)), rng.integers(0, 8, (2, 7))
    head[8:] *= 9  # padding, whose logits would be large
    logits = x @ head[:8].T
    options = loss.Options(8, z_loss=0.0, chunk=3, dtype="float32", softcap=0.0)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 1, 1), jax.devices()[:2])):
        found = loss.log_probs(*map(jnp.float32, (x, head)), jnp.int32(targets), options)
    np.testing.assert_allclose(found.log_probs, np.take_along_axis(expected, targets[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(found.is_likeliest, logits.argmax(-1) == targets)
