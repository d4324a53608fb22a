"""The three kinds of tokenizers."""

import base64

import pytest

from memoryllm_jax.data import tokenizer

TEXT = "Tabs\tand  two spaces,\n\n  an é, 漢字 and \U0001f600; 12345 it's I'LL \r\n end.   \n"


def test_trained_sentencepiece_is_reversible(data_path):
    model = tokenizer.load(f"sentencepiece:{data_path}/tokenizer.model")
    assert model.vocab_size == 512 and model.decode(model.encode(TEXT)) == TEXT
    assert tokenizer.Tokenizer.from_json(model.to_json()).encode(TEXT) == model.encode(TEXT)


def test_llama3_and_hf_tokenizers_agree(tmp_path):
    """A byte-level vocabulary in Llama 3's file format and in tokenizer.json gives the same ids and specials."""
    pytest.importorskip("tiktoken")
    tokenizers = pytest.importorskip("tokenizers")

    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"i", b"n"), (b"a", b"n"), (b"an", b"d"), (b"\n", b"\n")]
    ranks = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (tmp_path / "llama3.model").write_bytes(lines)
    llama = tokenizer.load(f"llama3:{tmp_path}/llama3.model")
    assert llama.vocab_size == len(ranks) + 256
    assert (llama.bos_id, llama.eos_id) == (len(ranks), len(ranks) + 1)

    alphabet = _bytes_to_unicode()
    spell = lambda token: "".join(alphabet[b] for b in token)  # noqa: E731
    model = tokenizers.models.BPE({spell(t): i for i, t in enumerate(ranks)}, [(spell(a), spell(b)) for a, b in merges])
    hf = tokenizers.Tokenizer(model)
    pattern = tokenizers.Regex(tokenizer.LLAMA3_PATTERN)
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(pattern, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(f"hf:{tmp_path}/tokenizer.json")
    text = TEXT + " the and in the\n\nthe thin man " * 5
    assert ours.encode(text) == llama.encode(text) and len(set(ours.encode(text)) & set(range(256, 263))) == 7
    assert (ours.bos_id, ours.eos_id) == (llama.bos_id, llama.eos_id)
    assert llama.decode(llama.encode(text)) == ours.decode(ours.encode(text)) == text
    long = "a" * 30_000 + " " * 30_000 + "b" * 500_000
    assert llama.decode(llama.encode(long)) == long


def _bytes_to_unicode():
    """The alphabet of byte-level BPE: printable bytes stand for themselves, others become characters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {b: chr(b) if b in printable else chr(next(others)) for b in range(256)}


def test_spellings_in_the_vocabulary_of_a_unigram_model_stay_text(tmp_path):
    """The library's own option would still find them there; a prompt parses them."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -3.0) for piece in ("▁", "a", "<", "/", "s", ">"))]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.add_special_tokens(["</s>", "<unk>"])
    library.save(f"{tmp_path}/tokenizer.json")
    ours = tokenizer.load(f"hf:{tmp_path}/tokenizer.json")
    assert ours.encode("a</s>") == [2, 3, 4, 5, 6, 7] and ours.encode_prompt("a</s>") == [2, 3, 1]
    assert tokenizer.Tokenizer.from_json(ours.to_json()).encode("a</s>") == ours.encode("a</s>")
    before = {key: value for key, value in ours.to_json().items() if key != "special_tokens_in_text"}
    assert tokenizer.Tokenizer.from_json(before).encode("a</s>") == [2, 3, 1]  # as checkpoints of version 0.1.0


def test_a_small_vocabulary_gives_up_the_rarest_characters(capsys):
    words = ["the quick brown fox jumps over the lazy dog " * 20] * 20
    rare = ["".join(map(chr, range(0x4E00, 0x4E00 + 100)))]  # more than there are ids
    trained = tokenizer.train_sentencepiece(lambda: [*words, *rare], 310, 1)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"310 ids have no room for the characters of {share}% of the text" for share in ("99.99", "99.90")]
    assert trained.vocab_size == 310
    for text in (words[0], rare[0]):
        assert trained.decode(trained.encode(text)) == text
    assert len(trained.encode(rare[0])) > 200  # most characters are three bytes
