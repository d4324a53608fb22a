import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import unit

from memoryllm_jax.analysis import composition


def test_active_memories_hold_the_mass():
    c_NF = np.zeros((2, 88), np.float32)
    c_NF[0, 5:15], c_NF[1, 7] = -3, 1
    norms = np.ones(88, np.float32)
    assert composition.active_count(c_NF, norms, 0.85).tolist() == [9, 1]
    norms[5] = 1000  # now one memory of the first query adds nearly all
    assert composition.active_count(c_NF, norms, 0.85).tolist() == [1, 1]


def test_active_memories_are_counted_in_float32():
    c_NF = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3000)), jnp.bfloat16)
    found = composition.active_count(c_NF, jnp.ones(3000, jnp.bfloat16), 0.9)
    expected = composition.active_count(c_NF.astype(jnp.float32), np.ones(3000, np.float32), 0.9)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("architecture, kind", [("memory", "memory"), ("flex-3", "compute")])
def test_active_memories_of_a_trained_model(in_numpy, run, architecture, kind):
    trained = in_numpy(architecture)
    shares = run("active", trained.model, text=trained.text, ffn=kind, mass=0.7)["percent_active"]
    ffn = trained.ffn(kind, 1)
    size = -np.sort(-np.abs(trained.c(trained.asked(kind, 1), ffn)) * np.linalg.norm(ffn["down"], axis=1))
    fewest = (size.cumsum(1) < 0.7 * size.sum(1, keepdims=True)).sum(1) + 1
    assert shares["mean"][1] == pytest.approx(100 * fewest.mean() / size.shape[1], rel=1e-3)


def test_a_prediction_that_no_memory_has_is_composed(in_numpy, run):
    trained = in_numpy("flex-3")
    rows = run("compose", trained.model, text=trained.text)["percent_by_layer"]
    queries, residuals, outputs = trained.states
    for layer, row in enumerate(rows):
        top_y = trained.says_unit(outputs[layer] - residuals[layer]).argmax(-1)
        composed = np.ones(len(top_y), bool)
        for kind, q in queries[layer].items():
            ffn = trained.ffn(kind, layer)
            added = np.sign(trained.c(q, ffn))[:, :, None] * unit(ffn["down"])
            composed &= (trained.says(32**0.5 * added).argmax(-1) != top_y[:, None]).all(1)
        assert row["composed"] == pytest.approx(100 * composed.mean())
        rest = composition.stop_words(trained.model.texts)[top_y[~composed]]
        assert row["stop words of the rest"] == (pytest.approx(100 * rest.mean()) if len(rest) else None)


def test_stop_words_are_known_by_their_text():
    assert composition.stop_words(["␣the", "The", "␣cat", ",", "an"]).tolist() == [True, True, False, False, True]
