"""Prepared data of token ids drawn at random, for machines that have no text.

Ids follow p(rank r) ~ 1 / (r + 8)^1.28, independently. With 128,256 ids the share of distinct ids among 8k, 16k, 32k,
64k and 128k tokens is then 0.29, 0.24, 0.20, 0.16, 0.13; English under Llama 3's tokenizer has 0.29, 0.25, 0.20,
0.16, 0.12.
"""

import os

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from memoryllm_jax.common import records, storage
from memoryllm_jax.data import tokenizer
from memoryllm_jax.data.dataset import (
    FORMAT,
    DatasetRecord,
    ShardRecord,
    SplitRecord,
    SplitRecords,
    TokenizerRecord,
)

LAW = "independent ids, p(rank r) ~ 1 / (r + 8)^1.28"
_HELD_OUT = 100_000


def write(path: str, vocab_size: int, tokens: int) -> None:
    """Writes a folder like that of `prepare`, with `tokens` training tokens and a tokenizer of made-up pieces."""
    os.makedirs(path, exist_ok=True)
    model = sentencepiece_model_pb2.ModelProto()
    model.pieces.add(piece="<unk>", type=2)
    for i in range(1, vocab_size):
        model.pieces.add(piece=f"t{i}", score=-i)
    storage.write_bytes(os.path.join(path, "tokenizer.model"), model.SerializeToString())
    model = tokenizer.load(f"sentencepiece:{path}/tokenizer.model")

    rng = np.random.default_rng(0)
    cumulative = np.cumsum((np.arange(vocab_size) + 9.0) ** -1.28)
    id_of_rank = rng.permutation(vocab_size)
    splits = {}
    for split, count in (("train", tokens), ("validation", _HELD_OUT)):
        ranks = np.searchsorted(cumulative, rng.random(count) * cumulative[-1])
        name = f"{split}-00000.bin"
        id_of_rank[ranks].astype("<u4").tofile(os.path.join(path, name))
        sizes = {"documents": 1, "tokens": count, "bytes": 4 * count}
        shard = ShardRecord(file=name, sha256=storage.sha256(os.path.join(path, name)), **sizes)
        splits[split] = SplitRecord(shards=(shard,), **sizes)
    record = DatasetRecord(
        format=FORMAT,
        tokenizer=TokenizerRecord(
            kind="sentencepiece",
            file="tokenizer.model",
            digest=model.digest,
            bos_id=model.bos_id,
            eos_id=model.eos_id,
        ),
        vocab_size=vocab_size,
        dtype="uint32",
        splits=SplitRecords(**splits),
    )
    storage.write_json(os.path.join(path, "dataset.json"), records.to_json(record))
