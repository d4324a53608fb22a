"""The model and its train step against a direct evaluation of the design's equations, and against PyTorch."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import loss, sharding
from memoryllm_jax.model.token_memory import take_rows
from memoryllm_jax.training import loop, optimizer
from memoryllm_jax.training.batches import SizeAgreement, TrainBatches, place
from memoryllm_jax.training.step import Trainer


def trainer_and_batch(config, devices=1, step=0):
    dataset = Dataset(config.data.path)
    config = loop.complete(config, dataset)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    trainer = Trainer(config, mesh)
    batches = TrainBatches(config, dataset, trainer.shards, list(range(trainer.shards)))
    batch = batches[step]
    size = SizeAgreement(batches.sizes(), mesh).size(batch.distinct)
    placed = place(batch, size, trainer.batch_sharding, config.model)
    windows = np.concatenate([batches._rows(step, k)[0] for k in range(trainer.shards)])
    return trainer, placed, windows, config


def gradients(params, trainer, batch):
    """((loss with z-loss, loss), gradient) as the train step makes them."""
    with jax.set_mesh(trainer.mesh):
        return jax.tree.map(np.asarray, jax.jit(trainer._gradients)(params, batch))


def assert_close(a, b, relative):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
        assert error < relative, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    "architecture, overrides",
    [
        ("base", {}),
        ("memory", {"model.tie_embeddings": True}),
        ("flex-3", {"accumulate": 2}),
        ("flex-1", {"model.compute_input": "after_attention", "model.norm": "layernorm", "model.remat": "full"}),
        ("memory", {"model.unique_tokens": False, "model.attention": "plain", "model.remat": "none"}),
        ("value-0", {"model.kv_heads": 2}),
        ("ple-3", {}),
        ("no-memory-3", {"model.remat": "none"}),
    ],
)
def test_loss_and_gradients_equal_the_plain_equations(make_config, architecture, overrides):
    config = make_config(architecture, **{"seq_len": 150, "optimizer.z_loss": 1e-2, **overrides})
    trainer, batch, windows, config = trainer_and_batch(config)
    params = trainer.init(jax.random.key(1))["params"]
    # Norm scales of one would hide a norm that is applied twice or not at all.
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(lambda p: p + 0.3 * jnp.std(p) * jax.random.normal(next(keys), p.shape) + 0.01, params)
    (total, _), grads = gradients(params, trainer, batch)
    expected_total, expected = jax.jit(jax.value_and_grad(lambda p: reference.loss(p, windows, config)))(params)
    assert total == pytest.approx(float(expected_total), rel=2e-6)
    assert_close(grads, expected, 2e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_unique_tokens_change_nothing(make_config, accumulate):
    """Value and gradient of FFN-M on distinct ids against FFN-M on every position, in one batch that repeats ids."""
    results = []
    for unique in (True, False):
        config = make_config("flex-3", **{"model.unique_tokens": unique, "accumulate": accumulate})
        trainer, batch, _, config = trainer_and_batch(config)
        results.append(gradients(trainer.init(jax.random.key(0))["params"], trainer, batch))
        assert (batch.ids_SU.shape[1] < config.batch_size * config.seq_len) == unique
    (losses, grads), (plain_losses, plain_grads) = results
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-6)
    assert_close(grads, plain_grads, 1e-5)


def test_accumulation_weighs_tokens_not_micro_batches(make_config):
    """Two micro-batches, one with a tenth of its weights, against one batch of both."""
    results = []
    for accumulate in (1, 2):
        trainer, batch, _, _ = trainer_and_batch(make_config("flex-3", accumulate=accumulate))
        weights = np.ones(batch.weights_SAN.size, np.float32)
        weights[: weights.size // 2] *= np.arange(weights.size // 2) % 10 == 0
        weights = jax.device_put(weights.reshape(batch.weights_SAN.shape), trainer.batch_sharding)
        params = trainer.init(jax.random.key(0))["params"]
        results.append(gradients(params, trainer, batch._replace(weights_SAN=weights)))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
    assert_close(results[1][1], results[0][1], 1e-5)


def test_more_distinct_ids_than_planned_take_a_larger_size(make_config):
    """Sizes end with all there can be; at the vocabulary's size all ids are evaluated. Each gives the same gradient."""
    trainer, batch, _, config = trainer_and_batch(make_config("memory"))
    params = trainer.init(jax.random.key(0))["params"]
    dataset = Dataset(config.data.path)
    batches = TrainBatches(config, dataset, 1, [0])
    sizes = batches.sizes()
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(256, dataset.vocab_size) and len(sizes) > 1
    host = batches[0]
    agreement = SizeAgreement(sizes, trainer.mesh)
    assert agreement.size(sizes[0]) == sizes[0] and agreement.size(sizes[0] + 1) == sizes[1]
    _, expected = gradients(params, trainer, batch)
    for size in (sizes[-1], dataset.vocab_size):
        larger = place(host, size, trainer.batch_sharding, config.model)
        assert larger.ids_SU.shape == (1, size)
        assert_close(gradients(params, trainer, larger)[1], expected, 1e-6)


def test_bfloat16_stays_near_float32(make_config):
    results = []
    for dtype in ("float32", "bfloat16"):
        trainer, batch, _, _ = trainer_and_batch(make_config("flex-3", **{"model.dtype": dtype}))
        params = trainer.init(jax.random.key(0))["params"]
        results.append(gradients(params, trainer, batch))
    (losses, grads), (rough_losses, rough_grads) = results
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(rough_grads))
    np.testing.assert_allclose(rough_losses, losses, rtol=1e-3)
    assert_close(rough_grads, grads, 5e-2)
    assert not np.array_equal(rough_grads["head"], grads["head"])  # it did compute in bfloat16


def test_frequent_rows_sum_their_gradient_in_float32():
    """4,096 positions of one token, each with gradient 1 + 1/128: a bf16 sum would stop growing at 256.

    XLA's CPU sums bf16 in float32 of its own accord, so the dtype that other devices are asked for is read too.
    """

    rows = jnp.ones((1, 2, 4), jnp.bfloat16)
    index = jnp.zeros((1, 4096), jnp.int32)
    _, vjp = jax.vjp(lambda r: take_rows(r, index), rows)
    grad = vjp(jnp.full((1, 4096, 4), 1 + 1 / 128, jnp.bfloat16))[0]
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad[0, 0], jnp.full(4, 4096 * (1 + 1 / 128), jnp.bfloat16))
    np.testing.assert_array_equal(grad[0, 1], 0)
    asked = str(jax.make_jaxpr(vjp)(jnp.ones((1, 4096, 4), jnp.bfloat16)))
    assert re.findall(r"(\w+)\[[\d,]+\] = scatter-add", asked) == ["f32"], asked


def test_base_is_llama_in_pytorch(make_config):
    torch = pytest.importorskip("torch", reason="the independent side is PyTorch")
    transformers = pytest.importorskip("transformers", reason="the independent side is Hugging Face transformers")
    trainer, _, windows, config = trainer_and_batch(make_config("base", seq_len=140))
    m = config.model
    params = trainer.init(jax.random.key(3))["params"]
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=m.dim,
            intermediate_size=m.ffn_dim,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            vocab_size=m.vocab_size,
            rms_norm_eps=m.norm_eps,
            rope_theta=m.rope_theta,
            tie_word_embeddings=False,
        )
    )
    p = jax.tree.map(np.asarray, params)
    state = {"model.embed_tokens.weight": p["embedding"], "lm_head.weight": p["head"]}
    state["model.norm.weight"] = p["final_norm"]["scale"]
    for i in range(m.layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        prefix = f"model.layers.{i}."
        for name in "qkv":
            state[f"{prefix}self_attn.{name}_proj.weight"] = layer["attention"][name].reshape(m.dim, -1).T
        state[f"{prefix}self_attn.o_proj.weight"] = layer["attention"]["out"].reshape(-1, m.dim).T
        for name in ("gate", "up", "down"):
            state[f"{prefix}mlp.{name}_proj.weight"] = layer["ffn"][name].T
        state[f"{prefix}input_layernorm.weight"] = layer["attention_norm"]["scale"]
        state[f"{prefix}post_attention_layernorm.weight"] = layer["ffn_norm"]["scale"]
    llama.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in state.items()})
    with torch.no_grad():
        expected = llama(torch.tensor(windows[:, :-1].astype(np.int64))).logits.numpy()
    ids = windows[:, :-1].reshape(1, -1).astype(np.int32)
    with jax.set_mesh(trainer.mesh):
        rows = trainer.model.apply({"params": params}, ids, method="token_rows")
        index = np.arange(ids.size)[None]
        hidden = trainer.model.apply({"params": params}, rows, index, config.seq_len, method="hidden")
    np.testing.assert_allclose(hidden @ params["head"].T, expected, atol=2e-6)


@pytest.mark.slow
def test_remat_recomputes(make_config):
    """Temporary memory falls from keeping all, to matrix products, to block inputs."""
    memory = []
    for policy in ("none", "dots", "full"):
        config = make_config("flex-3", **{"model.remat": policy, "model.layers": 8, "seq_len": 128})
        trainer, batch, _, _ = trainer_and_batch(config)
        compiled = trainer.train.lower(trainer.state_shape, batch).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert memory[0] > 1.1 * memory[1] > 1.2 * memory[2], memory


def test_logits_never_exist_whole(make_config):
    """No array of the compiled step has as many elements as the logits of all positions."""
    config = make_config("memory", **{"model.loss_chunk": 16, "seq_len": 128})
    trainer, batch, _, config = trainer_and_batch(config)
    text = trainer.train.lower(trainer.state_shape, batch).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"[a-z]\w*\[([\d,]+)\]", text)}
    V = config.model.vocab_size
    with_vocabulary = {s for s in shapes if V in s}
    assert (1, 16, V) in with_vocabulary or (16, V) in with_vocabulary  # the pattern finds logits at all
    assert max(int(np.prod(s)) for s in with_vocabulary) < config.batch_size * config.seq_len * V / 2


def test_loss_of_positions_without_weight(make_config):
    """Weights multiply; padding a chunk adds nothing; bf16 stays near float32."""
    mesh = sharding.make_mesh(make_config().mesh, jax.devices()[:1])
    x, head = jax.random.normal(jax.random.key(0), (1, 50, 8)), jax.random.normal(jax.random.key(1), (32, 8))
    targets = jax.random.randint(jax.random.key(2), (1, 50), 0, 32)
    weights = jnp.asarray(np.arange(50) % 3, jnp.float32)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def sums(x, dtype):
        return loss.cross_entropy(x.astype(dtype), head, targets, weights, loss.Options(head.shape[0], 0.1, 16, dtype))

    with jax.set_mesh(mesh):
        total, nll = sums(x, "float32")
        rough, _ = sums(x, "bfloat16")
    logits = x @ head.T
    lse = jax.nn.logsumexp(logits, -1)
    each = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, (each * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(total, ((each + 0.1 * lse**2) * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(rough, total, rtol=1e-2)


def test_learning_rate_and_decay_follow_the_recipe(make_config):
    config = make_config(steps=100, **{"optimizer.peak_lr": 1e-3, "optimizer.final_lr": 1e-4})
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=10))
    rate = optimizer.schedule(config)
    assert [float(rate(s)) for s in (0, 9, 99)] == pytest.approx([1e-4, 1e-3, 1e-4])
    assert float(rate(54)) == pytest.approx((1e-3 + 1e-4) / 2)  # half way down the cosine
    params = {
        "layers": {"norm": {"scale": jnp.ones(3)}, "ffn": {"up": jnp.ones((3, 3))}},
        "embedding": jnp.ones((2, 3)),
    }
    tx = optimizer.make(config)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["layers"]["ffn"]["up"], -1e-4 * 0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["embedding"], -1e-4 * 0.1, rtol=1e-5)
    np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], 0)


def test_gradients_are_clipped_by_their_global_norm(make_config):
    tx = optimizer.make(make_config())
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    for size, kept in ((30.0, 1.0), (0.5, 0.5)):
        grads = {"a": jnp.full(3, size / 7**0.5), "b": jnp.full(4, size / 7**0.5)}
        _, state = tx.update(grads, tx.init(params), params)
        moment = np.concatenate(jax.tree.leaves(state[1][0].mu))
        assert np.linalg.norm(moment) == pytest.approx(0.1 * kept, rel=1e-5)  # (1 - b1) of the gradient
