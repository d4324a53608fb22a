"""250m: 265M parameters without embedding and head, 88M of them active in memory, on 50 B tokens of C4.

    python -m memoryllm_jax.prepare --input='c4/en/c4-train.*.json.gz' --validation_input='c4/en/c4-validation.*' \\
        --tokenizer=llama3:tokenizer.model --output=DATA
    python -m memoryllm_jax.train --config=configs/250m.py:flex-3 --workdir=DIR --config.data.path=DATA

The recipe is the paper's Table 3. What the paper leaves open is set as in Llama: batches of 512 sequences (1.05 M
tokens), normal initialisation with standard deviation 0.02, clipping at norm 1.0, RoPE base 10,000, untied embeddings.

Cost by FLOP count, at 40% MFU on H100 and 64k tokens a device (computed, not measured):
base 92, memory 60, flex-3 72 GPU hours.
Expect perplexity on C4, from the paper's Table 2 (50 B tokens): base 23.19.
"""

from memoryllm_jax import config


def get_config(architecture: str = "memory"):
    c = config.default(architecture)
    c.model.dim, c.model.layers, c.model.heads = 960, 24, 16
    c.steps, c.batch_size, c.seq_len = 47_684, 512, 2048
    c.checkpoint.every, c.checkpoint.keep_every, c.eval.every, c.eval.batches = 1000, 10_000, 1000, 8
    return c
