"""Looks inside a trained model: its feed-forward layers as token-key-value and key-value memories.

    python -m memoryllm_jax.analyze COMMAND --workdir=DIR --output=DIR [options]

    coefficients  keys that matter for tokens, tokens that use keys; a searchable page     FFN-M
    clusters      K-means on the tokens' coefficients, pictures, purity                    FFN-M
    clustering    clustering coefficient and silhouette by layer                           FFN-M
    outliers      keys above M times a token's mean |c|                                    FFN-M
    neighbours    tokens with the most similar memory rows                                 FFN-M
    triggers      what fires a sample of keys most                                         all
    mutate        a key's coefficient without one token of its prefix                      base, FFN-C
    values        value vectors as distributions over the vocabulary                       all
    agreement     does a value predict what follows its key's trigger                      all
    active        share of a layer's memories that take part                               all
    compose       is the layer's prediction that of one memory                             all
    residual      when the residual holds the final prediction, and what changes it        all
    annotate      sheet of triggers for people, with automatic proxies                     all

COMMAND --help gives the definition it uses, with its source, and its options. Each writes COMMAND.html, a page that
needs no network, COMMAND.json, and CSV and PNG files beside them. It computes in float32 unless --dtype says otherwise.
"""

import inspect
import typing

import jax
from absl import flags

from memoryllm_jax.analysis import agreement, annotate, clusters, coefficients, neighbours, residual, triggers, values
from memoryllm_jax.analysis.key_values import Inside
from memoryllm_jax.common import legacy, report

COMMANDS: dict[str, typing.Callable] = {
    f.__name__: f
    for f in (
        *(
            coefficients.coefficients,
            clusters.clusters,
            clusters.clustering,
            coefficients.outliers,
            neighbours.neighbours,
        ),
        *(triggers.triggers, triggers.mutate, values.values, agreement.agreement),
        *(residual.active, residual.compose, residual.residual, annotate.annotate),
    )
}
_HELP = {
    "clusters": "number of K-means clusters",
    "data": "folder that `prepare` wrote with the model's tokenizer: text, or how frequent tokens are",
    "examples": "prefixes drawn at random from the text",
    "ffn": "memory (FFN-M) or compute (FFN-C, and base's FFN); by default the first of these that the model has",
    "key": "LAYER:KEY, a key to look at instead of drawn ones; may be given more than once",
    "keys": "keys of each layer, drawn at random; 0: all",
    "layers": "layers to look at, as 0,5,11; by default all",
    "length": "tokens of the windows that the text is cut into; prefixes are their beginnings",
    "limit": "tokens of text that are read, in windows spread evenly; 0: all",
    "mass": "share of the sum of |c| |v| that active memories hold",
    "neighbours": "nearest neighbours that a token is joined with",
    "picture": "tsne or pca",
    "predictive": "values of the largest probability that are looked at one by one",
    "ratio": "M, one or several",
    "sample": "tokens, drawn at random, for what is not done for all: the picture, the silhouette",
    "seed": "of what is drawn",
    "split": "train or validation",
    "token": "token to look at, as text that is one token, as ␣the or as #ID; may be given more than once",
    "tokens": "number of tokens where none are named; 0: all",
    "top": "how many of the strongest are kept",
}


def analyze(command: str, workdir: str, output: str, step: int | None = None, dtype: str = "float32", **options) -> str:
    """Runs one of COMMANDS on a checkpoint. Returns: one line on what was written. Raises: UserError."""
    function = COMMANDS[command]
    inside = Inside(workdir, step, dtype, whole="length" in legacy.options_of(function))
    title = f"{command}: {inside.config.architecture}"
    with report.Report(output, command, title, inside.trained.facts()) as page:
        page.text(inspect.getdoc(function))
        with jax.default_matmul_precision("highest"):
            results = function(inside, page, **options)
        inside.trained.close()
        return page.write(results)


def call(command):
    f, names = flags.FLAGS, legacy.options_of(COMMANDS[command])
    return analyze(command, f.workdir, f.output, f.step, f.dtype, **{name: f[name].value for name in names})


def define_flags(command):
    flags.DEFINE_string("workdir", None, "folder with the trained model's checkpoints", required=True)
    flags.DEFINE_string("output", None, "folder for the page and the files beside it", required=True)
    flags.DEFINE_integer("step", None, "checkpoint to read; by default the newest")
    flags.DEFINE_string("dtype", "float32", "float32 or bfloat16, of the computation")
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for name, default in legacy.options_of(COMMANDS[command]).items():
        define.get(type(default), flags.DEFINE_multi_string)(name, default or type(default)(), _HELP[name])


if __name__ == "__main__":
    legacy.run_functions("memoryllm_jax.analyze", COMMANDS, define_flags, call)
