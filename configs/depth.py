"""All sizes and the recipe from one number, the depth, for sweeps over sizes.

    python -m memoryllm_jax.train --config=configs/depth.py:memory@12 --workdir=DIR --config.data.path=DATA

The number after @ is the number of layers d, 12 if there is none. Everything else follows, and can be overridden:

  width           64 d, as in nanochat (github.com/karpathy/nanochat), in d heads of 64: GPT-3 Small at 12 layers
  tokens          20 for each parameter of attention and FFNs (Hoffmann et al. 2022, arXiv:2203.15556)
  batch           2^19 tokens at depth 12 (GPT-3 Small), times (tokens of d / tokens of 12)^0.383 (Bergsma et al. 2025,
                  arXiv:2505.13738), rounded to a power of two, in sequences of 2,048 tokens; so does nanochat
  learning rate   6e-4 at depth 12 (GPT-3 Small; Brown et al. 2020, arXiv:2005.14165, Table 2.1), and in inverse
                  proportion to the width (Yang et al. 2022, arXiv:2203.03466); a tenth of it at the end
  warm-up         a twentieth of the steps

docs/training.md has the table of these numbers. The paper's own sizes have 24 layers and its recipe: configs/250m.py,
750m.py and 1b.py.
"""

import math

from memoryllm_jax import config
from memoryllm_jax.common.errors import ArgumentError


def get_config(text: str = "memory"):
    architecture, _, digits = text.partition("@")
    if digits and not (digits.isdecimal() and 1 <= int(digits) <= 100):
        raise ArgumentError("config", f"expected ARCHITECTURE@DEPTH with a depth from 1 to 100, found {text}")
    depth = int(digits or 12)
    c = config.default(architecture)
    c.model.layers, c.model.heads, c.model.dim = depth, depth, 64 * depth
    c.seq_len = 2048
    # The parameters, and with them the tokens, grow with the cube of the depth.
    c.batch_size = 2 ** round(math.log2(256 * (depth / 12) ** (3 * 0.383)))
    c.tokens_per_parameter = 20.0
    c.optimizer.peak_lr = 6e-4 * 12 / depth
    # References, so that the flags of what they follow from change them.
    c.optimizer.final_lr = c.optimizer.get_ref("peak_lr") / 10
    parameters = config.ModelConfig(**c.model.to_dict()).matrix_parameters
    steps = c.get_ref("tokens_per_parameter") * parameters / (c.get_ref("batch_size") * c.get_ref("seq_len"))
    c.optimizer.warmup_steps = (steps / 20).to_int()
    c.checkpoint.keep_every, c.eval.batches = 10_000, 8
    return c
