"""Muon: its update against PyTorch's, on a mesh that splits, pads and replicates matrices; and what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memoryllm_jax.config import MeshConfig
from memoryllm_jax.model import flops, sharding, transformer
from memoryllm_jax.training import muon, optimizer

LAYERS = 9
PICKED = (("attention", "q"), ("attention", "out"), ("ffn", "down"))  # split over heads, over rows, and a tall matrix


def test_updates_are_those_of_pytorch_and_padding_stays_zero(make_config, monkeypatch):
    """Nine layers over four parts are three each with padding, which two replicas share as two and one."""
    torch = pytest.importorskip("torch")
    # PyTorch rounds to bfloat16 first, as a GPU does here. XLA for CPUs does not.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.float().clone())
    sizes = {"model.layers": LAYERS, "model.heads": 3, "model.dim": 30, "model.vocab_size": 64}
    config = make_config("flex-3", **sizes)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices())
    model = transformer.LanguageModel(config.model)
    stored = transformer.abstract_params(model, mesh, sharding.PRODUCT_MULTIPLE)
    whole = transformer.unpadded_params(config.model, jax.devices()[0])
    matrices = muon.matrices(config, stored, mesh)
    stored, whole, matrices = (
        {name: tree["layers"][part][name] for part, name in PICKED} for tree in (stored, whole, matrices)
    )
    tx = muon.make(config, matrices, lambda steps_done: 0.02 * (1 + steps_done))
    rng = np.random.default_rng(0)
    values = [{name: rng.normal(0, 0.1, x.shape).astype("f") for name, x in whole.items()} for _ in range(3)]

    def place(x, like):
        return jax.device_put(np.pad(x, [(0, b - a) for a, b in zip(x.shape, like.shape)]), like.sharding)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, *grads = (jax.tree.map(place, tree, stored) for tree in values)
    with jax.set_mesh(mesh):
        state = tx.init(params)
        for grad in grads:
            params, state = step(params, state, grad)
    for name, x in whole.items():
        of = matrices[name]
        found = np.array(params[name])
        kept = tuple(slice(n) for n in x.shape)
        expected = np.stack([in_pytorch(torch, [v[name][layer] for v in values], of) for layer in range(LAYERS)])
        np.testing.assert_allclose(found[kept], expected, atol=2e-6)
        found[kept] = 0
        assert not found.any()
    assert stored["q"].shape == (LAYERS, 30, 4, 10) and stored["down"].shape[1] % 16 == 0  # there is padding


def in_pytorch(torch, values, of: muon.Matrices) -> np.ndarray:
    """One layer's parameter after two steps of torch.optim.Muon; values are the parameter and its two gradients."""
    first, *grads = (torch.tensor(v.reshape(of.fan_in, of.fan_out).T.copy()) for v in values)
    weight = torch.nn.Parameter(first)
    theirs = torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, momentum=0.95)
    for number, grad in enumerate(grads, 1):
        theirs.param_groups[0]["lr"] = 0.02 * number
        weight.grad = grad
        theirs.step()
    return weight.detach().numpy().T.reshape(values[0].shape)


@pytest.mark.parametrize(
    "architecture, train", [("flex-3", "all"), ("flex-3", "memory"), ("ple-3", "all"), ("bov-3", "all")]
)
def test_groups_hold_each_parameter_once(make_config, architecture, train):
    # A plan is for devices whose kernel of attention this machine lacks.
    kernel = {"model.attention": "cudnn", "model.dtype": "bfloat16"}
    fields = {"model.vocab_size": 512, "optimizer.name": "muon", "optimizer.train": train}
    config = make_config(architecture, **kernel, **fields)
    counts = flops.parameters(config)
    groups = {group.what: group for group in optimizer.groups(config, jax.devices()[0])}
    assert sum(group.parameters for group in groups.values()) == counts["total"]
    matrices = 0
    if train == "all":
        matrices = counts["attention"] + counts["ffn_c"] + counts["gates"]
        assert "frozen" not in groups
    else:
        assert groups["frozen"].parameters == counts["total"] - counts["memory"]
    if architecture == "flex-3":
        matrices += 3 * config.model.layers * config.model.dim * config.model.memory_dim
    of_muon = groups["muon, matrices of the layers"]
    assert (of_muon.parameters, of_muon.peak_lr, of_muon.weight_decay) == (matrices, 0.02, 0.1)
    assert groups["adamw, scales of norms"].weight_decay == 0
