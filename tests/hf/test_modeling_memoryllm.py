"""Exported models in transformers give our logits and texts, with live FFN-M and with a ToL file."""

import copy
import functools
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
from lab import GOLDEN
from sides import IDS, float32_engine, our_logits, our_text, their_logits, their_text

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


@pytest.mark.parametrize("name, exported_as", [("memory", "float16"), ("flex", "float32")])
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


@pytest.mark.parametrize("name", ["memory", "flex"])
def test_a_model_with_a_tol_file_is_copied_saved_and_loaded_again(exported, tol_of, tmp_path, name):
    import torch

    _, folder, load = exported(name)
    tol, source, saved = tol_of(name), str(tmp_path / "source"), str(tmp_path / "saved")
    shutil.copytree(folder, source)
    model = load(tol, source, token="secret")
    pickled = pickle.dumps(model)
    assert b"secret" not in pickled
    copies = {"copy": copy.deepcopy(model), "pickle": pickle.loads(pickled)}
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


def test_the_exported_tokenizer_gives_our_ids(transformers, exported):
    workdir, folder, _ = exported("memory")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = "A string is\ta sequence, of\n\n  12 ünits"
    with float32_engine(workdir) as engine:
        prompt = engine.prompt(text)
        assert theirs(text).input_ids == prompt
        assert theirs.decode(prompt, skip_special_tokens=True) == engine.tokenizer.decode(prompt)


def test_the_code_of_an_export_needs_torch_transformers_and_numpy_alone(exported):
    from transformers.dynamic_module_utils import get_imports

    _, folder, _ = exported("memory")
    needed = {name for path in pathlib.Path(folder).glob("*.py") for name in get_imports(path)}
    assert needed - sys.stdlib_module_names == {"numpy", "torch", "transformers"}
