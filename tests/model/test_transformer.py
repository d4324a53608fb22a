"""Loss and gradients of the train step against tests/reference.py, and settings that must not change them."""

import functools
import re

import jax
import numpy as np
import pytest
import reference
from lab import random_params

from memoryllm_jax.model import bigrams, sharding
from memoryllm_jax.training.batches import Batch
from memoryllm_jax.training.step import Trainer

VOCAB = 64
WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (8, 33))


def batch_of(windows, accumulate=1, unique=True, weights=None, padding=0, start=None, by_bigram=False):
    """The windows as a batch of one shard, with its distinct token ids or, unless `unique`, one id for each position.

    Args:
      weights: one for each predicted position; by default 1.
      padding: number of ids that pad the distinct ids.
      start: where the document of each predicted position begins, or None.
      by_bigram: whether its ids are distinct bigrams, with the rows that these read.
    """
    ids, index = windows[:, :-1].reshape(-1), np.arange(windows[:, :-1].size)
    row_ids_SU = None
    if by_bigram:
        ids, row_ids, index = bigrams.distinct(ids, bigrams.row_ids(windows[:, :-1], VOCAB).reshape(-1))
        row_ids_SU = np.pad(row_ids, (0, padding))[None]
    elif unique:
        ids, index = np.unique(ids, return_inverse=True)
    weights = np.ones(index.size) if weights is None else weights
    by_micro_batch = [x.reshape(1, accumulate, -1) for x in (index, windows[:, 1:], weights)]
    index_SAN, targets_SAN, weights_SAN = by_micro_batch
    ids_SU = np.pad(ids, (0, padding))[None]
    start_SAN = None if start is None else np.int32(start.reshape(1, accumulate, -1))
    positions = np.int32(index_SAN), np.int32(targets_SAN), np.float32(weights_SAN)
    return Batch(np.int32(ids_SU), *positions, start_SAN, row_ids_SU)


def gradients(config, batch):
    """The train step's losses and gradients on the config's mesh. The gradients of padding must be zero.

    Returns: (`Losses`, gradients without padding, parameters without padding).
    """
    devices = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    placed, whole = random_params(config.model, mesh)
    with jax.set_mesh(mesh):
        losses, grads = jax.jit(Trainer(config, mesh)._gradients)(placed, batch)
    for name, stored, true in leaves(grads, whole):
        padding = np.ones(stored.shape, bool)
        padding[tuple(map(slice, true.shape))] = False
        assert not stored[padding].any(), name
    cut = jax.tree.map(lambda g, true: np.asarray(g)[tuple(map(slice, true.shape))], grads, whole)
    return losses, cut, whole


def leaves(a, b):
    """Yields (name, leaf of a, leaf of b) of two trees of one structure."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        yield jax.tree_util.keystr(path), np.asarray(x), np.asarray(y)


def assert_close(a, b, relative):
    """Compares two trees leaf by leaf, by the norm of the difference relative to that of b."""
    for name, x, y in leaves(a, b):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
        assert error < relative, (name, error)


@pytest.fixture
def make(make_config):
    return functools.partial(make_config, **{"model.vocab_size": VOCAB, "mesh.fsdp": 1, "optimizer.z_loss": 1e-2})


@pytest.mark.parametrize(
    "architecture, overrides",
    [
        (
            "base",
            {"model.dim": 48, "model.heads": 8, "model.kv_heads": 4, "mesh.tensor": 4, "model.vocab_size": VOCAB + 1}
            | {"model.qk_norm": True, "model.logit_softcap": 0.3, "log.norms_every": 1},
        ),
        (
            "memory",
            {"model.tie_embeddings": True, "model.remat": "none", "model.rows": "permuted", "log.norms_every": 1},
        ),
        (
            "flex-1",
            {"model.compute_input": "after_attention", "model.norm": "layernorm", "model.remat": "full"}
            | {"model.dim": 30, "model.heads": 3, "model.qk_norm": True, "mesh.tensor": 2, "data.document_mask": True},
        ),
        ("value-0", {"model.kv_heads": 2, "accumulate": 2, "data.document_mask": True, "model.rows": "shared"}),
        ("ple-3", {"log.norms_every": 1}),
        ("bigram-3", {"accumulate": 2, "log.norms_every": 1}),
        ("bov-3", {"model.kv_heads": 2, "model.layers": 3, "log.norms_every": 1, "mesh.tensor": 2}),
        ("rows-8", {"log.norms_every": 1, "model.dim": 30, "model.heads": 3, "mesh.tensor": 2}),
        ("flex-3", {"model.rows": "frozen", "model.attention": "plain", "data.document_mask": True}),
    ],
)
def test_loss_and_gradients_are_those_of_the_equations(make, architecture, overrides):
    """With a document mask, half of the sequences hold two documents each, which the equations take one by one."""
    config = make(architecture, **overrides)
    start, expected_loss = None, functools.partial(reference.loss, windows=WINDOWS, config=config)
    if config.data.document_mask:
        start = np.zeros((8, 32))
        start[:4, 16:] = 16
        documents = np.concatenate([WINDOWS[:4, :17], WINDOWS[:4, 16:]])

        def expected_loss(p):
            return (reference.loss(p, documents, config) + reference.loss(p, WINDOWS[4:], config)) / 2

    batch = batch_of(WINDOWS, config.accumulate, padding=3, start=start, by_bigram=architecture == "bigram-3")
    (total, _, norms), grads, params = gradients(config, batch)
    expected_total, expected = jax.jit(jax.value_and_grad(expected_loss))(params)
    assert total == pytest.approx(float(expected_total), rel=2e-6)
    assert_close(grads, expected, 2e-5)
    if config.log.norms_every:
        added = []
        reference.logits(params, WINDOWS[:, :-1], config.model, added)
        for part in added[0]:
            mean_squares = [(np.float64(layer[part]) ** 2).sum(-1).mean() for layer in added]
            np.testing.assert_allclose(norms.pop(part), np.sqrt(mean_squares), rtol=2e-6, err_msg=part)
    assert not norms


@pytest.fixture(scope="module")
def one_batch_many_ways(make_config):
    """run(**ways) -> `gradients` of one flex model and batch.

    In the first half of the positions, only each tenth has a weight.
    """
    weights = np.ones(WINDOWS[:, 1:].size)
    weights[: len(weights) // 2] *= np.arange(len(weights) // 2) % 10 == 0

    @functools.cache
    def run(accumulate=1, unique=True, dtype="float32", padding=0):
        overrides = {"model.vocab_size": VOCAB, "mesh.fsdp": 1, "model.dtype": dtype, "accumulate": accumulate}
        batch = batch_of(WINDOWS, accumulate, unique, weights, padding)
        return gradients(make_config("flex-3", **overrides), batch)[:2]

    return run


def test_evaluating_each_distinct_token_once_changes_nothing(one_batch_many_ways):
    """The batch repeats ids. FFN-M runs on its distinct ids or on every position."""
    losses, grads = one_batch_many_ways(accumulate=2)
    plain_losses, plain_grads = one_batch_many_ways(accumulate=2, unique=False)
    np.testing.assert_allclose(losses[:2], plain_losses[:2], rtol=1e-6)
    assert_close(grads, plain_grads, 1e-5)


def test_accumulation_weighs_tokens_not_micro_batches(one_batch_many_ways):
    """The first of the two micro-batches has a tenth of the second's weight."""
    losses, grads = one_batch_many_ways(accumulate=2)
    whole_losses, whole_grads = one_batch_many_ways()
    np.testing.assert_allclose(losses[:2], whole_losses[:2], rtol=1e-6)
    assert_close(grads, whole_grads, 1e-5)


def test_padding_of_distinct_ids_changes_nothing(one_batch_many_ways):
    assert_close(one_batch_many_ways(padding=9)[1], one_batch_many_ways()[1], 1e-6)


def test_bfloat16_stays_near_float32(one_batch_many_ways):
    losses, grads = one_batch_many_ways()
    rough_losses, rough_grads = one_batch_many_ways(dtype="bfloat16")
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(rough_grads))
    np.testing.assert_allclose(rough_losses[:2], losses[:2], rtol=1e-3)
    assert_close(rough_grads, grads, 5e-2)
    assert not np.array_equal(rough_grads["head"], grads["head"])  # it did compute in bfloat16


def compiled(config, windows=WINDOWS):
    """The compiled loss and gradients of a step."""
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    with jax.set_mesh(trainer.mesh):
        return jax.jit(trainer._gradients).lower(trainer.params_shape, batch_of(windows)).compile()


def test_remat_saves_memory(make):
    """Temporary memory falls from keeping everything, to keeping matrix products, to keeping the layers' inputs."""
    windows = np.random.default_rng(0).integers(0, VOCAB, (8, 129))
    memory = []
    for policy in ("none", "dots", "full"):
        config = make("base", **{"model.remat": policy, "model.layers": 8, "seq_len": 128})
        memory.append(compiled(config, windows).memory_analysis().temp_size_in_bytes)
    assert memory[0] > 1.1 * memory[1] > 1.2 * memory[2], memory


def test_logits_never_exist_whole(make):
    """No array of the compiled step has as many elements as the logits of all positions."""
    V = 104
    config = make("memory", **{"model.vocab_size": V, "model.loss_chunk": 16})
    text = compiled(config).as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"[a-z]\w*\[([\d,]+)\]", text)}
    with_vocabulary = {s for s in shapes if V in s}
    assert (1, 16, V) in with_vocabulary or (16, V) in with_vocabulary  # the pattern finds logits at all
    assert max(int(np.prod(s)) for s in with_vocabulary) < WINDOWS[:, 1:].size * V / 2
