"""Tiny: 5M parameters, trained on texts that come with Python in a few minutes on two CPU cores.

    python -m memoryllm_jax.train --config=configs/tiny.py:memory --workdir=runs/tiny

The first run prepares its data in the workdir: Python's documentation topics and standard library (9 MB), tokenized by
SentencePiece with 4,096 ids. Give --config.data.path=DIR to train on data that `prepare` wrote. The learning rates suit
this size and are not the paper's.

Cost: 1.0M tokens, two to five minutes. Expect about 1.53 bits per byte on held-out text with Python 3.12, 1.76 with
3.11, which holds out other texts, and a sample that looks like Python.
"""

from memoryllm_jax import config


def get_config(architecture: str = "memory"):
    c = config.default(architecture)
    c.steps, c.batch_size, c.seq_len = 480, 8, 256
    c.model.dim, c.model.layers, c.model.heads = 256, 4, 8
    c.model.dtype, c.model.loss_chunk = "float32", 512
    c.data.epochs = 2
    c.optimizer.peak_lr, c.optimizer.final_lr, c.optimizer.warmup_steps = 3e-3, 3e-4, 40
    c.checkpoint.every, c.eval.every, c.log.every = 120, 120, 20
    if c.model.token_memory != "bigram":  # which cannot continue a text
        c.sample.tokens, c.sample.prompt = 120, "def "
    return c
