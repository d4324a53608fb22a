"""Long texts have the ids that the library gives for the whole text."""

import io
import itertools

import pytest
import sentencepiece
from sides import write_tokenizer

from memoryllm_jax.data import documents, long_texts, tokenizer


@pytest.fixture(scope="module")
def prose():
    """60,000 characters on one line."""
    text = "".join(text for text, _ in itertools.islice(documents.read("embedded"), 30))
    return text.replace("\n", " ")[:60_000]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(long_texts, "PIECE_CHARS", 20_000)
    monkeypatch.setattr(long_texts, "RUN_CHARS", 5_000)
    monkeypatch.setattr(long_texts, "CONTEXT", 300)


@pytest.fixture(scope="module")
def model(prose):
    """A SentencePiece model with a dummy prefix, as of Llama 2 and Mistral."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose[i : i + 1000] for i in range(0, 40_000, 1000)),
        model_writer=file,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return file.getvalue()


# A run of one character falls into tokens from its beginning, however far that is from a cut.
@pytest.mark.parametrize("run", ["", "a", " ", "=", "\n", "漢"])
def test_pieces_give_the_ids_of_the_whole_text(prose, model, run):
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = prose[:1000] + run * 12_001 + "x" if run else prose + "".join(prose[:20_000].split())
    assert tokenizer.Tokenizer("sentencepiece", model, "test").encode(text) == library.encode(text)


def test_a_tokenizer_json_with_a_prefix_gives_the_ids_of_the_whole_text(prose, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json")
    library.normalizer = tokenizers.normalizers.Prepend("#")
    library.save(f"{tmp_path}/tokenizer.json")
    text = prose.upper()
    ids = tokenizer.load(f"hf:{tmp_path}/tokenizer.json").encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids and ids.count(ord("#") - 32) == text.count("#") + 1
