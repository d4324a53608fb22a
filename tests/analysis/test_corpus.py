import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from memoryllm_jax.analysis import corpus
from memoryllm_jax.common.errors import UserError


@pytest.mark.parametrize("architecture", ["base", "memory", "flex-3"])
def test_states_are_those_of_the_equations(in_numpy, architecture):
    trained = in_numpy(architecture)
    seen = [[] for _ in range(trained.config.layers)]
    for tokens_BT, _, is_real in trained.text.open(trained.model):
        for layer, state in enumerate(corpus.states(trained.model, tokens_BT)):
            seen[layer].append(jax.tree.map(lambda a, is_real=is_real: np.asarray(a)[is_real], state))
    queries, residuals, outputs = trained.states
    for layer, parts in enumerate(seen):
        state = jax.tree.map(lambda *parts: np.concatenate(parts), *parts)
        np.testing.assert_allclose(state.residual_ND, residuals[layer], rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(state.output_ND, outputs[layer], rtol=2e-4, atol=2e-4)
        assert state.queries.keys() == queries[layer].keys()
        for name, q in queries[layer].items():
            np.testing.assert_allclose(state.queries[name], q, rtol=2e-4, atol=2e-4)
    # The equations in NumPy themselves give the logits of the independent reference.
    p = trained.p
    stacked = {k: jax.tree.map(lambda *a: jnp.stack(a), *p[k]) for k in ("layers", "memory") if k in p}
    logits = trained.says(outputs[-1]).reshape(*trained.windows.shape, -1)
    np.testing.assert_allclose(
        logits, reference.logits(p | stacked, trained.windows, trained.config), rtol=1e-4, atol=1e-4
    )


def test_text_that_is_read_is_verified(token_keys, copied):
    shard = next(copied.glob("train-*.bin"))
    shard.write_bytes(bytes(200) + shard.read_bytes()[200:])
    with pytest.raises(UserError, match=rf"{shard.name}: checksum differs"):
        corpus.CorpusOptions(str(copied), length=8, limit=8).open(token_keys)
