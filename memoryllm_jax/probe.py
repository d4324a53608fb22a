"""Measures trained models as the MemoryLLM paper does, and draws it (arXiv 2602.00398).

    python -m memoryllm_jax.probe COMMAND --workdir=DIR [--workdir=DIR ...] --output=DIR [options]

    alpha        FFN contributions scaled by 1.0 to 0.5            Table 1, Figure 7      all
    layers       a layer's FFN dropped, then several               Figures 4 and 12       all
    compression  bits, ranks, singular values, the budget mode     Tables 7, 8, Figure 13 memory, flex
    pruning      base pruned to the active parameters of the rest  Figure 11              base beside the others
    decode_cost  memory and time of a decode step                  Table 6                all

COMMAND --help gives the definition it uses and its options. Each writes COMMAND.html, a page that needs no network,
COMMAND.json, and CSV and PNG files beside them. Quality is perplexity on --data, and scores of the harness's --tasks.
Training and comparing architectures (Table 2, Figures 9 and 10) is `python -m memoryllm_jax.compare`.
"""

import typing

from absl import flags

from memoryllm_jax.common import legacy, options
from memoryllm_jax.experiments import compression, contribution, decode_cost, pruning
from memoryllm_jax.experiments.models import ModelsOptions, run

COMMANDS: dict[str, typing.Callable] = {
    f.__name__: f
    for f in (
        contribution.alpha,
        contribution.layers,
        compression.compression,
        pruning.pruning,
        decode_cost.decode_cost,
    )
}


def call(command):
    chosen = options.values(COMMANDS[command])
    models = ModelsOptions(**options.values(ModelsOptions)).open()
    return run(COMMANDS[command], models, flags.FLAGS.output, **chosen)


def define_flags(command):
    flags.DEFINE_string("output", None, "folder for the page and the files beside it", required=True)
    options.define(ModelsOptions)
    options.define(COMMANDS[command])


if __name__ == "__main__":
    legacy.run_functions("memoryllm_jax.probe", COMMANDS, define_flags, call)
