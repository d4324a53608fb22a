"""Exported models in transformers give our logits and texts, with live FFN-M and with a ToL file."""

import copy
import functools
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from lab import GOLDEN
from sides import IDS, float32_engine, our_logits, our_text, their_logits, their_text

from memoryllm_jax.checkpoint import trained
from memoryllm_jax.hf.export import export_model
from memoryllm_jax.hf.import_ import import_model
from memoryllm_jax.tol import compress


@pytest.fixture(scope="module")
def exported(transformers, untrained, tmp_path_factory):
    """exported(name): (workdir, exported folder, load); load(tol) opens the folder in transformers."""

    @functools.cache
    def make(name):
        folder = str(tmp_path_factory.mktemp("exported") / name)
        export_model(untrained(name), folder, file_bytes=1 << 16)

        def load(tol=None, folder=folder, **more):
            return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tol=tol, **more)

        return untrained(name), folder, load

    return make


@pytest.fixture(scope="module")
def tol_of(untrained, tmp_path_factory):
    """tol_of(name): a ToL file of an exported model, in bfloat16."""

    @functools.cache
    def make(name):
        path = str(tmp_path_factory.mktemp("tol") / name)
        compress.precompute(untrained(name), path, compress.Options())
        return path

    return make


@pytest.mark.parametrize("name", ["base", "memory", "flex"])
def test_transformers_gives_golden_logits_and_text(transformers, name, tmp_path):
    import_model(f"{GOLDEN}/{name}", str(tmp_path / "work"))
    export_model(str(tmp_path / "work"), str(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), trust_remote_code=name != "base")
    np.testing.assert_allclose(their_logits(model, IDS), np.load(f"{GOLDEN}/{name}/logits.npy"), atol=1e-5)
    assert their_text(model, IDS[0].tolist(), 8) == np.load(f"{GOLDEN}/{name}/text.npy").tolist()


@pytest.mark.parametrize("name", ["memory", "flex"])
def test_live_ffns_and_a_tol_file_give_our_logits_and_text(exported, name, tmp_path):
    workdir, _, load = exported(name)
    tol = str(tmp_path / "tol")
    compress.precompute(workdir, tol, compress.Options(bits="32"))
    with float32_engine(workdir) as engine:
        logits, text = our_logits(engine, IDS), our_text(engine, IDS[0].tolist(), 8)
    looked_up = load(tol)
    assert not [n for n, _ in looked_up.named_parameters() if ".memory." in n]
    assert np.abs(logits).max() > 1
    for model in (load(), looked_up):
        np.testing.assert_allclose(their_logits(model, IDS), logits, atol=1e-4)
        assert their_text(model, IDS[0].tolist(), 8) == text


@pytest.mark.parametrize("name", ["memory", "flex"])
def test_compressed_rows_give_our_text(exported, name, tmp_path):
    """Quantised rows of half rank, with a dropped layer. Rows of memory, whose embedding is untied, hold X_0 too."""
    workdir, _, load = exported(name)
    tol = str(tmp_path / "tol")
    compress.precompute(workdir, tol, compress.Options(bits="5", rank="0.5", drop_layers=("1",)))
    with float32_engine(workdir, tol) as engine:
        text = our_text(engine, IDS[0].tolist(), 8)
    assert their_text(load(tol), IDS[0].tolist(), 8) == text


@pytest.mark.parametrize("name", ["memory", "flex"])
@pytest.mark.parametrize("exported_as", ["float32", "float16"])
def test_the_digest_of_loaded_weights_is_that_of_the_tol_file(exported, tol_of, tmp_path, name, exported_as):
    """From weights that were exported and loaded in any dtype; not from other weights."""
    import torch

    workdir, folder, load = exported(name)
    tol = tol_of(name)
    if exported_as != "float32":
        folder = str(tmp_path / "out")
        export_model(workdir, folder, exported_as)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert load(tol, folder, dtype=dtype).model.tol_is_checked
    model = load(folder=folder)
    with torch.no_grad():
        model.model.norm.weight[3] *= 1.01  # more than bfloat16 rounds off
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"decoder_digest: expected [0-9a-f]{64}, that of the model's weights, found"):
        load(tol, tmp_path / "tuned")


def test_the_hashes_of_large_matrices_are_those_of_jax(modeling):
    """Of several parts, with tiny and huge values, in the layouts of both."""
    import torch

    bits = np.random.default_rng(0).integers(0, 2**32, (20000, 6), dtype=np.uint32)
    x = np.nan_to_num(bits.view(np.float32), posinf=0, neginf=0)
    heads = x[:18000].reshape(6000, 3, 6)
    for name, torch_side, ours in (
        ("head", x, x),
        ("layers/ffn/down", x.T.copy(), x),
        ("layers/attention/out", heads.reshape(-1, 6).T.copy(), heads),
        ("final_norm/scale", x[:, 0].copy(), x[:, 0]),
    ):
        assert modeling._hashes(name, torch.from_numpy(torch_side), ours.shape) == trained._sums(ours)


@pytest.mark.parametrize("name", ["memory", "flex"])
def test_a_model_with_a_tol_file_is_copied_saved_and_loaded_again(exported, tol_of, tmp_path, name):
    import torch

    _, folder, load = exported(name)
    tol, source, saved = tol_of(name), str(tmp_path / "source"), str(tmp_path / "saved")
    shutil.copytree(folder, source)
    model = load(tol, source)
    copies = {"copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    model.save_pretrained(saved)
    settings = open(f"{saved}/config.json").read()
    assert source not in settings and tol not in settings
    copies["saved"] = load(tol, saved)
    for how, other in copies.items():
        np.testing.assert_array_equal(their_logits(other, IDS), their_logits(model, IDS), how)
    live, again = load().state_dict(), load(folder=saved).state_dict()
    assert live.keys() == again.keys() and all(torch.equal(live[key], again[key]) for key in live)
    shutil.rmtree(source)
    with pytest.raises(ValueError, match=f"^save_pretrained: expected FFN-M's weights in {source}, from where"):
        model.save_pretrained(saved)


def test_auto_model_loads_the_decoder_and_fits_vllm(exported, transformers):
    _, folder, load = exported("flex")
    model, info = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(model).is_backend_compatible() and model.supports_tp_plan and not model.supports_pp_plan
    model.eval(), (whole := load().model).eval()
    ids = ids_of(IDS)
    np.testing.assert_array_equal(model(ids).last_hidden_state.detach(), whole(ids).last_hidden_state.detach())
    # Every matrix of FFN-M has a rule, and the halves that the rules make add up to the whole.
    memory, plan = whole.layers[1].memory, model.config.base_model_tp_plan
    styles = {name: plan.get(f"layers.*.memory.{name}") for name, child in memory.named_children() if "proj" in name}
    assert styles == {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    x0 = whole.embed_tokens(ids)
    halves = [copy.deepcopy(memory), copy.deepcopy(memory)]
    for name, style in styles.items():
        parts = getattr(memory, name).weight.data.chunk(2, 0 if style == "colwise" else 1)
        for half, part in zip(halves, parts):
            getattr(half, name).weight.data = part
    np.testing.assert_allclose(sum(half(x0) for half in halves).detach(), memory(x0).detach(), atol=1e-5)
    whole.layers[0] = type(whole.norm)(32)  # as pipeline parallelism replaces the layers of other stages
    with pytest.raises(ValueError, match=r"^pipeline parallelism: expected all layers in one stage"):
        whole(ids)


def ids_of(ids):
    import torch

    return torch.tensor(np.asarray(ids, np.int64))


@pytest.mark.parametrize("with_tol", [False, True])
def test_training_with_checkpointed_activations_has_the_same_gradients(exported, tol_of, with_tol):
    """Also for the embedding, which FFN-M of every layer reads, and in the reentrant form."""
    _, _, load = exported("memory")
    tol = tol_of("memory") if with_tol else None
    ids = ids_of(IDS)
    gradients = []
    for reentrant in (None, False, True):
        model = load(tol).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.numpy() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert np.abs(expected).max() > 0, name
        for found in gradients[1:]:
            np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)


def test_a_compiled_model_reads_the_tol_file_in_one_graph_and_wrong_ids_are_refused(exported, tol_of):
    import torch

    _, _, load = exported("memory")
    model = load(tol_of("memory"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        np.testing.assert_array_equal(compiled(ids_of(IDS)).logits, model(ids_of(IDS)).logits)
    vocab_size = model.config.vocab_size
    for wrong in (-1, vocab_size):
        for called in (model, compiled, load()):
            message = f"^input_ids: expected ids from 0 to {vocab_size - 1}, found {wrong}"
            with torch.no_grad(), pytest.raises(ValueError, match=message):
                called(ids_of([[3, wrong] + 10 * [4], 12 * [5]]))


def test_the_modeling_file_needs_torch_transformers_and_numpy_alone(modeling):
    from transformers.dynamic_module_utils import get_imports

    needed = set(get_imports(modeling.__file__)) - sys.stdlib_module_names
    assert needed == {"numpy", "torch", "transformers"}


@pytest.fixture
def modeling(transformers):
    from memoryllm_jax.hf import modeling_memoryllm

    return modeling_memoryllm


class Header(NamedTuple):
    """The content of a ToL file, the length of its header, and a function that opens a changed copy."""

    raw: bytes
    length: int
    open_changed: Callable
    open: Callable


@pytest.fixture
def tol_header(modeling, exported, tol_of, tmp_path):
    """Header of a ToL file; open_changed(change) opens a copy changed by change({"header", "metadata", "layout"})."""
    raw = open(tol_of("memory"), "rb").read()
    (length,) = struct.unpack_from("<Q", raw)
    config = modeling.MemoryLLMConfig.from_pretrained(exported("memory")[1])

    def open_bytes(content):
        path = tmp_path / "changed"
        path.write_bytes(content)
        return modeling.Tol(str(path), config)

    def open_changed(change):
        header = json.loads(raw[8 : 8 + length])
        metadata = header["__metadata__"]
        del metadata["header_checksum"]  # as in files of earlier versions
        trees = {"header": header, "metadata": metadata, "layout": json.loads(metadata["layout"])}
        change(trees)
        metadata["layout"] = json.dumps(trees["layout"])
        text = json.dumps(header).encode()
        return open_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return Header(raw, length, open_changed, open_bytes)


def set_at(*keys, value):
    """A change of {"header", "metadata", "layout"}: sets the value at the end of the keys."""

    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (set_at("layout", "layers", value=5_000_000), "layers: expected a whole number from 2 to 2, found 5000000"),
        (set_at("layout", "dim", value=2.0**40), "dim: expected a whole number from 32 to 32, found 1099511627776.0"),
        (
            set_at("layout", "has_x0", value=False),
            "has_x0: expected True, as the model's embeddings demand, found False",
        ),
        (set_at("layout", "tiers", value={}), "tiers: expected a list, found a dict"),
        (set_at("layout", "tiers", 0, "rows", value=-512), "rows: expected a whole number from 1 to 512, found -512"),
        (set_at("layout", "tiers", 0, "parts", 0, "bands", 0, "bits", value=9), "bits: expected 2 to 8, 16 or 32"),
        (set_at("layout", "tiers", 0, "parts", 1, "name", value="x0"), "parts: expected some of x0 to ffn.1"),
        (set_at("layout", "tiers", 0, "parts", 1, "bands", value=[]), "bands: expected 32 elements, found 0"),
        (set_at("header", "rows.0", "shape", value=[-512, 96]), r"shape\[0\]: expected a whole number from 0"),
        (set_at("header", "rows.0", "data_offsets", value=[0.0, 1.0]), r"data_offsets\[0\]: expected a whole number"),
        (set_at("header", "checksums", "data_offsets", value=[0, 4096]), "data_offsets: expected .* first, found 0"),
        (set_at("header", "checksums", "dtype", value="F8"), "dtype: expected one of U8, BF16"),
        (set_at("header", "checksums", value=None), "checksums: expected an object, found None"),
        (set_at("metadata", "dropped_layers", value="[1]"), r"dropped_layers: expected \[\], as in the layout"),
        (set_at("metadata", "dropped_layers", value="[" * 10**5), "dropped_layers: expected JSON, found what cannot"),
        (set_at("metadata", "tensor_checksums", value="[]"), "tensor_checksums: expected an object, found a list"),
        (set_at("metadata", "vocab_size", value="513"), "vocab_size: expected 512, found 513"),
        (set_at("metadata", "version", value="2"), "version: expected 1, found 2"),
        (set_at("metadata", "step", value=3), "step: expected a text, found 3"),
        (set_at("metadata", "more", value="3"), "header_checksum: expected a checksum, found none"),
        (set_at("metadata", "header_checksum", value=""), "header_checksum: expected 16 hexadecimal digits, found ''"),
    ],
)
def test_headers_of_other_values_are_refused_by_file_and_field(tol_header, change, message):
    with pytest.raises(ValueError, match=f"/changed.*{message}"):
        tol_header.open_changed(change)


def test_a_file_of_an_earlier_version_opens_and_every_flip_in_a_header_is_found(tol_header):
    tol_header.open_changed(lambda trees: None)
    tol_header.open(tol_header.raw)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 8 + tol_header.length, 200):
        flipped = bytearray(tol_header.raw)
        flipped[at] ^= 1 << rng.integers(8)
        with pytest.raises(ValueError, match="/changed"):
            tol_header.open(bytes(flipped))


def test_a_damaged_row_is_refused(exported, tol_of, tmp_path):
    _, _, load = exported("memory")
    tol = tmp_path / "tol"
    raw = bytearray(open(tol_of("memory"), "rb").read())
    (length,) = struct.unpack_from("<Q", raw)
    start, end = json.loads(raw[8 : 8 + length])["rows.0"]["data_offsets"]
    raw[8 + length + start : 8 + length + end] = bytes(end - start)
    tol.write_bytes(raw)
    with pytest.raises(ValueError, match=r"the row of token .* is damaged"):
        their_logits(load(str(tol)), IDS)


def test_the_exported_tokenizer_gives_our_ids(transformers, exported):
    workdir, folder, _ = exported("memory")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = "A string is\ta sequence, of\n\n  12 ünits"
    with float32_engine(workdir) as engine:
        prompt = engine.prompt(text)
        assert theirs(text).input_ids == prompt
        assert theirs.decode(prompt, skip_special_tokens=True) == engine.tokenizer.decode(prompt)
