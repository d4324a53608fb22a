"""Training that starts from a trained or imported model: the same architecture goes on, base becomes memory or flex-B.

    python -m memoryllm_jax.train --config=configs/start.py:memory@WORKDIR --workdir=DIR --config.data.path=DATA

The name before @ is the architecture, WORKDIR after it the model's workdir (`export --import` makes one of a Hugging
Face directory). Its newest checkpoint gives the sizes and the parameters; the optimizer starts anew. The data must be
prepared with its tokenizer. docs/huggingface.md tells how base is converted, and what that came to.
"""

import dataclasses

from memoryllm_jax import config
from memoryllm_jax.checkpoint import trained
from memoryllm_jax.common.errors import UserError


def get_config(start=""):
    architecture, _, workdir = start.partition("@")
    if not workdir:
        raise UserError(f"--config=configs/start.py:{start}: expected ARCHITECTURE@WORKDIR after the colon")
    c = config.default(architecture)
    m, theirs = c.model, trained.config_of(workdir).model
    ours = {"beta": m.beta, "token_memory": m.token_memory, "compute_input": m.compute_input}
    m.update(dataclasses.asdict(theirs))
    if (ours["beta"], ours["token_memory"]) != (theirs.beta, theirs.token_memory):
        m.update(ours)
    c.model.attention = "auto"
    c.start.workdir = workdir
    c.steps = 10_000
    c.optimizer.warmup_steps = 500
    return c
