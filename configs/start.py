"""Training that starts from a trained or imported model; base may become memory or flex-B, or get an adapter. Or the
decay of a run.

    python -m memoryllm_jax.train --config=configs/start.py:memory@WORKDIR --workdir=DIR --config.data.path=DATA
    python -m memoryllm_jax.train --config=configs/start.py:adapter@WORKDIR --workdir=DIR --config.data.path=DATA
    python -m memoryllm_jax.train --config=configs/start.py:decay@WORKDIR --workdir=DIR

The name before @ is the architecture to train: that of the model, or memory or flex-B if the model is base. WORKDIR is
the model's workdir (`export --import` creates one from a Hugging Face directory). Sizes and parameters come from its
newest checkpoint; the optimizer starts anew. The data must be prepared with the model's tokenizer. docs/huggingface.md
explains how base is converted, and what to expect.

With adapter, base stays whole, and each of its layers adds a row of a table, by token id, to the residual stream
(rows-8). The rows begin as zeros, so that the model begins as base, and they alone are trained; `precompute` makes them
one ToL file. If WORKDIR is an adapter, its rows are trained further; rows-8@WORKDIR trains all of its parameters.

With decay, the run in WORKDIR branches: the new run has all of its settings, and goes on from its newest checkpoint
before a decay, or that of --config.start.step, with its moments, step and place in the data. From there the learning
rate decays, over --config.optimizer.decay_share of all steps. WORKDIR is only read. It may still train: then name the
step, so that the same line goes on with the same branch later (docs/training.md).
"""

import dataclasses

from memoryllm_jax import config
from memoryllm_jax.checkpoint import branch
from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.common.errors import ArgumentError


def get_config(start=""):
    architecture, _, workdir = start.partition("@")
    if not workdir:
        raise ArgumentError(
            "config", f"expected ARCHITECTURE@WORKDIR or decay@WORKDIR after the colon, found {start or 'nothing'}"
        )
    if architecture == "decay":
        return branch.decay_of(workdir)
    is_adapter = architecture == "adapter"
    c = config.default("rows-8" if is_adapter else architecture)
    asked = {name: c.model[name] for name in ("beta", "token_memory", "compute_input")}
    trained_model = config_of(workdir).model
    c.model.update(dataclasses.asdict(trained_model))
    if trained_model.architecture == "base":
        del asked["compute_input"]  # FFN-C of a conversion reads what base's FFN reads
    if (c.model.beta, c.model.token_memory) != (asked["beta"], asked["token_memory"]):
        c.model.update(asked)  # a conversion: it keeps the sizes of the trained model, but not its architecture
    if is_adapter:
        c.start.memory = "copy" if trained_model.token_memory == "rows" else "zero"
        c.optimizer.train = "memory"
    c.model.attention = "auto"  # the trained model's backend may not exist on this accelerator
    c.start.workdir = workdir
    c.steps = 10_000
    c.optimizer.warmup_steps = 500
    if is_adapter:  # rows learn at far higher rates than matrices (benchmarks/results/adapters_cpu.json)
        c.optimizer.peak_lr, c.optimizer.final_lr = 3e-2, 3e-3
    return c
