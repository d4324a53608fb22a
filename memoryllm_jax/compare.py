"""Trains architectures alike, and draws how they compare (the paper's Table 2, Figures 9 and 10).

    python -m memoryllm_jax.compare --config=configs/tiny.py --workdir=DIR [--config.steps=2000 ...]
    python -m memoryllm_jax.compare --config=configs/1b.py --workdir=DIR --only=flex-3      (a job of its own)
    python -m memoryllm_jax.compare --config=configs/1b.py --workdir=DIR --report           (draws what is there)

Every architecture has the same seed, data, steps and recipe: all --config.FIELD options are handed to `train`, which
runs in a process of its own with the workdir DIR/ARCHITECTURE. Kill it at any time and run the same line again. On
several hosts, run `train` itself with these workdirs, and then --report. The
report is DIR/comparison.html, with .json and .csv beside it. Beside the paper's architectures there are, to compare
with, no-memory-B, value-B and ple-B: flex-B's active parameters, and in place of FFN-M nothing, value embeddings, or
per-layer embeddings as in Gemma 3n.
"""

import os
import sys

from absl import flags
from ml_collections import config_flags

from memoryllm_jax import config
from memoryllm_jax.common import legacy
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.experiments.curves import ARCHITECTURES, _common_recipe, draw, run_of, train


def main():
    f = flags.FLAGS
    if f.only and f.report:
        raise UserError("--only, --report: expected one of them, as the one trains and the other draws")
    names = [f.only] if f.only else f.architectures
    for name in names:
        config.parse_architecture(name)
    path = f["config"].config_filename
    if ":" in path:
        raise UserError(f"--config={path}: expected a config file without an architecture; --architectures names them")
    if not f.report:
        changed = config_flags.get_override_values(f["config"])
        for name in names:
            overrides = [f"--config.{field}={value}" for field, value in changed.items()]
            code = train(path, name, os.path.join(f.workdir, name), overrides)
            if code:
                print(f"error: {name}: training ended with exit code {code}", file=sys.stderr)
                return code
        if f.only:
            return 0
    runs = {name: run_of(os.path.join(f.workdir, name)) for name in names}
    runs = {name: run for name, run in runs.items() if run}
    if not runs:
        raise UserError(f"--workdir={f.workdir}: expected runs of {', '.join(names)}, found none")
    recipe = _common_recipe(runs)
    shown = ("steps", "batch_size", "seq_len", "seed", "model.dim", "model.layers", "model.heads", "optimizer.peak_lr")
    facts = {"config": path, "recipe": ", ".join(f"{name} {recipe[name]}" for name in shown)}
    facts["data"] = ", ".join(dict.fromkeys(run["data"] for run in runs.values()))
    missing = [name for name in names if name not in runs or not runs[name]["finished"]]
    print(draw(runs, f.workdir, facts | ({"not finished": ", ".join(missing)} if missing else {})))
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "config file without an architecture, such as configs/tiny.py")
    flags.DEFINE_string(
        "workdir", None, "folder for all runs, each in one of its own, and for the report", required=True
    )
    flags.DEFINE_list("architectures", list(ARCHITECTURES), "what to train and compare, in this order")
    flags.DEFINE_string("only", "", "train this one alone and draw nothing")
    flags.DEFINE_bool("report", False, "train nothing, draw what is there")
    flags.mark_flag_as_required("config")
    legacy.run(main, check=config.check_flags)
