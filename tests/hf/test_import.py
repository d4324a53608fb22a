"""Import: logits against transformers and golden ones, tensors bit by bit, kept files, and damaged directories."""

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
    float32_engine,
    golden_by_the_equations,
    our_logits,
    our_text,
    their_logits,
    write_tokenizer,
)

from memoryllm_jax.common import config_files
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import resolve
from memoryllm_jax.data import dataset
from memoryllm_jax.data.shards import prepare
from memoryllm_jax.hf.export import export_model
from memoryllm_jax.hf.import_ import import_model
from memoryllm_jax.training import loop


@pytest.mark.parametrize("name", ["base", "memory", "flex"])
def test_imported_models_give_golden_logits_and_text(name, tmp_path):
    """Golden logits of base are those of transformers' Llama, the others are tests/reference.py's."""
    import_model(f"{GOLDEN}/{name}", str(tmp_path / "work"))
    golden = np.load(f"{GOLDEN}/{name}/logits.npy")
    np.testing.assert_allclose(golden_by_the_equations(name, IDS), golden, atol=1e-5)
    with float32_engine(str(tmp_path / "work")) as engine:
        np.testing.assert_allclose(our_logits(engine, IDS), golden, atol=1e-5)
        text = our_text(engine, IDS[0].tolist(), 8)
    assert text == np.load(f"{GOLDEN}/{name}/text.npy").tolist()


def stored_bits(folder):
    """{tensor name: (dtype, shape, bytes)} of all safetensors files in a folder."""
    out = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors"):
            with safetensors.safe_open(f"{folder}/{file}", framework="flax") as opened_file:
                for name in opened_file.keys():  # noqa: SIM118, as it is no dict
                    tensor = np.asarray(opened_file.get_tensor(name))
                    out[name] = str(tensor.dtype), tensor.shape, tensor.tobytes()
    return out


@pytest.mark.parametrize(
    "family, dtype, tied, rope",
    [
        ("Llama", "float32", False, LLAMA3_ROPE),
        ("Llama", "bfloat16", True, None),
        ("Qwen3", "float16", False, None),
    ],
)
def test_a_model_of_transformers_goes_in_and_out_bit_by_bit(transformers, tmp_path, family, dtype, tied, rope):
    import torch

    source, path, out = (str(tmp_path / n) for n in ("source", "work", "out"))
    torch.manual_seed(0)
    rope = {"rope_theta": 5e5} | (rope or {"rope_type": "linear", "factor": 2.0})
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(
        getattr(transformers, f"{family}Config")(
            vocab_size=64, hidden_size=32, head_dim=8, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=3e-6, tie_word_embeddings=tied, max_position_embeddings=64,
            rope_parameters=rope, initializer_range=0.2,
        )
    ).to(getattr(torch, dtype))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2)  # norms that are all one could be swapped unnoticed
    model.save_pretrained(source, max_shard_size="20KB")
    write_tokenizer(source)
    import_model(source, path)
    # Read again, as `model` holds rotary frequencies that are rounded to its dtype.
    exact = kind.from_pretrained(source, dtype=torch.float32)
    with float32_engine(path) as engine:
        np.testing.assert_allclose(our_logits(engine, IDS), their_logits(exact, IDS), atol=1e-4)

    export_model(path, out)
    assert stored_bits(out) == stored_bits(source)
    assert filecmp.cmp(f"{source}/config.json", f"{out}/config.json", shallow=False)
    # In another dtype, config.json is export's own.
    export_model(path, f"{out}-wide", "float32")
    for folder in (out, f"{out}-wide"):
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(again) is kind
        np.testing.assert_array_equal(their_logits(again, IDS), their_logits(exact, IDS))


def copy_of_base(folder, change=lambda folder: None):
    """A new folder with the golden base's files, to which `change` is applied."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(f"{GOLDEN}/base/{name}", folder)
    change(folder)
    return str(folder)


def changed_tensors(change):
    """A change of a folder that applies `change` to the dict of its tensors."""

    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def settings(**changes):
    """A change of a folder that changes settings in its config.json."""

    def apply(folder):
        tree = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(tree | changes))

    return apply


def cut_file(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-9])


def whole_numbers(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        (changed_tensors(lambda t: t.pop("lm_head.weight")), "expected a tensor lm_head.weight, found none"),
        (
            settings(tie_word_embeddings=True),
            "lm_head.weight: expected the input embedding, as tie_word_embeddings says",
        ),
        (
            changed_tensors(lambda t: t.update({"model.layers.0.mlp.bias": np.zeros(3, np.float32)})),
            "tensor model.layers.0.mlp.bias: expected one that config.json calls for, found another",
        ),
        (
            changed_tensors(lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)})),
            r"tensor model.norm.weight: expected the shape \(16,\), found \(3,\)",
        ),
        (changed_tensors(whole_numbers), "tensor model.norm.weight: expected a dtype among F32, BF16, F16, found I32"),
        (cut_file, "model.safetensors: expected 32104 bytes, found 32095; it is truncated or damaged"),
        (
            settings(num_hidden_layers=10_000),
            "num_hidden_layers: expected at most 21, the number of tensors, found 10000",
        ),
        (settings(vocab_size=2**30), r"lm_head.weight: expected the shape \(1073741824, 16\), found \(64, 16"),
        (settings(eos_token_id=64), "config.json: eos_token_id: expected ids below vocab_size = 64, found 64"),
        (
            lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [1, -1]}'),
            "generation_config.json: eos_token_id: expected ids below vocab_size = 64, found -1",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").symlink_to("/dev/null"),
            "tokenizer_config.json: expected a file in .*, a symbolic link to /dev/null",
        ),
        (lambda folder: os.mkfifo(folder / "NOTICE"), "NOTICE: expected a file, found a folder, pipe,"),
        (lambda folder: (folder / "LICENSE").symlink_to("gone"), "LICENSE: expected a file, .* or broken link"),
        (lambda folder: os.remove(folder / "tokenizer.json"), "expected tokenizer.json or tokenizer.model"),
        (lambda folder: os.remove(folder / "model.safetensors"), "expected model.safetensors or"),
    ],
)
def test_damaged_directories_are_refused_by_name_and_leave_no_workdir(tmp_path, change, message):
    source = copy_of_base(tmp_path / "source", change)
    with pytest.raises(UserError, match=message):
        import_model(source, str(tmp_path / "work"))
    assert not os.path.exists(tmp_path / "work")


def test_a_workdir_that_cannot_hold_checkpoints_is_refused_before_the_weights_are_read(tmp_path):
    source = copy_of_base(tmp_path / "source", lambda folder: os.remove(folder / "model.safetensors"))
    with pytest.raises(UserError, match="workdir: expected a folder on a disk or gs://BUCKET/FOLDER, found s3://a/b"):
        import_model(source, "s3://a/b")


def test_rotary_buffers_are_dropped_and_mixed_dtypes_become_float32(tmp_path):
    """float32 holds the values of every dtype exactly."""

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)

    import_model(copy_of_base(tmp_path / "source", changed_tensors(change)), str(tmp_path / "work"))
    export_model(str(tmp_path / "work"), str(tmp_path / "out"))
    found = load_file(tmp_path / "out/model.safetensors")
    golden = load_file(f"{GOLDEN}/base/model.safetensors")
    golden["model.norm.weight"] = golden["model.norm.weight"].astype(np.float16).astype(np.float32)
    assert found.keys() == golden.keys()
    for name, tensor in golden.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)


# Files of an import that a model trained from it keeps
KEPT_FILES = {
    "tokenizer_config.json": json.dumps({"eos_token": {"content": "<b>"}, "bos_token": "<a>"}).encode(),
    "generation_config.json": b'{"eos_token_id": [63, 5], "temperature": 0.6}',
    "special_tokens_map.json": b'{"eos_token": "<b>"}',
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"\xa9 somebody\r\n",
}


@pytest.fixture(scope="module")
def with_files(tmp_path_factory):
    """(a Hugging Face directory with KEPT_FILES, a model card and its own special tokens; its workdir)."""
    folder = tmp_path_factory.mktemp("with_files")

    def add_files(source):
        write_tokenizer(source, ("<a>", "<b>"), put_before="<a>")
        for name, content in (KEPT_FILES | {"README.md": b"# A model"}).items():
            (source / name).write_bytes(content)

    source = copy_of_base(folder / "source", add_files)
    import_model(source, str(folder / "work"))
    return source, str(folder / "work")


@pytest.fixture(scope="module")
def prepared(with_files, tmp_path_factory):
    """Data that is prepared with the tokenizer of `with_files`."""
    source, _ = with_files
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("SOME WORDS, " * 300)
    prepare(f"{folder}/text.txt", f"hf:{source}/tokenizer.json", str(folder / "data"))
    return str(folder / "data")


def test_export_writes_every_file_of_an_import_unchanged(with_files, tmp_path):
    source, work = with_files
    export_model(work, str(tmp_path / "same"))
    _, different, missing = filecmp.cmpfiles(source, tmp_path / "same", os.listdir(source), shallow=False)
    assert (different, missing) == ([], [])


def test_prepare_finds_the_special_tokens_of_an_import(prepared):
    data = dataset.Dataset(prepared)
    assert (data.tokenizer().bos_id, data.tokenizer().eos_id) == (62, 63)
    assert data.train.read(0, 1) == [62]


def test_a_model_trained_from_an_import_and_resumed_keeps_its_files(with_files, prepared, tmp_path, shared_trainers):
    """New are config.json and the model card, which describe the weights, and the class in tokenizer_config.json."""
    _, work = with_files
    c = config_files.load(f"configs/start.py:memory@{work}")
    c.steps, c.batch_size, c.seq_len, c.checkpoint.every, c.log.tensorboard = 2, 2, 32, 1, False
    c.data.path, c.eval.batches, c.sample.tokens, c.optimizer.warmup_steps = prepared, 1, 0, 0
    run = str(tmp_path / "run")
    for out in ("started", "resumed"):
        assert loop.train(resolve(c), run, jax.devices()[:1]) == 0
        export_model(run, str(tmp_path / out))
        shutil.rmtree(f"{run}/2")  # so that the second goes on from step 1
        for name, content in KEPT_FILES.items():
            if name != "tokenizer_config.json":
                assert (tmp_path / out / name).read_bytes() == content
        settings = json.load(open(tmp_path / out / "tokenizer_config.json"))
        assert (settings["tokenizer_class"], settings["eos_token"]) == ("PreTrainedTokenizerFast", "<b>")
        assert json.load(open(tmp_path / out / "config.json"))["model_type"] == "memoryllm"
