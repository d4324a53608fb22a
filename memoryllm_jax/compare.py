"""Trains several architectures with one recipe and compares them (the paper's Table 2, Figures 9 and 10).

    python -m memoryllm_jax.compare --config=configs/tiny.py --workdir=DIR [--config.steps=2000 ...]
    python -m memoryllm_jax.compare --config=configs/1b.py --workdir=DIR --only=flex-3      (trains one of them)
    python -m memoryllm_jax.compare --config=configs/1b.py --workdir=DIR --report           (only draws)

All architectures share seed, data, steps and recipe. `train` runs once for each, in a process of its own, with all
--config.FIELD options and the workdir DIR/ARCHITECTURE. Kill it at any time and run the same line again. On several
hosts, run `train` itself with these workdirs, and then this command with --report. The report is DIR/comparison.html,
with .json and .csv beside it.

--architectures also takes baselines that have as many active parameters as flex-B and replace FFN-M: no-memory-B by
nothing, value-B by value embeddings, and ple-B by per-layer embeddings as in Gemma 3n.
"""

import os
import sys
from typing import Annotated

from absl import flags
from ml_collections import config_flags

from memoryllm_jax import config
from memoryllm_jax.common import cli, config_files, plots
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data.verification import Verification
from memoryllm_jax.experiments import curves


def main(
    workdir: Annotated[str, Option("folder for the report, and for a folder of each run")],
    architectures: Annotated[
        tuple[str, ...], Option("architectures to train and compare, in this order")
    ] = curves.ARCHITECTURES,
    only: Annotated[str, Option("train only this architecture, and draw nothing")] = "",
    report: Annotated[bool, Option("train nothing; draw the runs that exist")] = False,
) -> int:
    if only and report:
        raise UserError("expected --only, which only trains, or --report, which only draws, found both")
    path = flags.FLAGS["config"].config_filename
    if ":" in path:
        raise ArgumentError(
            "config", f"expected a file without an architecture, as --architectures names them, found {path}"
        )
    names = [only] if only else list(architectures)
    for name in names:
        config.parse_architecture(name, "only" if only else "architectures")
    if not only:
        plots.check_available()  # before days of training
    if not report:
        code = _train(path, names, workdir)
        if code or only:
            return code
    print(curves.compare(path, names, workdir))
    return 0


def _train(path: str, names: list[str], workdir: str) -> int:
    """Trains one architecture after the other. Returns: the exit code of the first run that fails, or 0."""
    changed = config_flags.get_override_values(flags.FLAGS["config"])
    overrides = [f"--config.{field}={value}" for field, value in changed.items()]
    workdirs = {name: os.path.join(workdir, name) for name in names}
    for name in names:
        # All read the same data, which only the first of them needs to verify.
        Verification(workdirs[name]).remember_from(workdirs.values())
        code = curves.train(path, name, workdirs[name], overrides)
        if code:
            print(f"error: {name}: training ended with exit code {code}", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "config file without an architecture, such as configs/tiny.py")
    flags.mark_flag_as_required("config")
    cli.run(main, check=config_files.check_flags)
