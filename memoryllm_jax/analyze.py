"""Looks inside trained models: their FFNs as key-value memories, and the experiments of the MemoryLLM paper.

    python -m memoryllm_jax.analyze COMMAND --workdir=DIR --output=DIR [options]

Analyses of one model, with the FFN that each looks at (for base, FFN-C means its only FFN):
    coefficients  the strongest keys of tokens and tokens of keys; a searchable page           FFN-M
    clusters      K-means on the tokens' coefficients, pictures, purity                       FFN-M
    clustering    clustering coefficient and silhouette by layer                              FFN-M
    outliers      keys above M times a token's mean |c|                                       FFN-M
    neighbours    the tokens whose memory rows are most similar                               FFN-M
    triggers      the prefixes that activate a sample of keys most                            FFN-M or FFN-C
    mutate        a key's coefficient without one token of its trigger prefix                 FFN-C
    values        value vectors as distributions over the vocabulary                          FFN-M or FFN-C
    agreement     whether a value predicts what follows its key's trigger                     FFN-M or FFN-C
    active        share of a layer's key-value memories that are active                       FFN-M or FFN-C
    compose       how often no single memory has the layer's top prediction                   all of a layer
    residual      from which layer on the residual holds the final prediction                 all of a layer
    annotate      a sheet of triggers for people, with automatic proxies                      FFN-M or FFN-C

Experiments on one or several models (--workdir=DIR for each):
    alpha         quality with FFN outputs scaled down (Table 1, Figure 7)                    all models
    layers        quality without one layer's FFN, and without several (Figures 4 and 12)     all models
    compression   quality by bits, ranks and budgets of a ToL file (Tables 7, 8, Figure 13)   memory or flex
    pruning       base pruned to the active parameters of the others (Figure 11)              base beside others
    decode_cost   memory and time of a decode step (Table 6)                                  all models

COMMAND --help gives the definition that it uses, with its source, and its options. Each command writes COMMAND.html (a
page that needs no network), COMMAND.json, and CSV and PNG files beside them.
"""

from collections.abc import Callable
from typing import Annotated

from memoryllm_jax.analysis import (
    agreement,
    annotate,
    clustering,
    clusters,
    coefficients,
    composition,
    mutate,
    neighbours,
    residual,
    run,
    triggers,
    values,
)
from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.experiments import compression, contribution, decode_cost, models, pruning


def _by_name(*functions: Callable[..., dict]) -> dict[str, Callable[..., dict]]:
    return {function.__name__: function for function in functions}


ANALYSES = _by_name(
    coefficients.coefficients,
    clusters.clusters,
    clustering.clustering,
    coefficients.outliers,
    neighbours.neighbours,
    triggers.triggers,
    mutate.mutate,
    values.values,
    agreement.agreement,
    composition.active,
    composition.compose,
    residual.residual,
    annotate.annotate,
)
EXPERIMENTS = _by_name(
    contribution.alpha, contribution.layers, compression.compression, pruning.pruning, decode_cost.decode_cost
)
Output = Annotated[str, Option("folder for the page and the files beside it")]


# `cli.run_commands` calls one of these two with the options in its signature and those of the chosen command. Both
# return the line to print.
def analyze(command: str, model: run.ModelOptions, output: Output, **options) -> str:
    """Runs an analysis of one model."""
    model.check()
    return run.run(ANALYSES[command], model.each(ANALYSES[command]), output, len(model.workdir), **options)


def experiment(command: str, model: models.ModelsOptions, output: Output, **options) -> str:
    """Runs an experiment on several models."""
    return models.run(EXPERIMENTS[command], model.open(), output, **options)


if __name__ == "__main__":
    cli.run_commands(ANALYSES | EXPERIMENTS, through=lambda command: analyze if command in ANALYSES else experiment)
