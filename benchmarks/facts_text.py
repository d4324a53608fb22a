"""Training text for benchmarks/facts.py: English, mixed with documents of a made-up world, and its tokenizer."""

import glob
import gzip
import json
import os
import random
import re
from collections.abc import Iterator

from facts_world import World

from memoryllm_jax.common import storage
from memoryllm_jax.data import shards, tokenizer

# Each name stands this often in the tokenizer's training text, so that it becomes one token.
_NAME_LINES, _NAMES_OF_A_LINE = 30, 50
_PIECE = 1200  # characters that English documents are cut to, about as long as those of the world
_SHARDS = 4


def write(folder: str, english: str, world: World, vocab_size: int, characters: int, seed: int = 0) -> str:
    """Writes and tokenizes training text: half of it English, half documents of the world.

    The held-out text is English alone.

    Args:
      english: folder with train-*.json.gz and validation-*.json.gz, each with one {"text": ...} a line.
      vocab_size: ids of the tokenizer, which is trained on the text and on a list of all names of the world.
      characters: of each half.
    Returns: the folder that `prepare` wrote.
    Raises: UserError.
    """
    draw = random.Random(seed)
    texts = os.path.join(folder, "text")
    os.makedirs(texts, exist_ok=True)
    documents = list(_up_to(characters, _pieces(os.path.join(english, "train-*.json.gz"))))
    world_documents = list(_up_to(characters, iter(lambda: world.document(draw), None)))
    spec = os.path.join(folder, "tokenizer.model")
    lines = [f" {name}" * _NAMES_OF_A_LINE for name in world.all_names() for _ in range(_NAME_LINES)]
    trained = tokenizer.train_sentencepiece(lambda: (*documents, *world_documents[:500], *lines), vocab_size, threads=2)
    storage.write_bytes(spec, trained.content)
    documents += world_documents
    draw.shuffle(documents)
    for shard in range(_SHARDS):
        write_lines(os.path.join(texts, f"train-{shard}.json.gz"), documents[shard::_SHARDS])
    held_out = list(_pieces(os.path.join(english, "validation-*.json.gz")))
    write_lines(os.path.join(texts, "validation.json.gz"), held_out)
    data = os.path.join(folder, "data")
    shards.prepare(
        os.path.join(texts, "train-*.json.gz"),
        f"sentencepiece:{spec}",
        data,
        validation_pattern=os.path.join(texts, "validation.json.gz"),
    )
    return data


def _pieces(pattern: str) -> Iterator[str]:
    """Documents of .json.gz files, cut between lines. Pieces that are no running English text are left out."""
    for path in sorted(glob.glob(pattern)):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                piece = ""
                for part in json.loads(line)["text"].splitlines(keepends=True):
                    piece += part
                    if len(piece) >= _PIECE:
                        if _is_prose(piece):
                            yield piece
                        piece = ""


def _is_prose(text: str) -> bool:
    letters = len(re.findall("[a-z ]", text))
    return text.isascii() and letters > 0.85 * len(text)


def _up_to(characters: int, documents: Iterator[str]) -> Iterator[str]:
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= characters:
            return


def write_lines(path: str, documents: list[str]) -> None:
    """Writes documents as a .json.gz file with one {"text": ...} a line."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
