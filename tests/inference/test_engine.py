"""FFN contributions of an engine against the equations, live and looked up."""

import jax
import jax.numpy as jnp
import pytest
import reference
from lab import CONTEXT, TOKENS, loss_on, stacked

from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.data import dataset
from memoryllm_jax.inference.engine import Contribution


def by_equations(model, path, memory_L, compute_L):
    """The loss by tests/reference.py, with W_down of each layer's FFN-M and FFN-C multiplied by a factor."""
    params = stacked(model.trained.load(lambda _: True))
    for group, factors in (("layers", compute_L), ("memory", memory_L)):
        if "ffn" in params.get(group, {}):
            params[group]["ffn"]["down"] *= jnp.float32(factors)[:, None, None]
    ids = dataset.Dataset(path).validation.read(0, TOKENS + 1)
    logits = reference.logits(params, ids[:-1].reshape(-1, CONTEXT), model.config)
    log_probs = jax.nn.log_softmax(logits.reshape(TOKENS, -1))
    return -float(log_probs[jnp.arange(TOKENS), ids[1:]].mean())


# {architecture: [(contribution, factors of FFN-M by layer, factors of FFN-C or base's FFN by layer), ...]}
CASES = {
    "base": [
        (Contribution(alpha=0.5), (1, 1), (0.5, 0.5)),
        (Contribution(alpha=0.7, drop_layers=(1,)), (1, 1), (0.7, 0)),
    ],
    "memory": [(Contribution(alpha=0.8, drop_layers=(0,)), (0, 0.8), (1, 1))],
    "flex-3": [
        (Contribution(alpha=0.9, drop_compute=(1,)), (0.9, 0.9), (1, 0)),
        (Contribution(alpha_compute=0.6, drop_layers=(1,)), (1, 0), (0.6, 0.6)),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_contributions_are_those_of_the_equations_live_and_looked_up(lab, name):
    engines = [((), 2)] if name == "base" else [((), 2), ((lab.tol(name), "disk", 4096), 1)]
    for arguments, devices in engines:
        with lab.model(name, *arguments, devices=devices) as model:
            before = loss_on(model, lab.data_path)
            for contribution, memory, compute in CASES[name]:
                model.contribute(contribution)
                found = loss_on(model, lab.data_path)
                expected = by_equations(model, lab.data_path, memory, compute)
                assert found == pytest.approx(expected, rel=2e-6) and abs(found - before) > 1e-4
            model.contribute(Contribution())
            assert loss_on(model, lab.data_path) == before


@pytest.mark.parametrize(
    "name, contribution, message",
    [
        ("base", Contribution(alpha_compute=0.5), "alpha_compute: expected a flex model, found base"),
        ("memory", Contribution(drop_compute=(1,)), "drop_compute: expected a flex model, found memory"),
        ("memory", Contribution(alpha=-1.0), "alpha: expected a number of zero or more, found -1"),
        ("flex-3", Contribution(drop_layers=(2,)), "drop_layers: expected layers from 0 to 1, found 2"),
    ],
)
def test_contributions_that_do_not_fit_the_model_are_refused(lab, name, contribution, message):
    with pytest.raises(ArgumentError, match=message):
        contribution.factors(lab.config(name))


def test_stop_ids_are_the_named_tokens_and_the_end_of_a_document(lab):
    with lab.model("base") as model:
        assert model.stop_ids(["#7"]) == {7, model.tokenizer.eos_id}
        with pytest.raises(UserError, match="stop: expected one token, found 'several words' = #"):
            model.stop_ids(["several words"])
