"""Exported models in transformers give our logits and texts, with live FFN-M and with a ToL file."""

import functools
import json
import struct

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

        def load(tol=None):
            return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tol=tol)

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


def test_a_tol_file_of_other_weights_is_refused(exported, lab):
    _, _, load = exported("memory")
    with pytest.raises(ValueError, match="decoder_digest: expected"):
        load(lab.tol("memory"))


def test_a_damaged_row_is_refused(exported, tmp_path):
    workdir, _, load = exported("memory")
    tol = tmp_path / "tol"
    compress.precompute(workdir, str(tol), compress.Options())
    raw = bytearray(tol.read_bytes())
    (length,) = struct.unpack_from("<Q", raw)
    start, end = json.loads(raw[8 : 8 + length])["rows.0"]["data_offsets"]
    raw[8 + length + start : 8 + length + end] = bytes(end - start)
    tol.write_bytes(raw)
    with pytest.raises(ValueError, match=r"the row of token .* is damaged"):
        their_logits(load(str(tol)), IDS)


def test_the_exported_tokenizer_gives_our_ids(transformers, exported):
    workdir, folder, _ = exported("memory")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "A string is\ta sequence, of\n\n  12 ünits"
    with float32_engine(workdir) as engine:
        prompt = engine.prompt(text)
        assert theirs(text).input_ids == prompt
        assert theirs.decode(prompt, skip_special_tokens=True) == engine.tokenizer.decode(prompt)
