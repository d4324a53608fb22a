"""What a run prints at its start, and what it prints and writes at its end."""

import os

import jax

from memoryllm_jax.checkpoint.trained import for_serving
from memoryllm_jax.common import devices, hosts, storage
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.generation import STEPS_PER_CALL, generate
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model import flops
from memoryllm_jax.training import goodput, schedules
from memoryllm_jax.training.batches import TrainBatches
from memoryllm_jax.training.recorder import quality_text
from memoryllm_jax.training.sizes import Sizes
from memoryllm_jax.training.step import Trainer


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
        f"learning rate: {schedules.text(config)}",
    ]
    if start:
        lines.append(f"going on from step {start}")
    return "\n".join(lines)


def finish(trainer: Trainer, params, tokenizer: Tokenizer, validation: dict | None, times: dict, workdir: str) -> None:
    """Writes result.json, and prints the last validation, the goodput and, if config.sample asks for it, sampled text.

    Args:
      params: the trained parameters on the devices.
      tokenizer: the data's.
      validation: the result of the validation after the last step.
      times: what `Recorder.finish` returns.
      workdir: absolute path or URL.
    Raises: UserError if result.json cannot be written.
    """
    config = trainer.config
    if hosts.is_first():
        record = {"steps": config.steps, "architecture": config.model.architecture, "validation": validation}
        record |= times
        storage.write_json(os.path.join(workdir, "result.json"), record)
        print(f"\nvalidation: {quality_text(validation)}\n{times_text(times)}", flush=True)
    if config.sample.tokens:
        text = sample(trainer, params, tokenizer)  # on every host, as the parameters are spread over them
        if hosts.is_first():
            print(f"sample at temperature {config.sample.temperature:g}:\n{text}")


def times_text(times: dict) -> str:
    """What `Recorder.finish` returns as a line to print."""
    line = goodput.text(times)
    if "peak_memory_bytes" in times:
        line += f"; peak memory of a device {times['peak_memory_bytes'] / 1e9:.1f} GB"
    return line


def sample(trainer: Trainer, params, tokenizer: Tokenizer) -> str:
    """The prompt of config.sample, continued by the model."""
    config = trainer.config
    prompt = tokenizer.encode_prompt(config.sample.prompt)
    if tokenizer.bos_id is not None:
        prompt = [tokenizer.bos_id, *prompt]
    prompt = (prompt or [0])[: config.seq_len - 1]  # a decoder needs a token to start from, and room for the next
    params = for_serving(params, config.model)
    steps = generate(
        Decoder(config.model, params, trainer.mesh),
        LiveRows(config.model, params, trainer.mesh),
        [prompt],
        config.sample.tokens,
        Sampling(config.sample.temperature),
        seed=config.seed % 2**32,
        context=config.seq_len,
        vocab_size=tokenizer.vocab_size,
        stop_ids=tokenizer.stop_ids,
        steps_per_call=STEPS_PER_CALL,
    )
    return tokenizer.decode(prompt + [token for new in steps for _, token in new])
