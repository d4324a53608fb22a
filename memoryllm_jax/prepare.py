"""Turns text files into token shards that `train` reads.

    python -m memoryllm_jax.prepare --input='c4/*.json.gz' --tokenizer=llama3:tokenizer.model --output=DIR

Reads .json, .jsonl and .txt (each also .gz or .zst) and .parquet, from any path fsspec reads. One document a
line (or row, or .txt file). Every document is written as bos, its tokens, eos, as far as the tokenizer has them.
Kill it at any time and run the same line again: files that are done stay done. Work is shared out and kept by
file, so a corpus in many files is prepared by many processes.

Writes DIR/dataset.json, DIR/tokenizer.model, and DIR/{train,validation}-NNNNN.bin: little-endian token ids, one
shard for each input file. A document is held out for validation by the hash of its text, so that copies of it
never end up on both sides; --validation_input names files that are held out whole instead.
"""

from absl import flags

from memoryllm_jax.common import legacy
from memoryllm_jax.data.shards import prepare


def main():
    FLAGS = flags.FLAGS
    prepare(
        FLAGS.input,
        FLAGS.tokenizer,
        FLAGS.output,
        validation_pattern=FLAGS.validation_input,
        validation_fraction=FLAGS.validation_fraction,
        text_key=FLAGS.text_key,
        workers=FLAGS.workers,
    )


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "comma-separated globs, or `embedded`: Python's own texts", required=True)
    flags.DEFINE_string(
        "tokenizer",
        None,
        "sentencepiece:FILE, sentencepiece:train:VOCAB, llama3:FILE (tokenizer.model) or hf:FILE (tokenizer.json)",
        required=True,
    )
    flags.DEFINE_string("output", None, "folder for the token shards, on a disk", required=True)
    flags.DEFINE_string("validation_input", "", "globs of files that are held out whole")
    flags.DEFINE_float("validation_fraction", 0.005, "share of the documents that is held out")
    flags.DEFINE_string("text_key", "text", "JSON field or parquet column that holds the text")
    flags.DEFINE_integer("workers", 0, "processes; 0: one for each core, at most one for each file")
    legacy.run(main)
