"""Conversion of other tokenizers to tokenizer.json, and which ids of a tokenizer.json begin and end a text."""

import base64
import functools
import itertools
import os

import pytest
from sides import write_tokenizer

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset, documents, tokenizer, tokenizer_conversion


def test_tokenizers_become_tokenizer_json(data_path, tmp_path):
    """A converted SentencePiece model and converted Llama 3 ranks give the same ids and texts as the originals."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "".join(t for t, _ in itertools.islice(documents.read("embedded"), 3)) + "\t\x00 é漢字🙂 \n\n   x  1234567"
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"he", b"the", b" the", b"in", b"ing", b" a", b"12", b"123"]
    lines = b"\n".join(base64.b64encode(t) + b" " + str(i).encode() for i, t in enumerate(ranks))
    (tmp_path / "llama3.model").write_bytes(lines)
    for ours in (dataset.Dataset(data_path).tokenizer(), tokenizer.load(f"llama3:{tmp_path}/llama3.model")):
        theirs = tokenizers.Tokenizer.from_str(tokenizer_conversion.to_json(ours, 64)[0].decode())
        for piece in [text[i : i + 500] for i in range(0, len(text), 500)]:
            ids = theirs.encode(piece).ids
            assert ids[0] == ours.bos_id and ids[1:] == ours.encode(piece), piece
            assert theirs.decode(ids) == ours.decode(ids[1:]) == piece
        spelled = " a".join(["x", *ours.special_tokens, "", "y"])
        assert theirs.encode(spelled).ids[1:] == ours.encode_special(spelled) != ours.encode(spelled)


def test_a_tokenizer_json_is_kept_to_the_byte(tmp_path):
    write_tokenizer(tmp_path, put_before="<s>")
    content, settings = tokenizer_conversion.to_json(tokenizer.load(f"hf:{tmp_path}/tokenizer.json"), 64)
    assert content == (tmp_path / "tokenizer.json").read_bytes()
    assert (settings["bos_token"], settings["model_max_length"]) == ("<s>", 64)


def test_special_tokens_of_a_tokenizer_json(tmp_path):
    """bos is the token that it puts before a text, eos the one in tokenizer_config.json; otherwise common spellings."""
    write_tokenizer(tmp_path)
    load = functools.partial(tokenizer.load, f"hf:{tmp_path}/tokenizer.json")
    assert (load().bos_id, load().eos_id) == (62, 63)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<s>"}')
    assert (load().bos_id, load().eos_id) == (None, 62)
    write_tokenizer(tmp_path, ("<x>", "<y>"), put_before="<y>")
    with pytest.raises(UserError, match=r"tokenizer_config.json: eos_token: expected one token, found '<s>' = #"):
        load()
    os.remove(tmp_path / "tokenizer_config.json")
    assert (load().bos_id, load().eos_id) == (63, None)
