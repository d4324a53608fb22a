"""Measures trained models as the MemoryLLM paper does, and draws it (arXiv 2602.00398).

    python -m memoryllm_jax.probe COMMAND --workdir=DIR [--workdir=DIR ...] --output=DIR [options]

    alpha        FFN contributions scaled by 1.0 to 0.5            Table 1, Figure 7      all
    layers       a layer's FFN dropped, then several               Figures 4 and 12       all
    compression  bits, ranks, singular values, the budget mode     Tables 7, 8, Figure 13 memory, flex
    pruning      base pruned to the active parameters of the rest  Figure 11              base beside the others
    cost         memory and time of a decode step                  Table 6                all

COMMAND --help gives the definition it uses and its options. Each writes COMMAND.html, a page that needs no network,
COMMAND.json, and CSV and PNG files beside them. Quality is perplexity on --data, and scores of the harness's --tasks.
Training and comparing architectures (Table 2, Figures 9 and 10) is `python -m memoryllm_jax.compare`.
"""

import functools
import inspect
import typing

from absl import flags

from memoryllm_jax.common import legacy, report
from memoryllm_jax.evaluation import measure
from memoryllm_jax.experiments import compression, contribution, decode_cost, models, pruning
from memoryllm_jax.experiments.models import Models

COMMANDS: dict[str, typing.Callable] = {
    f.__name__: f
    for f in (contribution.alpha, contribution.layers, compression.compression, pruning.pruning, decode_cost.cost)
}
_HELP = {
    "alphas": "factors of what the FFN adds",
    "bits": "uniform bits of an element",
    "cache": "rows kept on the device, of those served from host or disk",
    "calibration": "prepared data to calibrate on",
    "cumulative": "layers to drop one after another; 0: all",
    "data": "prepared data whose held-out tokens are decoded",
    "methods": "of pruning: magnitude, wanda, sparsegpt",
    "places": "where a ToL file's rows are served from: device, host, disk",
    "ranks": "shares of the singular vectors that are kept",
    "rounds": "turns of each side",
    "steps": "tokens a turn",
    "windows": "of the model's context, to calibrate on",
}


def probe(command: str, models: Models, output: str, **options) -> str:
    """Runs one of COMMANDS. Returns: one line on what was written. Raises: UserError."""
    function, facts = COMMANDS[command], models.facts
    if "measure" in options:
        facts = facts | options["measure"].facts()
    with report.Report(output, command, f"{command}: {', '.join(models.labels)}", facts) as page:
        page.text(inspect.getdoc(function))
        return page.write(function(models, page, **options))


def call(command):
    f, names = flags.FLAGS, legacy.options_of(COMMANDS[command])
    options = {name: measure.measure_from_flags() if name == "measure" else f[name].value for name in names}
    return probe(command, models.Models(f.workdir, f.tol, f.rows, f.dtype), f.output, **options)


def define_flags(command):
    flags.DEFINE_multi_string("workdir", None, "folder with a trained model's checkpoints; several stand side by side")
    flags.DEFINE_string("output", None, "folder for the page and the files beside it", required=True)
    flags.DEFINE_string("tol", "", "ToL file that serves the rows of the only --workdir")
    flags.DEFINE_string("rows", "", "where the ToL file's rows are served from: device, host or, by default, disk")
    flags.DEFINE_string("dtype", "", "float32 or bfloat16, of the computation; by default that of the training")
    flags.mark_flag_as_required("workdir")
    options = legacy.options_of(COMMANDS[command])
    if options.pop("measure", None):
        legacy.define_quality_flags()
    define = {int: functools.partial(flags.DEFINE_integer, lower_bound=0), tuple: flags.DEFINE_list}
    for name, default in options.items():
        plain = list(default) if isinstance(default, tuple) else default
        define.get(type(default), flags.DEFINE_string)(name, plain, _HELP[name])


if __name__ == "__main__":
    legacy.run_functions("memoryllm_jax.probe", COMMANDS, define_flags, call)
