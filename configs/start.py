"""Training that starts from a trained or imported model; base may become memory or flex-B.

    python -m memoryllm_jax.train --config=configs/start.py:memory@WORKDIR --workdir=DIR --config.data.path=DATA

The name before @ is the architecture to train: that of the model, or memory or flex-B if the model is base. WORKDIR is
the model's workdir (`export --import` creates one from a Hugging Face directory). Sizes and parameters come from its
newest checkpoint; the optimizer starts anew. The data must be prepared with the model's tokenizer. docs/huggingface.md
explains how base is converted, and what to expect.
"""

import dataclasses

from memoryllm_jax import config
from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.common.errors import ArgumentError


def get_config(start=""):
    architecture, _, workdir = start.partition("@")
    if not workdir:
        raise ArgumentError("config", f"expected ARCHITECTURE@WORKDIR after the colon, found {start or 'nothing'}")
    c = config.default(architecture)
    asked = {name: c.model[name] for name in ("beta", "token_memory", "compute_input")}
    trained_model = config_of(workdir).model
    c.model.update(dataclasses.asdict(trained_model))
    if (asked["beta"], asked["token_memory"]) != (trained_model.beta, trained_model.token_memory):
        c.model.update(asked)  # a conversion: it keeps the sizes of the trained model, but not its architecture
    c.model.attention = "auto"  # the trained model's backend may not exist on this accelerator
    c.start.workdir = workdir
    c.steps = 10_000
    c.optimizer.warmup_steps = 500
    return c
