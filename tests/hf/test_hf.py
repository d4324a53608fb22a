"""In and out of Hugging Face's layout: against transformers, against golden logits, and bit by bit."""

import base64
import contextlib
import dataclasses
import filecmp
import functools
import itertools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from lab import GOLDEN
from safetensors.numpy import load_file, save_file

from memoryllm_jax import config as config_lib
from memoryllm_jax.checkpoint import warm_start
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import MeshConfig, default, resolve
from memoryllm_jax.data import dataset, documents, tokenizer_conversion
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.shards import prepare
from memoryllm_jax.hf import export, tensor_names
from memoryllm_jax.hf.config_json import from_json, to_json
from memoryllm_jax.hf.import_ import import_
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model import sharding, transformer
from memoryllm_jax.tol import compress, serving
from memoryllm_jax.training import loop
from memoryllm_jax.training.batches import TrainBatches, place
from memoryllm_jax.training.step import Trainer

IDS = np.random.default_rng(0).integers(0, 64, (2, 12))
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "base": ("base", {}),
    "memory": ("memory", {}),
    "flex": ("flex-3", {"model.kv_heads": 2, "model.tie_embeddings": True}),
    "grouped": ("flex-3", {"model.dim": 48, "model.heads": 6, "model.kv_heads": 2}),
    "layernorm": ("flex-3", {"model.norm": "layernorm", "model.compute_input": "after_attention"}),
}


@pytest.fixture(scope="session")
def transformers():
    missing = "the independent side, transformers 5 on PyTorch, is not installed: pip install 'memoryllm_jax[hf]'"
    pytest.importorskip("torch", reason=missing)
    return pytest.importorskip("transformers", "5.0", reason=missing)


@pytest.fixture(scope="session")
def workdir(data_path, tmp_path_factory):
    """workdir(name, steps): a model trained for so few steps, of large initial weights, so that its texts vary."""
    folder = tmp_path_factory.mktemp("hf")

    @functools.cache
    def make(name, steps=1):
        architecture, overrides = MODELS[name]
        c = default(architecture)
        c.steps, c.batch_size, c.seq_len = steps, 8, 64
        c.model.dim, c.model.layers, c.model.heads, c.model.dtype, c.model.init_std = 32, 2, 4, "float32", 0.1
        c.data.path, c.data.epochs, c.eval.batches, c.log.tensorboard = data_path, 9, 1, False
        c.update_from_flattened_dict(overrides)
        path = str(folder / f"{name}-{steps}")
        assert loop.train(resolve(c), path, jax.devices()[:1]) == 0
        return path

    return make


def our_logits(workdir, ids):
    """[B, T, V] from our decoder: the token after every prefix, as it is generated from."""
    B, T = ids.shape
    with contextlib.closing(serving.open_engine(workdir, dtype="float32")) as model:
        prefixes, lengths = np.repeat(ids, T, 0), np.tile(np.arange(1, T + 1), B)
        unique, index = np.unique(prefixes, return_inverse=True)
        cache = model.decoder.empty_cache(B * T, T)
        rows, index = model.rows.fetch(unique), index.reshape(B * T, T)
        logits, _ = model.decoder.prefill(rows, index, lengths, np.arange(B * T), cache)
    return np.asarray(logits).reshape(B, T, -1)


def golden_by_the_equations(name, ids):
    """[B, T, V] of a golden directory, from its files by tests/reference.py alone."""
    m, _ = from_json(json.load(open(f"{GOLDEN}/{name}/config.json")), name)
    params = reference.from_llama(load_file(f"{GOLDEN}/{name}/model.safetensors"), m)
    return np.asarray(reference.logits(params, ids, m))


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64))).logits.float().numpy()


def their_text(model, prompt, tokens):
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name, steps", [("base", 20), ("memory", 20), ("flex", 20), ("layernorm", 1)])
def test_exported_models_compute_what_ours_do(transformers, workdir, name, steps, tmp_path):
    """Logits, and greedy text through either side's cache; for FFN-M live and looked up."""
    if name == "layernorm":
        assert_refused("config.model.norm: expected rmsnorm", export_base_with_layernorm, workdir("base"))
    path, out = workdir(name, steps), str(tmp_path / "hf")
    export.export(path, out, shard_bytes=1 << 16)
    assert len([file for file in os.listdir(out) if file.endswith(".safetensors")]) > 2
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, out, trust_remote_code=name != "base")
    with open(f"{out}/README.md") as file:
        assert f"{steps:,} steps" in file.read()
    ours = serving.open_engine(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = ours.prompt("A string is\ta sequence, of\n\n  12 ünits")
    assert tokenizer("A string is\ta sequence, of\n\n  12 ünits").input_ids == prompt
    assert tokenizer.decode(prompt, skip_special_tokens=True) == ours.tokenizer.decode(prompt)
    text = [token for new in ours.generate([prompt], 20, Sampling(0)) for _, token in new]
    sides = [load()]
    if name != "base":
        compress.precompute(path, str(tmp_path / "tol"), compress.Options(bits="32"))
        sides.append(load(tol=str(tmp_path / "tol")))
        assert not [n for n, _ in sides[1].named_parameters() if ".memory." in n]
    for model in sides:
        np.testing.assert_allclose(their_logits(model, IDS), our_logits(path, IDS), atol=1e-4)
        assert their_text(model, prompt, 20) == text


def export_base_with_layernorm(path):
    trained = TrainedModel(path)
    trained.close()
    to_json(dataclasses.replace(trained.config, norm="layernorm"), 64, "float32", {})


def assert_refused(message, function, *args):
    with pytest.raises(UserError, match=message):
        function(*args)


@pytest.mark.parametrize("name", ["memory", "flex"])
def test_compressed_rows_are_read_by_the_modeling_file(transformers, workdir, name, tmp_path):
    """Two tiers of bits and ranks with a dropped layer: as our own reader reads them; damage and strangers refused."""
    path, out, tol = workdir(name, 20), str(tmp_path / "hf"), str(tmp_path / "tol")
    export.export(path, out)
    compress.precompute(path, tol, compress.Options(bits="5", rank="0.5", drop_layers=("1",)))
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, out, trust_remote_code=True)
    ours = serving.open_engine(path, tol)
    prompt = ours.prompt("The file is")
    text = [token for new in ours.generate([prompt], 20, Sampling(0)) for _, token in new]
    assert their_text(load(tol=tol), prompt, 20) == text
    other = str(tmp_path / "other")
    compress.precompute(workdir(name, 1), other, compress.Options())
    with pytest.raises(ValueError, match="decoder_digest: expected"):
        load(tol=other)


@pytest.mark.parametrize(
    "dtype, tied, rope", [("float32", False, LLAMA3_ROPE), ("bfloat16", True, None), ("float16", False, None)]
)
def test_import_is_llama_and_goes_back_bit_by_bit(transformers, tmp_path, dtype, tied, rope):
    import torch
    from safetensors.torch import load_file as load_torch

    source, path, out = (str(tmp_path / n) for n in ("source", "work", "out"))
    torch.manual_seed(0)
    rope = {"rope_theta": 5e5} | (rope or {"rope_type": "linear", "factor": 2.0})
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=3e-6, tie_word_embeddings=tied, max_position_embeddings=64,
            rope_parameters=rope, initializer_range=0.2,
        )
    ).to(getattr(torch, dtype))  # fmt: skip
    llama.save_pretrained(source, max_shard_size="20KB")
    write_tokenizer(source)
    import_(source, path)
    exact = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)  # its rope has not been rounded
    np.testing.assert_allclose(our_logits(path, IDS), their_logits(exact, IDS), atol=1e-4)
    export.export(path, out)
    again = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    np.testing.assert_array_equal(their_logits(again, IDS), their_logits(exact, IDS))
    assert len([name for name in os.listdir(source) if name.endswith(".safetensors")]) > 2
    assert filecmp.cmpfiles(source, out, os.listdir(source), shallow=False)[1:] == ([], [])
    other = next(d for d in ("float32", "bfloat16") if d != dtype)
    export.export(path, str(tmp_path / "other"), dtype=other)
    (single,) = [n for n in os.listdir(tmp_path / "other") if n.endswith("safetensors")]
    wanted = exact.to(getattr(torch, other)).state_dict()
    for name, tensor in load_torch(str(tmp_path / "other" / single)).items():
        assert torch.equal(tensor, wanted[name]), name


def write_tokenizer(folder, specials=("<s>", "</s>"), put_before=None):
    """A tokenizer.json of 64 ids."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {chr(32 + i): i for i in range(62)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.add_special_tokens(list(specials))
    if put_before:
        ids = [(put_before, made.token_to_id(put_before))]
        made.post_processor = tokenizers.processors.TemplateProcessing(f"{put_before} $A", special_tokens=ids)
    made.save(os.path.join(folder, "tokenizer.json"))


@pytest.mark.parametrize("name", ["base", "memory", "flex"])
def test_golden_logits(name, tmp_path):
    """Small models, and what transformers' Llama and, for the other two, tests/reference.py made of them."""
    import_(f"{GOLDEN}/{name}", str(tmp_path / "work"))
    golden = np.load(f"{GOLDEN}/{name}/logits.npy")
    np.testing.assert_allclose(our_logits(str(tmp_path / "work"), IDS), golden, atol=1e-5)
    np.testing.assert_allclose(golden_by_the_equations(name, IDS), golden, atol=1e-5)
    with contextlib.closing(serving.open_engine(str(tmp_path / "work"))) as model:
        text = [token for new in model.generate([IDS[0].tolist()], 8, Sampling(0)) for _, token in new]
    assert text == np.load(f"{GOLDEN}/{name}/text.npy").tolist()
    export.export(str(tmp_path / "work"), str(tmp_path / "out"))
    assert filecmp.cmp(f"{GOLDEN}/{name}/model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


@pytest.mark.parametrize("name", ["base", "memory", "flex"])
def test_transformers_gives_golden_logits(transformers, name, tmp_path):
    import_(f"{GOLDEN}/{name}", str(tmp_path / "work"))
    export.export(str(tmp_path / "work"), str(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), trust_remote_code=name != "base")
    np.testing.assert_allclose(their_logits(model, IDS), np.load(f"{GOLDEN}/{name}/logits.npy"), atol=1e-5)
    assert their_text(model, IDS[0].tolist(), 8) == np.load(f"{GOLDEN}/{name}/text.npy").tolist()


def test_parameters_are_read_in_pieces_of_bounded_size(tmp_path, monkeypatch):
    """Cut along a tensor's rows, and where the checkpoint's chunks lie across them, into layers."""
    monkeypatch.setattr("memoryllm_jax.checkpoint._CHUNK_BYTES", 600)
    monkeypatch.setattr("memoryllm_jax.saved._BLOCK_BYTES", 1000)
    import_(f"{GOLDEN}/flex", str(tmp_path / "work"))
    model, pieces = TrainedModel(str(tmp_path / "work")), 0
    for tensor in tensor_names.tensors(model.config):
        whole = np.asarray(model.leaf(tensor.leaf, jnp.float32))
        found = np.full(whole.shape, np.nan, np.float32)
        for first, piece in model.blocks(tensor.leaf, tensor.axis):
            found[tuple(slice(a, a + n) for a, n in zip(first, piece.shape))] = piece
            assert tensor.layer is None or piece.nbytes <= max(1000, whole[0].nbytes)
            pieces += 1
        np.testing.assert_array_equal(found, whole)
    assert pieces > 2 * len(tensor_names.tensors(model.config))
    model.close()
    export.export(str(tmp_path / "work"), str(tmp_path / "out"))
    assert filecmp.cmp(f"{GOLDEN}/flex/model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)
    digest = json.load(open(tmp_path / "out" / "config.json"))["decoder_digest"]
    model = TrainedModel(str(tmp_path / "work"))
    assert digest == model.load(lambda name: not model.is_memory(name), keep=False)[1]
    model.close()


def config_json(**changes):
    with open(f"{GOLDEN}/base/config.json") as file:
        return json.load(file) | ({"rope_parameters": None} if "rope_scaling" in changes else {}) | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type: expected llama .*, found 'mistral'"),
        ({"attention_bias": True}, "attention_bias: expected False, found True"),
        ({"mlp_bias": True}, "mlp_bias: expected False, found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"head_dim": 12}, "head_dim: expected hidden_size / num_attention_heads = 4, found 12"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: expected one of default, .*, found 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number, found None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None"),
        ({"sliding_window": 4096}, "sliding_window: expected None, found 4096"),
        ({"hidden_size": None}, "hidden_size: expected a number .*, found None"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected a group of settings, found 'linear'"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected at least 1, found 0"),
        ({"num_key_value_heads": 3}, "config.model.kv_heads: expected a divisor of model.heads = 4"),
    ],
)
def test_what_the_family_cannot_express_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        from_json(config_json(**changes), "config.json")


def test_damaged_directories_are_named_and_leave_nothing(tmp_path):
    def import_changed(change):
        source = tmp_path / f"source{len(os.listdir(tmp_path))}"
        source.mkdir()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (source / name).write_bytes(open(f"{GOLDEN}/base/{name}", "rb").read())
        change(source)
        import_(str(source), str(tmp_path / "work"))

    def without(name):
        def change(source):
            tensors = load_file(source / "model.safetensors")
            tensors.pop(name, None)
            tensors |= {"model.layers.0.mlp.bias": np.zeros(3, np.float32)} if name == "" else {}
            save_file(tensors, source / "model.safetensors")

        return change

    def tied_by_config_alone(source):
        (source / "config.json").write_text(json.dumps(config_json(tie_word_embeddings=True)))

    def cut(source):
        raw = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(raw[:-9])

    for change, message in (
        (without("lm_head.weight"), "expected a tensor lm_head.weight, found none"),
        (tied_by_config_alone, "lm_head.weight: expected the input embedding, as tie_word_embeddings says"),
        (without(""), "tensor model.layers.0.mlp.bias: this model family has no place for it"),
        (cut, "model.safetensors: cannot be read as a safetensors file"),
        (lambda source: os.remove(source / "tokenizer.json"), "expected tokenizer.json or tokenizer.model"),
        (lambda source: os.remove(source / "model.safetensors"), "expected model.safetensors or"),
    ):
        assert_refused(message, import_changed, change)
        assert not os.path.exists(tmp_path / "work")

    def too_large(source):
        tensors = load_file(source / "model.safetensors")
        save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1e6}, source / "model.safetensors")

    import_changed(too_large)
    message = "--dtype=float16: tensor model.norm.weight: has values beyond 65504"
    assert_refused(message, export.export, str(tmp_path / "work"), str(tmp_path / "out"), "float16")
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


def test_tokenizers_become_tokenizer_json(data_path, tmp_path):
    """The same ids and texts for both kinds that are not one already."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "".join(t for t, _ in itertools.islice(documents.read("embedded"), 3)) + "\t\x00 é漢字🙂 \n\n   x  1234567"
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"he", b"the", b" the", b"in", b"ing", b" a", b"12", b"123"]
    lines = b"\n".join(base64.b64encode(t) + b" " + str(i).encode() for i, t in enumerate(ranks))
    (tmp_path / "llama3.model").write_bytes(lines)
    for ours in (dataset.Dataset(data_path).tokenizer(), tokenizer_lib.load(f"llama3:{tmp_path}/llama3.model")):
        theirs = tokenizers.Tokenizer.from_str(tokenizer_conversion.to_json(ours, 64)[0].decode())
        for piece in [text[i : i + 500] for i in range(0, len(text), 500)]:
            ids = theirs.encode(piece).ids
            assert ids[0] == ours.bos_id and ids[1:] == ours.encode(piece), piece
            assert theirs.decode(ids) == ours.decode(ids[1:]) == piece
        spelled = " a".join(["x", *ours.special_tokens, "", "y"])
        assert theirs.encode(spelled).ids[1:] == ours.encode_special(spelled) != ours.encode(spelled)


@pytest.mark.parametrize("name, tensor", [("memory", 1), ("flex-3", 1), ("flex-3", 3)])
def test_converted_ffns_add_up_to_that_of_base(make_config, workdir, data_path, name, tensor):
    """At one input FFN-C and FFN-M together are base's FFN; everything else is base's, on padded meshes too."""
    start = {"start.workdir": workdir("base"), "mesh.fsdp": 1, "mesh.tensor": tensor}
    config = loop.complete(make_config(name, **start, **{"model.init_std": 0.1}), dataset.Dataset(data_path))
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:tensor]))
    params = trainer.init(jax.random.key(9))["params"]
    params, _ = warm_start.starting_params(config, dataset.Dataset(data_path).tokenizer(), params, trainer.mesh)
    trained = TrainedModel(workdir("base"))
    base, m = {n: np.asarray(trained.leaf(n, jnp.float32)) for n in trained.names()}, config.model
    trained.close()
    got = {"/".join(k.key for k in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    x = np.random.default_rng(0).normal(size=(7, m.dim)).astype(np.float32)
    for layer in range(m.layers):
        parts = {where: {p: base[f"layers/ffn/{p}"][layer] for p in ("gate", "up", "down")} for where in ("base",)}
        for where in ("layers", "memory") if m.compute_dim else ("memory",):
            parts[where] = {p: got[f"{where}/ffn/{p}"][layer] for p in ("gate", "up", "down")}
        whole, *halves = (reference.swiglu(x, p) for p in parts.values())
        np.testing.assert_allclose(sum(halves), whole, atol=1e-5)
    shards = [shard for x in jax.tree.leaves(params) for shard in x.addressable_shards]
    buffers = {(shard.device, shard.data.unsafe_buffer_pointer()) for shard in shards}
    assert len(buffers) == len(shards)  # a step donates each
    np.testing.assert_array_equal(got["memory/norm/scale"], base["layers/ffn_norm/scale"])
    np.testing.assert_array_equal(got["embedding"][: m.vocab_size], base["embedding"])
    np.testing.assert_array_equal(got["layers/attention/q"][:, :, : m.heads], base["layers/attention/q"])


def test_training_starts_from_a_model(workdir, data_path, tmp_path):
    """configs/start.py: the same architecture goes on from its loss; strangers and workdirs of imports are refused."""
    first = json.load(open(f"{workdir('memory', 20)}/result.json"))["validation"]["loss"]

    def start(architecture="memory", source=None, **overrides):
        c = config_lib.load(f"configs/start.py:{architecture}@{source or workdir('memory', 20)}")
        c.steps, c.batch_size, c.seq_len, c.log.tensorboard = 1, 8, 64, False
        c.data.path, c.eval.batches, c.optimizer.peak_lr, c.optimizer.final_lr = data_path, 1, 1e-9, 0.0
        c.update_from_flattened_dict(overrides)
        return resolve(c)

    assert loop.train(start(), str(tmp_path / "more"), jax.devices()[:1]) == 0
    assert json.load(open(tmp_path / "more/result.json"))["validation"]["loss"] == pytest.approx(first, abs=1e-5)
    import_(f"{GOLDEN}/base", str(tmp_path / "imported"))
    for config, target, message in (
        (start("flex-1"), "a", "config.model.beta: expected 0.0 as in .*, found 1.0"),
        (start(**{"model.dim": 64}), "b", "config.model.dim: expected 32 as in .*, found 64"),
        (start(source=f"{tmp_path}/imported", **{"model.vocab_size": 512}), "c", "model.vocab_size: expected 64 as in"),
        (start(), "imported", "expected a folder of a training run, found an imported model"),
    ):
        assert_refused(message, loop.train, config, str(tmp_path / target), jax.devices()[:1])


def test_what_an_import_brings_survives_training(tmp_path):
    """Import and export give every file back; prepare finds its special tokens; training from it keeps what it can."""
    source, work, run = (str(tmp_path / n) for n in ("source", "work", "run"))
    shutil.copytree(f"{GOLDEN}/base", source, ignore=shutil.ignore_patterns("*.npy"))
    write_tokenizer(source, ("<a>", "<b>"), put_before="<a>")
    brought = {
        "tokenizer_config.json": json.dumps({"eos_token": {"content": "<b>"}, "bos_token": "<a>"}).encode(),
        "generation_config.json": b'{"eos_token_id": [63, 5], "temperature": 0.6}',
        "special_tokens_map.json": b'{"eos_token": "<b>"}',
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"\xa9 somebody\r\n",
    }
    for name, content in (brought | {"README.md": b"# A model"}).items():
        (tmp_path / "source" / name).write_bytes(content)
    import_(source, work)
    export.export(work, str(tmp_path / "same"))
    assert filecmp.cmpfiles(source, tmp_path / "same", os.listdir(source), shallow=False)[1:] == ([], [])

    (tmp_path / "text.txt").write_text("SOME WORDS, " * 300)
    prepare(f"{tmp_path}/text.txt", f"hf:{source}/tokenizer.json", str(tmp_path / "data"))
    stream = dataset.Dataset(str(tmp_path / "data"))
    assert (stream.tokenizer().bos_id, stream.tokenizer().eos_id) == (62, 63) and stream.train.read(0, 1) == [62]
    c = config_lib.load(f"configs/start.py:memory@{work}")
    c.steps, c.batch_size, c.seq_len, c.checkpoint.every, c.log.tensorboard = 2, 2, 32, 1, False
    c.data.path, c.eval.batches, c.sample.tokens = str(tmp_path / "data"), 1, 0
    for _ in range(2):  # the second goes on from a checkpoint, where the first started from the import
        assert loop.train(resolve(c), run, jax.devices()[:1]) == 0
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        export.export(run, str(tmp_path / "out"))
        shutil.rmtree(f"{run}/2")
        for name, content in brought.items():
            assert (tmp_path / "out" / name).read_bytes() == content
        assert json.load(open(tmp_path / "out" / "config.json"))["model_type"] == "memoryllm"


def test_special_tokens_of_a_tokenizer_json(tmp_path):
    """bos is what it puts before a text; eos what tokenizer_config.json says; without either they go by name."""
    write_tokenizer(tmp_path)
    load = functools.partial(tokenizer_lib.load, f"hf:{tmp_path}/tokenizer.json")
    assert (load().bos_id, load().eos_id) == (62, 63)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<s>"}')
    assert (load().bos_id, load().eos_id) == (None, 62)
    write_tokenizer(tmp_path, ("<x>", "<y>"), put_before="<y>")
    assert_refused("tokenizer_config.json: eos_token: expected one token, found 2", load)
    os.remove(tmp_path / "tokenizer_config.json")
    assert (load().bos_id, load().eos_id) == (63, None)


@pytest.mark.parametrize("heads, tensor", [(6, 2)])
def test_grouped_heads_on_padded_meshes(make_config, data_path, heads, tensor):
    """Two key-value heads for some of the query's: losses, and so gradients, are those of one device."""
    overrides = {"model.dim": 48, "model.heads": heads, "model.kv_heads": 2, "mesh.fsdp": 1}
    values = []
    for parts in (1, tensor):
        config = loop.complete(make_config("base", **overrides, **{"mesh.tensor": parts}), dataset.Dataset(data_path))
        trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:parts]))
        batches = TrainBatches(config, dataset.Dataset(data_path), 1, [0])
        state, losses = trainer.init(jax.random.key(0)), []
        for step in range(3):
            batch = place(batches[step], batches.sizes()[-1], trainer.batch_sharding, config.model)
            state, metrics = trainer.train(state, batch)
            losses.append(float(metrics["loss"]))
        values.append(losses)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)


def test_grouped_heads_decode_on_padded_meshes(workdir):
    """Six query heads for two of keys and values, on two devices: texts as on one."""
    texts = []
    for parts in (1, 2):
        mesh = sharding.make_mesh(MeshConfig(1, 1, parts), jax.devices()[:parts])
        with contextlib.closing(serving.open_engine(workdir("grouped"), dtype="float32", mesh=mesh)) as model:
            prompts = [model.prompt(text) for text in ("A string is", "The class names")]
            texts.append([new for step in model.generate(prompts, 10, Sampling(0)) for new in step])
    assert texts[0] == texts[1] and len({token for _, token in texts[0]}) > 5


def test_names_cover_every_parameter(make_config):
    for architecture in ("base", "memory", "flex-3"):
        m = make_config(architecture, **{"model.vocab_size": 10}).model
        assert len({t.name for t in tensor_names.tensors(m)}) == len(tensor_names.tensors(m))
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        shapes = jax.tree_util.tree_leaves_with_path(transformer.abstract_params(transformer.LanguageModel(m), mesh))
        sizes = {"/".join(key.key for key in path): leaf.size for path, leaf in shapes}
        held = dict.fromkeys(sizes, 0)
        for t in tensor_names.tensors(m):
            held[t.leaf] += int(np.prod(t.shape))
        assert held == sizes
