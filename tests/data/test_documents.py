"""Documents out of files, on any path."""

import pytest

from memoryllm_jax.data import documents


def test_any_path_fsspec_reads(corpus, data_path):
    fsspec = pytest.importorskip("fsspec")
    for part in (0, 1):
        with fsspec.open(f"memory://bucket/part-{part}.jsonl", "wb") as file:
            file.write(b"".join(open(corpus, "rb").readlines()[part::2]))
    assert documents.expand("memory://bucket/*.jsonl") == [f"memory:///bucket/part-{part}.jsonl" for part in (0, 1)]
    read = [text for path in documents.expand("memory://bucket/*.jsonl") for text, _ in documents.read(path)]
    assert sorted(read) == sorted(text for text, _ in documents.read(corpus))


def test_documents_read_the_embedded_corpus():
    texts = [text for text, _ in documents.read("embedded")]
    assert len(texts) > 300 and sum(map(len, texts)) > 5_000_000
