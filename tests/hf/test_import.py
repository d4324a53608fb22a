"""Hugging Face directories read into workdirs: against transformers, against golden logits, and bit by bit."""

import filecmp
import json
import os
import shutil

import jax
import numpy as np
import pytest
import safetensors
from lab import GOLDEN
from safetensors.numpy import load_file, save_file
from sides import (
    IDS,
    LLAMA3_ROPE,
    golden_by_the_equations,
    opened,
    our_logits,
    our_text,
    their_logits,
    write_tokenizer,
)

from memoryllm_jax import config as config_lib
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import resolve
from memoryllm_jax.data import dataset
from memoryllm_jax.data.shards import prepare
from memoryllm_jax.hf.export import export_model
from memoryllm_jax.hf.import_ import import_model
from memoryllm_jax.training import loop


@pytest.mark.parametrize("name", ["base", "memory", "flex"])
def test_golden_logits_and_text(name, tmp_path):
    """Small models, and what transformers' Llama and, for the other two, tests/reference.py made of them."""
    import_model(f"{GOLDEN}/{name}", str(tmp_path / "work"))
    golden = np.load(f"{GOLDEN}/{name}/logits.npy")
    np.testing.assert_allclose(golden_by_the_equations(name, IDS), golden, atol=1e-5)
    with opened(str(tmp_path / "work")) as engine:
        np.testing.assert_allclose(our_logits(engine, IDS), golden, atol=1e-5)
        text = our_text(engine, IDS[0].tolist(), 8)
    assert text == np.load(f"{GOLDEN}/{name}/text.npy").tolist()


def stored_bits(folder):
    """{tensor: (dtype, shape, bytes)} of all safetensors files of a folder."""
    out = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors"):
            with safetensors.safe_open(f"{folder}/{file}", framework="flax") as opened_file:
                for name in opened_file.keys():  # noqa: SIM118, as it is no dict
                    tensor = np.asarray(opened_file.get_tensor(name))
                    out[name] = str(tensor.dtype), tensor.shape, tensor.tobytes()
    return out


@pytest.mark.parametrize(
    "dtype, tied, rope", [("float32", False, LLAMA3_ROPE), ("bfloat16", True, None), ("float16", False, None)]
)
def test_a_llama_of_transformers_goes_in_and_out_bit_by_bit(transformers, tmp_path, dtype, tied, rope):
    import torch

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
    import_model(source, path)
    exact = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)  # its rope has not been rounded
    with opened(path) as engine:
        np.testing.assert_allclose(our_logits(engine, IDS), their_logits(exact, IDS), atol=1e-4)

    export_model(path, out)
    assert stored_bits(out) == stored_bits(source)
    assert filecmp.cmp(f"{source}/config.json", f"{out}/config.json", shallow=False)
    again = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    np.testing.assert_array_equal(their_logits(again, IDS), their_logits(exact, IDS))


def copy_of_base(folder, change=lambda folder: None):
    """The golden base's files in a new folder, changed."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(f"{GOLDEN}/base/{name}", folder)
    change(folder)
    return str(folder)


def changed_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def tied_by_config_alone(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))


def cut_file(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-9])


def whole_numbers(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        (changed_tensors(lambda t: t.pop("lm_head.weight")), "expected a tensor lm_head.weight, found none"),
        (tied_by_config_alone, "lm_head.weight: expected the input embedding, as tie_word_embeddings says"),
        (
            changed_tensors(lambda t: t.update({"model.layers.0.mlp.bias": np.zeros(3, np.float32)})),
            "tensor model.layers.0.mlp.bias: this model family has no place for it",
        ),
        (
            changed_tensors(lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)})),
            r"tensor model.norm.weight: expected the shape \(16,\), found \(3,\)",
        ),
        (changed_tensors(whole_numbers), "tensor model.norm.weight: expected a dtype among F32, BF16, F16, found I32"),
        (cut_file, "model.safetensors: expected a safetensors file, found a damaged one or none"),
        (lambda folder: os.remove(folder / "tokenizer.json"), "expected tokenizer.json or tokenizer.model"),
        (lambda folder: os.remove(folder / "model.safetensors"), "expected model.safetensors or"),
    ],
)
def test_damaged_directories_are_named_and_leave_nothing(tmp_path, change, message):
    source = copy_of_base(tmp_path / "source", change)
    with pytest.raises(UserError, match=message):
        import_model(source, str(tmp_path / "work"))
    assert not os.path.exists(tmp_path / "work")


def test_rotary_buffers_and_mixed_dtypes_are_taken(tmp_path):
    """Buffers are left out. Tensors of several dtypes go out in the one that holds all of them exactly."""

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)

    import_model(copy_of_base(tmp_path / "source", changed_tensors(change)), str(tmp_path / "work"))
    export_model(str(tmp_path / "work"), str(tmp_path / "out"))
    found, golden = load_file(tmp_path / "out/model.safetensors"), load_file(f"{GOLDEN}/base/model.safetensors")
    golden["model.norm.weight"] = golden["model.norm.weight"].astype(np.float16).astype(np.float32)
    assert found.keys() == golden.keys()
    for name, tensor in golden.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)


BROUGHT = {
    "tokenizer_config.json": json.dumps({"eos_token": {"content": "<b>"}, "bos_token": "<a>"}).encode(),
    "generation_config.json": b'{"eos_token_id": [63, 5], "temperature": 0.6}',
    "special_tokens_map.json": b'{"eos_token": "<b>"}',
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"\xa9 somebody\r\n",
}


@pytest.fixture(scope="module")
def with_files(tmp_path_factory):
    """(a Hugging Face directory with BROUGHT and special tokens of its own, its workdir)."""
    folder = tmp_path_factory.mktemp("brought")

    def bring(source):
        write_tokenizer(source, ("<a>", "<b>"), put_before="<a>")
        for name, content in (BROUGHT | {"README.md": b"# A model"}).items():
            (source / name).write_bytes(content)

    source = copy_of_base(folder / "source", bring)
    import_model(source, str(folder / "work"))
    return source, str(folder / "work")


def test_export_gives_every_file_of_an_import_back(with_files, tmp_path):
    source, work = with_files
    export_model(work, str(tmp_path / "same"))
    assert filecmp.cmpfiles(source, tmp_path / "same", os.listdir(source), shallow=False)[1:] == ([], [])


def test_what_an_import_brings_survives_training(with_files, tmp_path):
    """prepare finds its special tokens; a model that is trained from it, and resumed, keeps all but the weights'."""
    source, work = with_files
    (tmp_path / "text.txt").write_text("SOME WORDS, " * 300)
    prepare(f"{tmp_path}/text.txt", f"hf:{source}/tokenizer.json", str(tmp_path / "data"))
    stream = dataset.Dataset(str(tmp_path / "data"))
    assert (stream.tokenizer().bos_id, stream.tokenizer().eos_id) == (62, 63) and stream.train.read(0, 1) == [62]
    c = config_lib.load(f"configs/start.py:memory@{work}")
    c.steps, c.batch_size, c.seq_len, c.checkpoint.every, c.log.tensorboard = 2, 2, 32, 1, False
    c.data.path, c.eval.batches, c.sample.tokens = str(tmp_path / "data"), 1, 0
    run = str(tmp_path / "run")
    for out in ("started", "resumed"):
        assert loop.train(resolve(c), run, jax.devices()[:1]) == 0
        export_model(run, str(tmp_path / out))
        shutil.rmtree(f"{run}/2")  # so that the second goes on from step 1
        for name, content in BROUGHT.items():
            assert (tmp_path / out / name).read_bytes() == content
        assert json.load(open(tmp_path / out / "config.json"))["model_type"] == "memoryllm"
