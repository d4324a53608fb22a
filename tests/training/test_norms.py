"""Norms of gradients by part and layer. What layers add is compared in tests/model/test_transformer.py."""

import numpy as np
import optax
import pytest

from memoryllm_jax.training import norms


def test_gradients_by_part_and_layer():
    draw = np.random.default_rng(0).normal
    layers = {
        "attention": {"q": draw(size=(3, 4, 2, 2)), "q_norm": {"scale": draw(size=(3, 2))}},
        "attention_norm": {"scale": draw(size=(3, 4))},
        "ffn": {"up": draw(size=(3, 4, 6))},
    }
    grads = {"layers": layers, "memory": {"table": draw(size=(3, 8, 2))}, "head": draw(size=(8, 4))}
    found = norms.of_gradients(grads, 3)
    for layer in range(3):
        of_attention = (
            layers["attention"]["q"],
            layers["attention"]["q_norm"]["scale"],
            layers["attention_norm"]["scale"],
        )
        together = np.concatenate([x[layer].ravel() for x in of_attention])
        assert found["attention"][layer] == pytest.approx(np.linalg.norm(together))
        assert found["ffn"][layer] == pytest.approx(np.linalg.norm(layers["ffn"]["up"][layer]))
        assert found["memory"][layer] == pytest.approx(np.linalg.norm(grads["memory"]["table"][layer]))
    assert {name: norm.shape for name, norm in found.items()}["head"] == ()
    assert sum(np.square(norm).sum() for norm in found.values()) == pytest.approx(optax.tree.norm(grads) ** 2)


def test_norms_that_are_not_finite_are_not_recorded():
    """JSON has no NaN."""
    assert norms.record({"gradient": {"ffn": np.array([1 / 3, 2.0]), "head": np.array(1e-9)}}) == {
        "gradient": {"ffn": [0.333333, 2.0], "head": 1e-9}
    }
    assert norms.record({"gradient": {"ffn": np.array([np.nan, 2.0])}}) is None
