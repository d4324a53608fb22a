"""Documents read from files, on any path."""

import fsspec

from memoryllm_jax.data import documents


def test_documents_are_read_from_urls(corpus):
    for part in (0, 1):
        with fsspec.open(f"memory://bucket/part-{part}.jsonl", "wb") as file:
            file.write(b"".join(open(corpus, "rb").readlines()[part::2]))
    assert documents.expand("memory://bucket/*.jsonl") == [f"memory:///bucket/part-{part}.jsonl" for part in (0, 1)]
    read = [text for path in documents.expand("memory://bucket/*.jsonl") for text, _ in documents.read(path)]
    assert sorted(read) == sorted(text for text, _ in documents.read(corpus))


def test_the_embedded_corpus_has_megabytes_of_text():
    texts = [text for text, _ in documents.read("embedded")]
    assert len(texts) > 300 and sum(map(len, texts)) > 5_000_000
