"""Pruning methods against plain NumPy, and SparseGPT against the loop of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from lab import CONTEXT, stacked

from memoryllm_jax.data import dataset
from memoryllm_jax.experiments import sparsity
from memoryllm_jax.experiments.sparsity import Pattern


def some_matrix(inputs=160, outputs=24, samples=300):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, inputs)) * rng.gamma(1.0, size=inputs) @ rng.normal(size=(inputs, inputs))
    return np.float32(rng.normal(size=(inputs, outputs))), np.float32(x)


def sparsegpt_by_column(w_OI, gram, zeros_of):
    """SparseGPT as its paper derives it: column after column, each with the inverse Hessian of the columns left.

    zeros_of: (w, column) -> mask of the column's weights to set to zero.
    """
    w, gram = w_OI.astype(np.float64), gram.astype(np.float64)
    gram = gram + sparsity.DAMPING * gram.diagonal().mean() * np.eye(len(gram))
    for column in range(w.shape[1]):
        inverse = np.linalg.inv(gram[column:, column:])
        gone = zeros_of(w, column)
        error = np.where(gone, w[:, column], 0) / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0]
        w[gone, column] = 0
    return w


def test_each_method_sets_its_weakest_weights_to_zero():
    w, x = some_matrix()
    gram, pattern = jnp.asarray(x.T @ x), Pattern(0.25)
    pruned = np.asarray(sparsity.prune_matrix(jnp.asarray(w), gram, "magnitude", pattern))
    assert (np.abs(w[pruned == 0]).max() < np.abs(w[pruned != 0]).min()) and (pruned == 0).mean() == 0.25
    pruned = np.asarray(sparsity.prune_matrix(jnp.asarray(w), gram, "wanda", pattern))
    score = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
    for column in range(w.shape[1]):
        gone = pruned[:, column] == 0
        assert gone.mean() == 0.25 and score[gone, column].max() < score[~gone, column].min()
    for method in sparsity.METHODS:
        pruned = np.asarray(sparsity.prune_matrix(jnp.asarray(w), gram, method, Pattern(0.5, 4)))
        assert ((pruned.T.reshape(w.shape[1], -1, 4) == 0).sum(-1) == 2).all()
        if method != "sparsegpt":
            assert (pruned[pruned != 0] == w[pruned != 0]).all()


@pytest.mark.parametrize("pattern", [Pattern(0.5, 4), Pattern(0.5)])
def test_sparsegpt_is_the_loop_of_its_paper(pattern):
    """Masks are chosen for every four columns, or for every block of 128; it loses less than the other methods."""
    w, x = some_matrix()
    gram, chosen, step = x.T @ x, {}, pattern.group or sparsity.BLOCK
    diagonal = sparsity.inverse_factor(gram).diagonal()

    def zeros_of(w, column):
        first = column - column % step
        if column == first:
            score = np.square(w[:, first : first + step] / diagonal[first : first + step])
            rows = score if pattern.group else score.reshape(1, -1)
            lowest = np.argsort(np.argsort(rows, -1), -1) < round(pattern.sparsity * rows.shape[1])
            chosen[first] = lowest.reshape(score.shape)
        return chosen[first][:, column - first]

    expected = sparsegpt_by_column(w.T, gram, zeros_of).T
    found = {
        m: np.asarray(sparsity.prune_matrix(jnp.asarray(w), jnp.asarray(gram), m, pattern)) for m in sparsity.METHODS
    }
    np.testing.assert_allclose(found["sparsegpt"], expected, atol=2e-3)
    lost = {method: np.linalg.norm(x @ (w - pruned)) for method, pruned in found.items()}
    assert lost["sparsegpt"] < 0.8 * min(lost["wanda"], lost["magnitude"])


def test_layers_are_calibrated_on_the_outputs_of_pruned_layers(lab):
    with lab.model("base", devices=2) as model:
        config, mesh = model.config, model.trained.mesh
        params = model.trained.load(lambda _: True)
        windows = dataset.Dataset(lab.data_path).train.read(0, 20 * CONTEXT).reshape(20, CONTEXT)
        half = sparsity.prune(config, params, mesh, windows, "wanda", Pattern(0.5))
    matrices = [params["layers"][0][module] for module in ("attention", "ffn")]
    # Half of the weights of two layers are as many as one layer has.
    assert sparsity.nonzeros(half) == sum(w.size for w in jax.tree.leaves(matrices))
    # The reference model with only its first layer pruned gives the second layer's inputs.
    second = stacked(params | {"layers": [half["layers"][0], params["layers"][1]]})
    seen = []

    def swiglu(x, p):
        seen.append(x.reshape(-1, x.shape[-1]))
        return swiglu_before(x, p)

    swiglu_before, reference.swiglu = reference.swiglu, swiglu
    try:
        reference.logits(second, windows, config)
    finally:
        reference.swiglu = swiglu_before
    w, ffn = params["layers"][1]["ffn"]["up"], half["layers"][1]["ffn"]["up"]
    score = np.abs(w) * np.linalg.norm(seen[1], axis=0)[:, None]
    gone = np.asarray(ffn) == 0
    assert all(score[g, k].max() <= 1.001 * score[~g, k].min() for k, g in enumerate(gone.T))
