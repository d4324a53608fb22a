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
import os
import sys
import typing

from absl import flags

from memoryllm_jax import cli, report
from memoryllm_jax.probes import compression, contribution, cost, measure, pruning

COMMANDS: dict[str, typing.Callable] = {
    f.__name__: f
    for f in (contribution.alpha, contribution.layers, compression.compression, pruning.pruning, cost.cost)
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


def probe(command: str, models: measure.Models, output: str, **options) -> str:
    """Runs one of COMMANDS. Returns: one line on what was written. Raises: UserError."""
    call = COMMANDS[command]
    with report.Report(output, command, f"{command}: {', '.join(models.labels)}", dict(models.facts)) as page:
        page.text(inspect.getdoc(call))
        return page.write(call(models, page, **options))


def main(arguments):
    if arguments[1:]:
        raise cli.UserError(f"unexpected argument {arguments[1]!r}; options are written --name=value")
    f, names = flags.FLAGS, list(inspect.signature(COMMANDS[arguments[0]]).parameters)[2:]
    options = {name: measure.from_flags() if name == "measure" else f[name].value for name in names}
    print(probe(arguments[0], measure.Models(f.workdir, f.tol, f.rows, f.dtype), f.output, **options))
    return 0


def define_flags(command):
    flags.DEFINE_multi_string("workdir", None, "folder with a trained model's checkpoints; several stand side by side")
    flags.DEFINE_string("output", None, "folder for the page and the files beside it", required=True)
    flags.DEFINE_string("tol", "", "ToL file that serves the rows of the only --workdir")
    flags.DEFINE_string("rows", "", "where the ToL file's rows are served from: device, host or, by default, disk")
    flags.DEFINE_string("dtype", "", "float32 or bfloat16, of the computation; by default that of the training")
    flags.mark_flag_as_required("workdir")
    parameters = dict(list(inspect.signature(COMMANDS[command]).parameters.items())[2:])
    if parameters.pop("measure", None):
        measure.define_flags()
    define = {int: functools.partial(flags.DEFINE_integer, lower_bound=0), tuple: flags.DEFINE_list}
    for name, parameter in parameters.items():
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        define.get(type(parameter.default), flags.DEFINE_string)(name, default, _HELP[name])


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        define_flags(sys.argv[1])
        definition = inspect.getdoc(COMMANDS[sys.argv[1]])
        __doc__ = f"python -m memoryllm_jax.probe {sys.argv[1]} --workdir=DIR --output=DIR\n\n{definition}"
    elif not {"--help", "-h", "--helpfull"} & set(sys.argv):
        found = os.path.basename(sys.argv[1]) if len(sys.argv) > 1 else "nothing"
        print(f"error: expected one of {', '.join(COMMANDS)}, found {found}", file=sys.stderr)
        sys.exit(1)
    cli.run(main, positional=True)
