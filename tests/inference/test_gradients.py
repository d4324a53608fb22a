"""Gradients with respect to rows against jax.grad through tests/reference.py, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import reference
from lab import all_layers, random_decoder


def test_gradients_of_rows_are_those_of_the_equations(make_config):
    m = make_config("flex-3", **{"model.vocab_size": 64}).model
    decoder, source, params = random_decoder(m, (2, 1, 1))
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 64, (2, 4, 16)).astype(np.int32)
    weights = rng.random((4, 16), np.float32)
    distinct, index = np.unique(ids, return_inverse=True)
    rows = all_layers(source.fetch(distinct.astype(np.int32)))
    found = decoder.row_gradients(rows, index.reshape(ids.shape).astype(np.int32), targets, weights, {1})

    def loss(down_LFD):
        memory = params["memory"] | {"ffn": params["memory"]["ffn"] | {"down": down_LFD}}
        log_probs = jax.nn.log_softmax(reference.logits(params | {"memory": memory}, ids, m))
        taken = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        return -(weights * taken).sum(), taken

    (of_down, taken) = jax.jit(jax.grad(loss, has_aux=True))(params["memory"]["ffn"]["down"])
    # A row is the sum of coefficient * value, so that a value's gradient is the sum of coefficient * the row's.
    p = jax.tree.map(lambda x: x[1], params["memory"])
    x = reference.norm(params["embedding"][distinct], p["norm"]["scale"], m)
    coefficients_UF = jax.nn.silu(x @ p["ffn"]["gate"]) * (x @ p["ffn"]["up"])
    assert found.by_layer.keys() == {1}
    expected = np.asarray(of_down[1])
    np.testing.assert_allclose(coefficients_UF.T @ found.by_layer[1], expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(found.scores.log_probs, taken, atol=2e-5)
