"""Export: the files and dtypes that it writes, and the models and arguments that it refuses."""

import contextlib
import filecmp
import json
import os
import re
import shutil

import numpy as np
import pytest
from lab import GOLDEN, write_untrained
from safetensors.numpy import load_file, save_file
from sides import write_sentencepiece

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import tokenizer_conversion
from memoryllm_jax.hf import config_json, tensor_names
from memoryllm_jax.hf.export import export_model
from memoryllm_jax.hf.import_ import import_model


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The workdir of the golden flex model, imported."""
    workdir = str(tmp_path_factory.mktemp("imported") / "flex")
    import_model(f"{GOLDEN}/flex", workdir)
    return workdir


def files_in(folder, ending=".safetensors"):
    return sorted(name for name in os.listdir(folder) if name.endswith(ending))


def test_one_file_has_the_bytes_that_transformers_writes(imported, tmp_path):
    out = str(tmp_path / "out")
    export_model(imported, out)
    assert files_in(out) == ["model.safetensors"]
    assert filecmp.cmp(f"{GOLDEN}/flex/model.safetensors", f"{out}/model.safetensors", shallow=False)


def test_several_files_together_hold_every_tensor_once(imported, tmp_path):
    """A stacked parameter is spread over files, and the index names the file of each tensor."""
    out = str(tmp_path / "out")
    export_model(imported, out, file_bytes=8000)
    files = files_in(out)
    assert len(files) > 3
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    golden = load_file(f"{GOLDEN}/flex/model.safetensors")
    found = {}
    index = json.load(open(f"{out}/model.safetensors.index.json"))
    for file in files:
        tensors = load_file(f"{out}/{file}")
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 8000
        assert {index["weight_map"][name] for name in tensors} == {file}
        found |= tensors
    assert found.keys() == golden.keys() == index["weight_map"].keys()
    for name, tensor in golden.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in golden.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_rounds_each_tensor(imported, tmp_path, dtype):
    import ml_dtypes  # teaches NumPy the name bfloat16
    import safetensors

    out = str(tmp_path / "out")
    export_model(imported, out, dtype)
    with safetensors.safe_open(f"{out}/model.safetensors", framework="flax") as file:
        for name, tensor in load_file(f"{GOLDEN}/flex/model.safetensors").items():
            expected = tensor.astype(getattr(ml_dtypes, dtype, dtype))
            np.testing.assert_array_equal(np.asarray(file.get_tensor(name)), expected)
    assert json.load(open(f"{out}/config.json"))["torch_dtype"] == dtype


@pytest.mark.parametrize("symbols, name", [([], "tokenizer.json"), (["<sep>"], "tokenizer.model")])
def test_transformers_makes_the_same_ids_of_a_text(transformers, tmp_path, symbols, name):
    """Also where the imported tokenizer_config.json names a class for another tokenizer file."""
    source, work, out = (str(tmp_path / folder) for folder in ("source", "work", "out"))
    os.mkdir(source)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(f"{GOLDEN}/base/{file}", source)
    tensors = load_file(f"{source}/model.safetensors")
    for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[tensor] = np.resize(tensors[tensor], (400, 16))
    save_file(tensors, f"{source}/model.safetensors", {"format": "pt"})
    settings = json.load(open(f"{source}/config.json"))
    json.dump(settings | {"vocab_size": 400}, open(f"{source}/config.json", "w"))
    kept = {"tokenizer_class": "LlamaTokenizer", "sp_model_kwargs": {"add_bos": True}, "chat_template": "hello"}
    json.dump(kept, open(f"{source}/tokenizer_config.json", "w"))
    write_sentencepiece(f"{source}/tokenizer.model", control_symbols=["<ctl>"], user_defined_symbols=symbols)
    import_model(source, work)
    assert re.search(f"; {name} (gives the ids|stays a SentencePiece model)", export_model(work, out))

    theirs = transformers.AutoTokenizer.from_pretrained(out)
    with contextlib.closing(TrainedModel(work)) as model:
        ours = model.tokenizer
    assert theirs.chat_template == "hello"
    spelled = " a".join(["x", *ours.special_tokens, "", "y"])
    for text in [spelled, *tokenizer_conversion.compared_texts(ours)]:
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode_special(text)], text


def test_the_tokenizer_of_a_memory_model_needs_no_code(transformers, tmp_path):
    """An imported tokenizer_config.json may name a class in code that is not exported, or one that makes other ids."""
    tokenizers = pytest.importorskip("tokenizers")
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    shutil.copytree(f"{GOLDEN}/memory", source)
    kept = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}, "chat_template": "hello"}
    json.dump(kept, open(f"{source}/tokenizer_config.json", "w"))
    import_model(source, str(tmp_path / "work"))
    export_model(str(tmp_path / "work"), out)
    theirs = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    text = "AB  C"
    assert theirs(text).input_ids == tokenizers.Tokenizer.from_file(f"{source}/tokenizer.json").encode(text).ids
    assert theirs.chat_template == "hello"


def test_an_import_of_an_earlier_version_opens_and_exports(tmp_path):
    """Its description also holds names, dtypes and order of the imported tensors, which export ignores."""
    import_model(f"{GOLDEN}/base", str(tmp_path / "old"))
    with contextlib.closing(TrainedModel(str(tmp_path / "old"))) as model:
        names = list(tensor_names.tensors(model.config))
    texts = {"config.json": open(f"{GOLDEN}/base/config.json").read(), "model.safetensors.index.json": "{}"}
    path = tmp_path / "old/0/description/metadata"
    tree = json.loads(path.read_text())
    del tree["checksum"], tree["digests"]
    tree["source"] |= {
        "shards": [{"file": "a.safetensors", "tensors": [[n, "F32"] for n in names], "metadata": None}],
        "dtypes": ["float32"],
        "dtype": "float32",
        "of_these_weights": texts,
    }
    path.write_text(json.dumps(tree))
    export_model(str(tmp_path / "old"), str(tmp_path / "out"))
    assert files_in(tmp_path / "out") == ["model.safetensors"] and files_in(tmp_path / "out", "index.json") == []
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(f"{GOLDEN}/base/{name}", tmp_path / "out" / name, shallow=False)


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(f"{GOLDEN}/base/model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1e6}, source / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (source / name).write_bytes(open(f"{GOLDEN}/base/{name}", "rb").read())
    import_model(str(source), str(tmp_path / "work"))
    message = "^dtype: expected bfloat16 or float32, as values of tensor model.norm.weight exceed 65504, found float16"
    with pytest.raises(UserError, match=message):
        export_model(str(tmp_path / "work"), str(tmp_path / "out"), "float16")
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]  # neither out nor out.part


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("dtype", "int8", "^dtype: expected one of float32, bfloat16, float16, found 'int8'"),
        ("output", "gs://b/out", "^output: expected a local folder, found the URL gs://b/out"),
        ("output", GOLDEN, "^output: expected a folder that does not exist yet or is empty"),
        ("step", 7, "^step: expected one of 0 in .*, found 7"),
        ("workdir", "nowhere", "nowhere: expected a folder with checkpoints, found none"),
    ],
)
def test_arguments_are_refused_by_name(imported, tmp_path, name, value, message):
    arguments = {"workdir": imported, "output": str(tmp_path / "out"), name: value}
    with pytest.raises(UserError, match=message):
        export_model(**arguments)


def test_only_what_an_export_left_is_removed_from_the_folder_that_is_filled_first(imported, tmp_path):
    out, part = str(tmp_path / "out"), tmp_path / "out.part"
    part.mkdir()
    (part / "notes.txt").write_text("not from an export")
    with pytest.raises(UserError, match=r"^output: expected nothing at .*out.part, where export writes first"):
        export_model(imported, out)
    lock = storage.lock_folder(str(part))
    with pytest.raises(UserError, match=r"out.part: in use by another run"):
        export_model(imported, out)
    assert not os.path.exists(out) and (part / "notes.txt").exists()
    lock.close()  # as after a kill
    export_model(imported, out)
    assert "notes.txt" not in os.listdir(out) and ".lock" not in os.listdir(out) and not part.exists()


def test_a_base_that_is_no_llama_is_refused(make_config, tmp_path):
    model = make_config("base", **{"model.logit_softcap": 30.0}).model
    with pytest.raises(UserError, match=r"config.model.logit_softcap: expected 0, as Llama has none, found 30"):
        config_json.to_json(model, 64, "float32", {})
    write_untrained(make_config("base", **{"model.norm": "layernorm"}), str(tmp_path / "work"))
    with pytest.raises(UserError, match=r"config.model.norm: expected rmsnorm, as Llama has no other, found layernorm"):
        export_model(str(tmp_path / "work"), str(tmp_path / "out"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]
