"""What an accelerator computes, against other ways to compute the same: these tests run on any one device.

    JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu -n 0 tests/gpu

On a CPU they test the kernels that replace the accelerator's there. A GPU may round float32 products to TF32, so bounds
are those of ten-bit mantissas. What is measured goes into the record of benchmarks/gpu.py.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from lab import random_params, some_tokens, step_logits, written

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.config import MeshConfig
from memoryllm_jax.data import document_starts
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import attention, sharding
from memoryllm_jax.training import loop
from memoryllm_jax.training.batches import TrainBatches, place
from memoryllm_jax.training.step import Trainer

pytestmark = pytest.mark.gpu


def relative_error(a, b) -> float:
    """||a - b|| / ||b||."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def mesh():
    return sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.mark.parametrize("head_dim, in_documents", [(60, False), (64, False), (100, False), (64, True)])
def test_attention_and_its_gradients_are_plain_attention(mesh, record_property, head_dim, in_documents):
    """The device's own kernel in bfloat16, with the head sizes of the paper's models, against float32."""
    backend = attention.resolve_backend("auto", "bfloat16", head_dim)
    expected = {"gpu": "cudnn", "tpu": "splash", "cpu": "blocked"}
    assert backend == expected[jax.default_backend()]  # not a slower one that runs everywhere
    length = 128 if backend == "blocked" else 2048
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(4, 2, length, 4, head_dim))
    inputs = jnp.asarray(drawn, jnp.bfloat16)
    start_BT = document_starts.starts(rng.random((2, length)) < 1 / 60, True) if in_documents else None

    def forward_and_backward(kernel):
        def run(inputs):
            q, k, v, g = inputs
            out, vjp = jax.vjp(kernel, q, k, v)
            return out, *vjp(g)

        return jax.jit(run)

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        kernel = functools.partial(attention.causal_attention, backend=backend, start_BT=start_BT)
        found = forward_and_backward(kernel)(inputs)
        exact = forward_and_backward(functools.partial(attention.plain, start_BT=start_BT))(inputs.astype(jnp.float32))
    errors = dict(zip(("out", "dq", "dk", "dv"), map(relative_error, found, exact)))
    record_property("errors", errors)
    assert max(errors.values()) < 1e-2, errors


def test_widths_that_are_no_multiples_of_8_change_nothing(data_path, make_config, mesh, record_property):
    """A first loss by the equations, on parameters without padding."""
    c = make_config("flex-3", **{"model.dim": 36, "model.heads": 3, "model.ffn_dim": 110, "model.dtype": "float32"})
    dataset = Dataset(data_path)
    c = loop.complete(c, dataset)
    assert c.model.compute_dim % 8 and c.model.head_dim % 8
    trainer = Trainer(c, mesh)
    placed, whole = random_params(c.model, mesh)
    batches = TrainBatches(c, dataset, 1, [0])
    windows = batches.windows([(0, 0)])[0].ids
    batch = place(batches[0], batches.sizes().most, trainer.batch_sharding)
    total, weight = trainer.evaluate(placed, batch)

    def by_the_equations(params, windows):
        p = jax.nn.log_softmax(reference.logits(params, windows[:, :-1], c.model))
        return -jnp.take_along_axis(p, windows[:, 1:, None], -1).mean()

    with jax.default_matmul_precision("highest"):
        expected = float(jax.jit(by_the_equations)(whole, windows))
    error = abs(float(total / weight) / expected - 1)
    record_property("error", error)
    assert error < 1e-3


def test_steps_in_bfloat16_are_those_in_float32(data_path, make_config, mesh, record_property):
    dataset = Dataset(data_path)
    found = {}
    for dtype in ("float32", "bfloat16"):
        c = loop.complete(make_config("flex-3", **{"model.dtype": dtype}), dataset)
        trainer = Trainer(c, mesh)
        state = trainer.init(jax.random.key(0))
        batches = TrainBatches(c, dataset, 1, [0])
        found[dtype] = []
        for step in range(3):
            batch = place(batches[step], batches.sizes().most, trainer.batch_sharding)
            state, metrics = trainer.train(state, batch)
            found[dtype].append((float(metrics["loss"]), float(metrics["grad_norm"])))
    loss, grad_norm = map(float, abs(np.array(found["bfloat16"]) / np.array(found["float32"]) - 1).max(0))
    record_property("errors", {"loss": loss, "grad_norm": grad_norm})
    assert loss < 5e-3 and grad_norm < 3e-2, found
    assert found["float32"][2][0] < found["float32"][0][0] - 0.01  # it trained


def test_rows_of_a_file_give_the_logits_of_live_rows(lab, record_property):
    """Wherever the file's rows are, the same bits; live rows come from products of other shapes, and may round."""
    tokens, prompts = some_tokens(24), [some_tokens(n, seed=n) for n in (9, 12)]
    tol = lab.tol("flex-3", bits="16")
    logits, texts = {}, {}
    for place_ in ("live", "device", "disk"):
        where = () if place_ == "live" else (tol, place_)
        with lab.model("flex-3", *where, dtype="bfloat16") as model:
            logits[place_] = step_logits(model.decoder, model.rows, tokens, first=20)
            texts[place_] = written(model, prompts)
    np.testing.assert_array_equal(logits["disk"], logits["device"])
    assert texts["disk"] == texts["device"]
    error = relative_error(logits["device"], logits["live"])
    record_property("error", error)
    record_property("text", "same" if texts["device"] == texts["live"] else "differs")
    assert error < 2e-2


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make_config, tmp_path, record_property):
    """A GPU sums in an order that may differ from run to run. How much that changes is recorded."""
    if jax.default_backend() == "cpu":
        pytest.skip("tests/training/test_loop.py asks for the same bits on a CPU")
    config = make_config("flex-3", **{"checkpoint.every": 2, "checkpoint.keep": 10})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir in (whole, parts):
        assert loop.train(config, str(workdir), jax.devices()[:1]) == 0
    repeated = difference(whole, parts)
    shutil.rmtree(parts / "4")  # as if the run had been killed after the checkpoint of step 2
    assert loop.train(config, str(parts), jax.devices()[:1]) == 0
    resumed = difference(whole, parts)
    record_property("errors", {"repeated": repeated, "resumed": resumed})
    assert resumed < 1e-2 and repeated < 1e-2


def difference(one, other) -> float:
    """The largest relative error of a parameter between the newest checkpoints of two workdirs."""
    models = [TrainedModel(str(workdir)) for workdir in (one, other)]
    errors = [relative_error(*(model.leaf_on_host(name) for model in models)) for name in models[0].names()]
    for model in models:
        model.close()
    return max(errors)
