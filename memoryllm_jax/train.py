"""Trains base, MemoryLLM or Flex-MemoryLLM from one config.

    python -m memoryllm_jax.train --config=configs/1b.py:flex-3 --workdir=DIR [--config.model.dim=64 ...]

The name after the colon is the architecture: base, memory, or flex-B (flex-1, flex-2, flex-3). Any field of
memoryllm_jax/config.py can be overridden as --config.FIELD=VALUE. Kill the run at any time and run the same line
again: it goes on from its newest checkpoint. On SIGTERM or Ctrl-C it saves one first and exits with code 143.

    python -m memoryllm_jax.train --config=configs/1b.py:flex-3 --dry_run --devices=256 --chip=v5p

compiles the step for devices that are not here and prints what the run needs of memory, network and time.

Writes into the workdir: numbered checkpoint folders, metrics.jsonl, TensorBoard events, and at the end result.json.
The workdir may be gs://BUCKET/FOLDER, and config.data.path any URL that fsspec reads.
On several hosts add --multihost to the line on each of them.
"""

import os

from absl import flags
from ml_collections import config_flags

from memoryllm_jax.common import hosts, legacy
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import check_flags, resolve
from memoryllm_jax.training import chips, plan
from memoryllm_jax.training.loop import train


def main():
    f = flags.FLAGS
    config = resolve(f.config)
    if f.dry_run:
        return plan.dry_run(config, f.chip, f.devices, f.slices, f.tokens, f.plan)
    for name in ("devices", "chip", "slices", "tokens", "plan"):
        if f[name].present:
            raise UserError(f"--{name}: expected --dry_run too, as it is about devices that are not here")
    if not f.workdir:
        raise UserError("--workdir: expected a folder for checkpoints and metrics, found none")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{chips.GPU_SHARE}")  # JAX's own is three quarters
    hosts.join_hosts()
    return train(config, f.workdir, profile=f.profile)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/SIZE.py:ARCHITECTURE; override as --config.FIELD=VALUE")
    flags.DEFINE_string("workdir", "", "folder or gs:// URL for checkpoints and metrics, of one run")
    flags.DEFINE_integer("profile", 0, "steps to leave a trace of in WORKDIR/profile", lower_bound=0)
    flags.DEFINE_bool("dry_run", False, "compile the step for --devices of --chip, print the plan, train nothing")
    flags.DEFINE_integer("devices", 8, "devices to plan for", lower_bound=1)
    flags.DEFINE_string("chip", "h100", "what to plan for: " + ", ".join(chips.CHIPS))
    flags.DEFINE_integer("slices", 0, "TPU slices to plan for; by default as few as hold the devices", lower_bound=0)
    flags.DEFINE_float("tokens", 0, "length of the run to plan; by default that of the config", lower_bound=0)
    flags.DEFINE_string("plan", "", "JSON file for the plan")
    hosts.define_multihost_flags()
    flags.mark_flag_as_required("config")
    legacy.run(main, check=check_flags)
