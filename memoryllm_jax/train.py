"""Trains base, MemoryLLM or Flex-MemoryLLM from one config.

    python -m memoryllm_jax.train --config=configs/1b.py:flex-3 --workdir=DIR [--config.model.dim=64 ...]

The name after the colon is the architecture: base, memory, or flex-B (flex-1, flex-2, flex-3). Any field of
memoryllm_jax/config/tree.py can be overridden as --config.FIELD=VALUE. Kill the run at any time and run the same line
again: it goes on from its newest checkpoint. On SIGTERM or Ctrl-C it saves a checkpoint and exits with code 143.

    python -m memoryllm_jax.train --config=configs/1b.py:flex-3 --dry_run --devices=256 --chip=v5p

compiles the step for devices that this machine lacks, and prints how much memory, network traffic and time the run
needs.

The workdir gets numbered checkpoint folders, metrics.jsonl, TensorBoard events, and at the end result.json.
The workdir may be gs://BUCKET/FOLDER, and config.data.path any URL that fsspec reads.
On several hosts add --multihost to the line on each of them.
"""

from typing import Annotated

from absl import flags
from ml_collections import config_flags

from memoryllm_jax.common import cli, config_files, options
from memoryllm_jax.common import devices as devices_lib
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.hosts import HostOptions
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import resolve
from memoryllm_jax.evaluation.while_training import open_tasks
from memoryllm_jax.training import chips
from memoryllm_jax.training.loop import train
from memoryllm_jax.training.plan import dry_run as print_plan


def main(
    hosts: HostOptions,
    workdir: Annotated[str, Option("folder or gs:// URL for checkpoints and metrics of one run")] = "",
    profile: Annotated[int, Option("number of steps to profile, into WORKDIR/profile", least=0)] = 0,
    dry_run: Annotated[bool, Option("compile the step for --devices of --chip, print the plan, train nothing")] = False,
    devices: Annotated[int, Option("devices to plan for", least=1)] = 8,
    chip: Annotated[str, Option("kind of device to plan for", choices=tuple(chips.CHIPS))] = "h100",
    slices: Annotated[int, Option("TPU slices to plan for; 0: as few as can hold the devices", least=0)] = 0,
    plan: Annotated[str, Option("JSON file to write the plan to", writes=True)] = "",
) -> int:
    config = resolve(flags.FLAGS.config, config_flags.get_override_values(flags.FLAGS["config"]))
    if dry_run:
        return print_plan(config, chip, devices, slices, plan, open_tasks)
    for name in ("devices", "chip", "slices", "plan"):
        if options.given(name):
            raise ArgumentError(name, "expected only with --dry_run, found without it")
    if not workdir:
        raise ArgumentError("workdir", "expected a folder for checkpoints and metrics, found none")
    # By default JAX reserves 75% of a GPU's memory. --dry_run assumes GPU_SHARE, so a run must take the same.
    devices_lib.limit_gpu_memory(chips.GPU_SHARE)
    hosts.join()
    return train(config, workdir, profile=profile, open_tasks=open_tasks)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/SIZE.py:ARCHITECTURE; override as --config.FIELD=VALUE")
    flags.mark_flag_as_required("config")
    cli.run(main, check=config_files.check_flags)
