"""Training that starts from a model: from the same architecture, and from base converted to memory or flex."""

import contextlib
import shutil

import jax
import numpy as np
import pytest
import reference
from lab import GOLDEN, loss_on, random_params, write_untrained

from memoryllm_jax.checkpoint import warm_start
from memoryllm_jax.checkpoint.digest import array_name
from memoryllm_jax.checkpoint.reader import Reader
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import config_files
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.hf.import_ import import_model
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.tol import compress, serving
from memoryllm_jax.training import loop


@pytest.mark.parametrize("name, tensor", [("memory", 1), ("flex-3", 3)])
def test_converted_ffns_add_up_to_that_of_base(make_config, data_path, tmp_path, name, tensor):
    """For the same input. All other parameters are base's; and so on a mesh that pads heads and widths."""
    dataset = Dataset(data_path)
    workdir = write_untrained(make_config("base"), str(tmp_path / "base"))
    with contextlib.closing(TrainedModel(workdir)) as trained:
        base = {n: np.asarray(trained.leaf(n)) for n in trained.names()}

    config = make_config(name, **{"start.workdir": workdir, "mesh.fsdp": 1, "mesh.tensor": tensor})
    config = loop.complete(config, dataset)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:tensor])
    m = config.model
    params = warm_start.starting_params(config, dataset.tokenizer(), random_params(m, mesh)[0], mesh).params
    found = {array_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    x = np.random.default_rng(0).normal(size=(7, m.dim)).astype(np.float32)

    def ffn(params, where, layer):
        return reference.swiglu(x, {part: params[f"{where}/ffn/{part}"][layer] for part in ("gate", "up", "down")})

    for layer in range(m.layers):
        halves = [ffn(found, where, layer) for where in ("layers", "memory") if f"{where}/ffn/up" in found]
        np.testing.assert_allclose(sum(halves), ffn(base, "layers", layer), atol=1e-5)
    np.testing.assert_array_equal(found["memory/norm/scale"], base["layers/ffn_norm/scale"])
    np.testing.assert_array_equal(found["embedding"][: m.vocab_size], base["embedding"])
    np.testing.assert_array_equal(found["layers/attention/q"][:, :, : m.heads], base["layers/attention/q"])

    shards = [shard for x in jax.tree.leaves(params) for shard in x.addressable_shards]
    buffers = {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in shards}
    assert len(buffers) == len(shards)  # a training step donates every buffer, so none may occur twice


def test_a_new_memory_keeps_its_initial_values(make_config, data_path, tmp_path):
    dataset = Dataset(data_path)
    workdir = write_untrained(make_config("base"), str(tmp_path / "base"))
    config = loop.complete(make_config("flex-3", **{"start.workdir": workdir, "start.memory": "new"}), dataset)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    fresh = random_params(config.model, mesh)[0]
    params = warm_start.starting_params(config, dataset.tokenizer(), fresh, mesh).params
    jax.tree.map(np.testing.assert_array_equal, params["memory"], fresh["memory"])
    assert not np.array_equal(params["layers"]["ffn"]["up"], fresh["layers"]["ffn"]["up"])


@pytest.fixture
def start(lab, data_path):
    """start(architecture, source): a run of one step that starts from a workdir, by default lab's memory model."""

    def make(architecture="memory", source="", **overrides):
        c = config_files.load(f"configs/start.py:{architecture}@{source or lab.workdir('memory')}")
        c.steps, c.optimizer.warmup_steps, c.batch_size, c.seq_len, c.log.tensorboard = 1, 0, 8, 32, False
        c.data.path, c.optimizer.peak_lr, c.optimizer.final_lr = data_path, 1e-9, 0.0
        c.update_from_flattened_dict(overrides)
        return resolve(c)

    return make


def test_an_adapter_begins_as_base(make_config, start, data_path, tmp_path):
    """The same bits, on a mesh that pads heads and widths; here with one row for all tokens."""
    dataset = Dataset(data_path)
    workdir = write_untrained(make_config("base"), str(tmp_path / "base"))
    fields = {"mesh.fsdp": 1, "mesh.tensor": 3, "model.rows": "shared"}
    config = loop.complete(start("adapter", workdir, **fields), dataset)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:3])
    fresh = random_params(config.model, mesh)[0]
    params = warm_start.starting_params(config, dataset.tokenizer(), fresh, mesh).params
    with contextlib.closing(TrainedModel(workdir, None, "float32", mesh)) as trained:
        base = {name: trained.leaf(name) for name in trained.names()}
        of_base = trained.config

    def hidden(config, params):
        model = transformer.LanguageModel(config)
        ids = jax.numpy.arange(32)[None]

        @jax.jit
        def compute(params):
            rows = model.apply({"params": params}, ids, method="token_rows")
            return model.apply({"params": params}, rows, ids, 32, method="hidden")

        with jax.set_mesh(mesh):
            return np.asarray(compute(params))

    memory = params.pop("memory")
    assert memory["table"].shape == (2, 513, 32) and not memory["table"].any()
    found = {array_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    jax.tree.map(np.testing.assert_array_equal, found, base)
    np.testing.assert_array_equal(hidden(config.model, params | {"memory": memory}), hidden(of_base, params))


@pytest.mark.usefixtures("shared_trainers")
def test_an_adapter_trains_its_rows_alone_and_becomes_one_tol(lab, start, data_path, tmp_path):
    fields = {"steps": 2, "checkpoint.every": 1, "optimizer.peak_lr": 1e-2, "optimizer.max_skipped": 1}
    config, workdir = start("adapter", lab.workdir("base"), **fields), str(tmp_path / "adapter")
    assert loop.train(config, workdir, jax.devices()[:1]) == 0

    def arrays():
        with contextlib.closing(Reader(workdir)) as reader:
            return dict(reader.arrays(2, dict.fromkeys(reader.description(2).digests)))

    whole = arrays()
    with contextlib.closing(TrainedModel(lab.workdir("base"))) as base:
        for name in base.names():
            np.testing.assert_array_equal(whole[f"params/{name}"], base.leaf_on_host(name))
    assert whole["params/memory/table"].any()
    moments = [name for name in whole if name.startswith("opt_state") and not name.endswith("count")]
    assert len(moments) == 2 and all(name.endswith("memory/table") for name in moments)

    shutil.rmtree(f"{workdir}/2")
    assert loop.train(config, workdir, jax.devices()[:1]) == 0
    jax.tree.map(np.testing.assert_array_equal, arrays(), whole)

    again = loop.complete(start("adapter", workdir), Dataset(data_path))
    assert again.optimizer.train == "memory"
    mesh = sharding.make_mesh(again.mesh, jax.devices()[:1])
    fresh = random_params(again.model, mesh)[0]
    kept = warm_start.starting_params(again, Dataset(data_path).tokenizer(), fresh, mesh).params
    for path, found in jax.tree_util.tree_leaves_with_path(kept):
        np.testing.assert_array_equal(found, whole[f"params/{array_name(path)}"])

    tol = str(tmp_path / "adapter.safetensors")
    compress.precompute(workdir, tol, compress.Options())
    losses = []
    for lookups in ("", tol):
        with contextlib.closing(serving.open_engine(workdir, lookups)) as engine:
            losses.append(loss_on(engine, data_path))
    assert losses[0] == losses[1]


def test_ffn_c_of_a_conversion_reads_what_the_ffn_of_base_reads(lab, start):
    assert start("flex-3", lab.workdir("base")).model.compute_input == "after_attention"


def test_models_and_workdirs_that_do_not_fit_are_refused(start, tmp_path):
    import_model(f"{GOLDEN}/base", str(tmp_path / "imported"))
    for config, target, message in (
        (start("flex-1"), "a", "config.model.beta: expected 0.0 as in .*, found 1.0"),
        (start(**{"model.dim": 64}), "b", "config.model.dim: expected 32 as in .*, found 64"),
        (start(source=f"{tmp_path}/imported", **{"model.vocab_size": 512}), "c", "model.vocab_size: expected 64 as in"),
        (
            start(**{"start.memory": "distill", "start.distill_tokens": 9.0}),
            "d",
            "start.memory: expected copy, .*, found distill",
        ),
        (start(), "imported", "expected a folder of a training run, found an imported model"),
    ):
        with pytest.raises(UserError, match=message):
            loop.train(config, str(tmp_path / target), jax.devices()[:1])
    with pytest.raises(UserError, match=r"expected base, beside whose FFNs .* found memory"):
        warm_start.starting_params(start("adapter"), None, {}, None)
