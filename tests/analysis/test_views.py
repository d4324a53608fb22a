import contextlib

import jax
import numpy as np
import pytest
from lab import GREEDY, write_untrained

from memoryllm_jax.analysis import views
from memoryllm_jax.tol import serving


def check_says(says, z_V):
    """Says against logits from NumPy."""
    p_V = np.asarray(jax.nn.softmax(z_V))
    assert says.ids == np.argsort(-z_V)[: len(says.ids)].tolist()
    np.testing.assert_allclose(says.p, p_V[says.ids], rtol=2e-3)
    return p_V


def check_keys(trained, keys, c_F, ffn):
    """Keys against the coefficients of all keys from NumPy."""
    size_F = np.abs(c_F) * np.linalg.norm(ffn["down"], axis=1)
    assert [key.key for key in keys] == np.argsort(-size_F)[: len(keys)].tolist()
    for key in keys:
        assert key.c == pytest.approx(c_F[key.key], rel=1e-3)
        assert key.share == pytest.approx(size_F[key.key] / size_F.sum(), rel=1e-3)
        check_says(key.says, trained.says_unit(np.sign(key.c) * ffn["down"][key.key]))


@pytest.mark.parametrize("architecture", ["memory", "flex-3"])
def test_a_token_is_seen_as_in_numpy(in_numpy, architecture):
    trained = in_numpy(architecture)
    seen = views.token(trained.model, trained.model, 300, 4, lambda done: None)
    for layer, found in enumerate(seen):
        ffn = trained.ffn("memory", layer)
        c_F = trained.c(trained.asked("memory", layer)[300:301], ffn)[0]
        assert found.norm == pytest.approx(np.linalg.norm(c_F @ ffn["down"]), rel=1e-3)
        check_says(found.says, trained.says_unit(c_F @ ffn["down"]))
        check_keys(trained, found.keys, c_F, ffn)


@pytest.mark.parametrize("architecture", ["base", "memory", "flex-3"])
def test_a_position_is_seen_as_in_numpy(in_numpy, architecture):
    trained, at = in_numpy(architecture), 6
    config = trained.config
    ids_T = trained.windows[0]
    done = []
    # Tokens after the position do not matter, and those before are not padded to it.
    seen = views.position(trained.model, trained.model, [*ids_T[: at + 1], 5, 6], at, 3, done.append)
    assert done == [0.25, 0.5]
    queries, residuals, outputs = trained.forward(ids_T[None])
    z_V = trained.says(outputs[-1][at])
    assert seen.final == z_V.argmax()
    x_D = trained.p["embedding"][ids_T[at]]
    for layer, found in enumerate(seen.layers):
        r_D, y_D = residuals[layer][at], outputs[layer][at]
        added = {"attention": r_D - x_D}
        for kind, q_ND in queries[layer].items():
            ffn = trained.ffn(kind, layer)
            c_F = trained.c(q_ND[at], ffn)
            added[kind] = c_F @ ffn["down"]
            if kind == "compute":
                check_keys(trained, found.keys, c_F, ffn)
        logits = {name: trained.says_unit(v_D) for name, v_D in added.items()}
        logits |= {"residual": trained.says(r_D), "output": trained.says(y_D)}
        assert found.parts.keys() == logits.keys()
        for name, z_V in logits.items():
            p_V = check_says(found.parts[name], z_V)
            assert found.parts[name].p_final == pytest.approx(p_V[seen.final], rel=2e-3)
        assert bool(found.keys) == (config.compute_dim > 0)
        x_D = y_D


@pytest.mark.parametrize("architecture", ["bov-3", "ple-3"])
def test_tables_have_norms_and_say_nothing(make_config, tmp_path, architecture):
    workdir = write_untrained(make_config(architecture), str(tmp_path / "w"))
    with contextlib.closing(serving.open_engine(workdir)) as engine:
        model = views.KeyValueModel(engine.trained, engine.params)
        seen = views.token(model, model, 300, 4, lambda done: None)
        row_D = np.asarray(engine.rows.fetch(np.array([300])).rows_LSUP[1])
        assert (seen[0].norm == 0) == (architecture == "bov-3")  # whose first layer looks up nothing
        assert seen[1] == views.TokenLayer(pytest.approx(np.linalg.norm(row_D), rel=1e-5), None, [])
        position = views.position(model, model, [1, 2, 300], 2, 3, lambda done: None)
        # The rows of ple-3 are gated and projected to the residual stream; those of bov-3 are a part of attention.
        assert ("memory" in position.layers[0].parts) == (architecture == "ple-3")
        (step,) = engine.generate([[1, 2, 300]], 1, GREEDY)
        assert step == [(0, position.final)]
