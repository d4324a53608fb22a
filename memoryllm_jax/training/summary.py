"""What a run prints at its start, and what it prints and writes at its end."""

import os

import jax

from memoryllm_jax.common import devices, hosts, storage
from memoryllm_jax.config import Config
from memoryllm_jax.model import flops
from memoryllm_jax.training import goodput, optimizer, schedules
from memoryllm_jax.training.batches import TrainBatches
from memoryllm_jax.training.during import score_lines
from memoryllm_jax.training.sizes import Sizes
from memoryllm_jax.training.step import Trainer
from memoryllm_jax.training.validation import quality_text, source_lines


def opening(trainer: Trainer, batches: TrainBatches, sizes: Sizes, start: int) -> str:
    """The lines that a run prints first, before it compiles: model, devices and length of the run.

    Args:
      sizes: what each batch shard's distinct ids are padded to.
      start: step that the run resumes from, 0 for a new one.
    """
    config, counts = trainer.config, flops.parameters(trainer.config)
    mesh = ", ".join(f"{name} {parts}" for name, parts in trainer.mesh.shape.items())
    planned = " or ".join(f"{size:,}" for size in sizes.planned)
    lines = [
        f"{config.model.architecture}: {counts['total'] / 1e6:.1f}M parameters: {counts['active'] / 1e6:.1f}M active, "
        f"{counts['memory'] / 1e6:.1f}M in the token memory, "
        f"{counts['embedding_and_head'] / 1e6:.1f}M in embedding and head",
        f"{jax.device_count()} x {devices.find()[0].device_kind} as {mesh}; attention {config.model.attention}, "
        f"{config.model.dtype}",
        f"{config.steps} steps of {config.batch_size} x {config.seq_len} tokens, "
        f"{batches.epoch(config.steps):.2f} epochs; compiling for {planned} distinct ids a shard",
        *(f"  {use.text}" for use in batches.order.uses() if batches.is_mixture),
        f"learning rate: {schedules.text(config)}",
        *(group.text for group in optimizer.groups(config, trainer.mesh.devices.flat[0])),
    ]
    if start:
        lines.append(f"going on from step {start}")
    return "\n".join(lines)


def finish(config: Config, results: dict[str, dict], times: dict, workdir: str) -> None:
    """Writes result.json, and prints the last validation, the last scores on tasks and the goodput.

    Args:
      results: of the observers after the last step, by kind.
      times: what `Recorder.finish` returns.
      workdir: absolute path or URL.
    Raises: UserError if result.json cannot be written.
    """
    if not hosts.is_first():
        return
    record = {"steps": config.steps, "architecture": config.model.architecture, "validation": results["validation"]}
    lines = ["", f"validation: {quality_text(results['validation'])}", *source_lines(results["validation"])]
    if "tasks" in results:
        record["tasks"] = results["tasks"]
        lines += ["tasks:", *score_lines(results["tasks"])]
    storage.write_json(os.path.join(workdir, "result.json"), record | times)
    print("\n".join([*lines, times_text(times)]), flush=True)


def times_text(times: dict) -> str:
    """What `Recorder.finish` returns as a line to print."""
    line = goodput.text(times["goodput"])
    if "peak_memory_bytes" in times:
        line += f"; peak memory of a device {times['peak_memory_bytes'] / 1e9:.1f} GB"
    if "skipped" in times:
        line += f"; steps skipped: {times['skipped']:,}"
    return line
