"""Conversion of other tokenizers to tokenizer.json, and which ids of a tokenizer.json begin and end a text."""

import base64
import functools
import itertools
import json
import os
import re

import pytest
from sides import write_sentencepiece, write_tokenizer

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset, documents, tokenizer, tokenizer_conversion


def write_llama3(path):
    """Writes ranks as Llama 3's tokenizer.model has them."""
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"he", b"the", b" the", b"in", b"ing", b" a", b"12", b"123"]
    path.write_bytes(b"\n".join(base64.b64encode(t) + b" " + str(i).encode() for i, t in enumerate(ranks)))


def test_tokenizers_become_tokenizer_json(data_path, tmp_path):
    """A converted SentencePiece model and converted Llama 3 ranks give the same ids and texts as the originals."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "".join(t for t, _ in itertools.islice(documents.read("embedded"), 3)) + "\t\x00 é漢字🙂 \n\n   x  1234567"
    write_llama3(tmp_path / "llama3.model")
    write_sentencepiece(tmp_path / "llama2.model")
    for ours in (
        dataset.Dataset(data_path).tokenizer(),
        tokenizer.load(f"llama3:{tmp_path}/llama3.model"),
        tokenizer.load(f"sentencepiece:{tmp_path}/llama2.model"),
    ):
        made = tokenizer_conversion.to_files(ours, 64)
        assert (made.name, made.note) == ("tokenizer.json", EXACT)
        theirs = tokenizers.Tokenizer.from_str(made.content.decode())
        for piece in [text[i : i + 500] for i in range(0, len(text), 500)]:
            ids = theirs.encode(piece).ids
            assert ids[0] == ours.bos_id and ids[1:] == ours.encode(piece), piece
            assert theirs.decode(ids) == ours.decode(ids[1:]) == piece
        spelled = " a".join(["x", *ours.special_tokens, "", "y"])
        assert theirs.encode(spelled).ids[1:] == ours.encode_special(spelled) != ours.encode(spelled)


EXACT = "tokenizer.json gives the ids of the training's tokenizer on 300 texts"


@pytest.mark.parametrize(
    "options, problem",
    [
        (
            {"user_defined_symbols": ["<sep>"]},
            "tokenizer.json would give other ids or texts for .* of 300 texts, such as",
        ),
        ({"normalization_rule_name": "nmt_nfkc"}, "tokenizer.json would give other ids or texts for .* of 300 texts"),
        ({"treat_whitespace_as_suffix": True}, "tokenizer.json would give other ids or texts for .* of 300 texts"),
        ({"model_type": "unigram"}, "it is not of type BPE"),
    ],
)
def test_a_sentencepiece_model_that_tokenizer_json_cannot_express_stays_as_it_is(tmp_path, options, problem):
    """tests/hf/test_export.py lets transformers read it."""
    write_sentencepiece(tmp_path / "tokenizer.model", **options)
    ours = tokenizer.load(f"sentencepiece:{tmp_path}/tokenizer.model")
    made = tokenizer_conversion.to_files(ours, 64)
    assert (made.name, made.content) == ("tokenizer.model", ours.content)
    assert re.match(f"tokenizer.model stays a SentencePiece model, as {problem}", made.note), made.note


def test_a_piece_that_is_not_utf8_is_refused(tmp_path):
    write_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["<sep>"])
    damaged = (tmp_path / "tokenizer.model").read_bytes().replace(b"<sep>", b"<s\xffp>")
    with pytest.raises(UserError, match=r"tokenizer: piece 3: expected UTF-8, found b'<s\\xffp>'"):
        tokenizer_conversion.to_files(tokenizer.Tokenizer("sentencepiece", damaged, "file"), 64)


def test_compared_texts_hold_each_user_defined_symbol_and_stay_the_same(tmp_path):
    write_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["<sep>", "A B"])
    ours = tokenizer.load(f"sentencepiece:{tmp_path}/tokenizer.model")
    texts = tokenizer_conversion.compared_texts(ours)
    assert len(texts) == 300 and {"<sep>", "aA Bb"} <= set(texts)
    assert texts == tokenizer_conversion.compared_texts(ours)


def test_a_conversion_that_is_not_exact_is_refused_for_other_kinds(tmp_path, monkeypatch):
    write_llama3(tmp_path / "llama3.model")
    monkeypatch.setattr(tokenizer, "LLAMA3_PATTERN", r"\p{L}+|[^\p{L}]")
    ours = tokenizer.load(f"llama3:{tmp_path}/llama3.model")
    monkeypatch.undo()
    problem = "^tokenizer: expected a llama3 tokenizer that can be exported; tokenizer.json would give other ids"
    with pytest.raises(UserError, match=problem):
        tokenizer_conversion.to_files(ours, 64)


def test_a_tokenizer_json_is_kept_to_the_byte(tmp_path):
    write_tokenizer(tmp_path, put_before="<s>")
    made = tokenizer_conversion.to_files(tokenizer.load(f"hf:{tmp_path}/tokenizer.json"), 64)
    assert (made.name, made.content) == ("tokenizer.json", (tmp_path / "tokenizer.json").read_bytes())
    assert (made.settings["bos_token"], made.settings["model_max_length"]) == ("<s>", 64)


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


def panicking(tree):
    tree["post_processor"]["special_tokens"] = {}


def with_huge_id(tree):
    tree["model"]["vocab"]["!"] = 2**32 - 1


def with_foreign_id(tree):
    tree["post_processor"]["special_tokens"]["<s>"]["ids"] = [10**9]


@pytest.mark.parametrize(
    "change, problem",
    [
        (panicking, "expected a valid tokenizer.json, found one that tokenizers fails on"),
        (with_huge_id, "expected from 1 to 16,777,216 ids in tokenizer.json, found 4,294,967,296"),
        (with_foreign_id, "expected ids below 64 in tokenizer.json's post_processor, found 1000000000"),
    ],
)
def test_a_tokenizer_json_that_contradicts_itself_is_refused(tmp_path, change, problem):
    write_tokenizer(tmp_path, put_before="<s>")
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    change(tree)
    with pytest.raises(UserError, match=f"tokenizer: {problem}"):
        tokenizer.Tokenizer("hf", json.dumps(tree).encode(), "file")


@pytest.mark.parametrize("text", ["[]", '{"eos_token": 3}', '{"eos_token": {"content": null}}', "[" * 9999])
def test_a_damaged_tokenizer_config_is_refused_by_its_name(tmp_path, text):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer_config.json: .*found"):
        tokenizer.load(f"hf:{tmp_path}/tokenizer.json")
