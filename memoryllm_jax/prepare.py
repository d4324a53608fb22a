"""Turns text files into file shards of tokens that `train` reads.

    python -m memoryllm_jax.prepare --input='c4/*.json.gz' --tokenizer=llama3:tokenizer.model --output=DIR

Reads .json, .jsonl and .txt (each also .gz or .zst) and .parquet, from any path that fsspec reads, such as
s3://BUCKET/*.jsonl or zip://*.jsonl::FILE.zip. A document is one line, one row, or one .txt file. Each is written as
bos, its tokens, eos, as far as the tokenizer has bos and eos. Kill it at any time and run the same line again: it skips
the files that are done. A process works on whole files, so only a corpus of several files uses several processes.

Writes DIR/dataset.json, DIR/tokenizer.model, and DIR/{train,validation}-NNNNN.bin: little-endian token ids, one
file shard for each input file. The hash of its text decides whether a document is held out for validation, so that
copies of it never end up in both splits. With --validation_input, whole files are held out instead.

With --scheduler, the workers of a Dask cluster do the work. They read the same paths and URLs, and DIR is a folder that
all of them mount, or a URL.
"""

from typing import Annotated

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import shards


def main(
    input: Annotated[str, Option("comma-separated globs or folders of text files, or `embedded`: Python's own texts")],
    tokenizer: Annotated[
        str,
        Option(
            "sentencepiece:FILE, sentencepiece:train:VOCAB, llama3:FILE (tokenizer.model) or hf:FILE (tokenizer.json)"
        ),
    ],
    output: Annotated[str, Option("folder or URL for the file shards")],
    validation_input: Annotated[str, Option("globs of files that are held out whole")] = "",
    validation_fraction: Annotated[float, Option("share of the documents that is held out")] = 0.005,
    text_key: Annotated[str, Option("JSON field or parquet column that holds the text")] = "text",
    workers: Annotated[int, Option("processes; 0: one for each core, at most one for each file", least=0)] = 0,
    on_bad_record: Annotated[
        str,
        Option("at a line, row or .txt file without text: skip counts and leaves it out", choices=("stop", "skip")),
    ] = "stop",
    special_tokens_in_text: Annotated[
        str,
        Option("spellings of special tokens in documents stay text, or parse: become ids", choices=("text", "parse")),
    ] = "text",
    scheduler: Annotated[str, Option("tcp://HOST:PORT of a Dask cluster, which then does the work")] = "",
) -> None:
    shards.prepare(
        input,
        tokenizer,
        output,
        validation_pattern=validation_input,
        validation_fraction=validation_fraction,
        text_key=text_key,
        workers=workers,
        scheduler=scheduler,
        on_bad_record=on_bad_record,
        special_tokens_in_text=special_tokens_in_text,
    )


if __name__ == "__main__":
    cli.run(main, computes=False)
