"""A run planned before it is paid for: `train --dry_run` compiles the real step for devices that are not here.

    python -m memoryllm_jax.train --config=configs/1b.py:flex-3 --dry_run --devices=256 --chip=v5p

Memory is read off the compiled step. Traffic follows from the shardings (collectives.py). Time is a roofline from data
sheets, not a measurement:

    compute   = FLOPs of a step (model/flops.py, and what rematerialisation computes again) / (peak FLOP/s * EFFICIENCY)
    network   = sum over transfers of bytes a device sends / bytes/s of the links that the group spans
    optimizer = bytes of parameters, moments and gradients read and written / memory bandwidth
    step      = max(compute, network) + optimizer
"""

import concurrent.futures
import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memoryllm_jax.common import progress, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data import dataset
from memoryllm_jax.model import attention, flops, sharding
from memoryllm_jax.training import chips, collectives
from memoryllm_jax.training.batches import Batch
from memoryllm_jax.training.step import Trainer

EFFICIENCY = 0.5  # of peak FLOP/s in compute: what well-tuned trainers publish near 1B parameters
VOCABULARY = 128_256  # Llama 3's, where neither config nor data say
# Share of distinct ids among so many tokens of English with the Llama 3 tokenizer; below 8,192 by other text's slope.
_DISTINCT = {
    1024: 0.49,
    2048: 0.41,
    4096: 0.34,
    8192: 0.29,
    16384: 0.25,
    32768: 0.20,
    65536: 0.16,
    131072: 0.12,
    1048576: 0.04,
}
# The optimizer reads and writes the parameters and two moments, and reads the gradient: so many times their bytes.
_UPDATES = 7


def dry_run(config: Config, chip: str, count: int, slices: int, tokens: float, output: str) -> int:
    """Prints the plan and, with `output`, writes it as JSON. Returns 0 if the run fits, else 1. Raises: UserError.

    Args:
      count: devices of `chip`.  slices: of TPUs; 0: as few as hold the devices.
      tokens: of the whole run; 0: those of the config's steps.
    """
    chips.emulate(count)
    devices, compiler = chips.devices(chip, count, slices)
    result = plan(config, chip, devices, tokens, slices) | {"compiler": compiler}
    print(text(result))
    if output:
        storage.write_json(output, result)
    return 0 if result["fits"] else 1


def plan(config: Config, name: str, devices: list[jax.Device], tokens: float = 0, slices: int = 0) -> dict:
    """Everything the plan says, for machines. Sizes in bytes, times in seconds. Arguments as of `dry_run`.

    Raises: UserError.
    """
    chip = chips.get(name)
    config, assumed = _completed(config, chip)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_mesh(config, mesh)
    start = time.monotonic()
    compiled, memory = _compile(config, mesh, chip)
    step_tokens = config.batch_size * config.seq_len
    flops_a_token = _flops_a_token(config, compiled.rows)
    domain = len(devices) // slices if slices else chip.domain
    traffic = _traffic(compiled.transfers, mesh, chip, domain)
    times = _times(mesh.size, chip, step_tokens, flops_a_token, traffic, memory)
    tokens = tokens or config.steps * step_tokens
    return {
        "chip": chip.title,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "architecture": config.model.architecture,
        "attention": config.model.attention,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "seq_len": config.seq_len,
        "sequences_a_device": _sequences(config, mesh),
        "assumed": assumed,
        "parameters": flops.parameters(config),
        "memory": memory,
        "memory_of_device": chip.memory,
        "fits": memory["total"] <= chip.memory,
        "advice": _advice(config, mesh, memory, chip),
        "rows_a_step": compiled.rows,
        "tokens_a_step": step_tokens,
        "flops": flops_a_token,
        "collectives": traffic,
        "collective_bytes": sum(part["bytes"] for part in traffic),
        "seconds": times,
        "tokens_per_second": step_tokens / times["step"],
        "mfu": flops_a_token["per_token"] * step_tokens / times["step"] / (mesh.size * chip.peak_flops),
        "run_tokens": tokens,
        "run_device_hours": tokens / step_tokens * times["step"] * mesh.size / 3600,
        "compile_seconds": time.monotonic() - start,
    }


def _completed(config: Config, chip: chips.Chip) -> tuple[Config, list[str]]:
    """The config with what data and machine would decide filled in, and what was assumed instead of them."""
    model, assumed = config.model, []
    if config.data.path != "embedded":
        vocab_size = model.vocab_size or dataset.Dataset(config.data.path).vocab_size
        model = dataclasses.replace(model, vocab_size=vocab_size)
    elif not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=VOCABULARY)
        assumed.append(f"{VOCABULARY:,} token ids (Llama 3), as neither data nor config.model.vocab_size is given")
    if model.unique_tokens and model.row_dim:
        assumed.append("distinct ids as in English text with the Llama 3 tokenizer")
    backend = attention.resolve_backend(model.attention, model.dtype, chip.platform)
    return dataclasses.replace(config, model=dataclasses.replace(model, attention=backend)), assumed


def distinct_ids(config: Config, tokens: int) -> int:
    """Distinct ids that a batch shard of so many tokens is padded to, by what was measured on English text."""
    if not config.model.unique_tokens:
        return tokens
    share = np.interp(math.log(tokens), [math.log(n) for n in _DISTINCT], list(_DISTINCT.values()))
    with_margin = -(-int(1.05 * share * tokens) // 128) * 128  # training pads too (Batches.sizes)
    return min(with_margin, tokens, config.model.vocab_size)


class _OutOfMemoryError(Exception):
    """A TPU's compiler found that the step does not fit. Other compilers do not look."""


def _compile(config: Config, mesh: Mesh, chip: chips.Chip) -> tuple["CompiledStep", dict]:
    """The compiled step, and its memory with what `_batch_that_fits` says. Raises: UserError if it does not compile."""
    sequences = _sequences(config, mesh)
    # A second batch size gives the bytes of a sequence: half as large, so that it compiles wherever the first does.
    other_sequences = sequences // 2 if sequences > 1 else 2
    other = dataclasses.replace(config, batch_size=config.batch_size // sequences * other_sequences)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA compiles without Python's lock
        first, second = (pool.submit(CompiledStep, c, mesh) for c in (config, other))
    error = first.exception()
    if isinstance(error, _OutOfMemoryError):
        advice = "; or ".join(_changes(config, mesh, chip, 2)) or "take more devices"
        raise UserError(f"the step does not fit: {error}; {advice}") from error
    compiled = first.result()
    other_compiled = None if isinstance(second.exception(), _OutOfMemoryError) else second.result()
    return compiled, compiled.memory | _batch_that_fits(compiled, other_compiled, chip)


class CompiledStep:
    """The train step of a config, compiled for a mesh.

    Attributes:
      rows: of the token memory that a step evaluates, all batch shards together.
      sequences: that a device holds at a time.
      memory: bytes a device, by part.
      transfers: what the step sends.
    """

    def __init__(self, config: Config, mesh: Mesh):
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        if on_cpu:  # the chip's attention kernel cannot be compiled here; this one holds as little memory
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="blocked"))
        trainer = Trainer(config, mesh)
        distinct = distinct_ids(config, config.batch_size * config.seq_len // trainer.shards)
        try:
            # Nothing of an emulated step is run, so LLVM need not optimise it.
            options = {"xla_backend_optimization_level": "0"} if on_cpu else {}
            lowered = trainer.train.lower(trainer.state_shape, _abstract_batch(config, trainer, distinct))
            self.executable = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            # A TPU's compiler refuses what does not fit, and says so in this sentence alone.
            if used := re.search(r"Used [\d.]+\w? of [\d.]+\w? hbm", str(error)):
                raise _OutOfMemoryError(used[0]) from error
            raise UserError(f"the step cannot be compiled: {' '.join(str(error).split())[:600]}") from error
        self.rows = distinct * trainer.shards if config.model.row_dim else 0
        self.sequences = _sequences(config, mesh)
        self.memory = _memory(self.executable, trainer)
        self.transfers = collectives.transfers(config, trainer.params_shape, mesh.shape, distinct)


def _abstract_batch(config: Config, trainer: Trainer, distinct: int) -> Batch:
    """A batch's shapes and shardings."""
    tokens = config.batch_size * config.seq_len // trainer.shards
    positions = trainer.shards, config.accumulate, tokens // config.accumulate
    array = functools.partial(jax.ShapeDtypeStruct, sharding=trainer.batch_sharding)
    return Batch(
        ids_SU=array((trainer.shards, distinct), jnp.int32),
        index_SAN=array(positions, jnp.int32),
        targets_SAN=array(positions, jnp.int32),
        weights_SAN=array(positions, jnp.float32),
    )


def _memory(executable, trainer: Trainer) -> dict[str, int]:
    """Bytes of one device by part, of the compiled step."""
    state_shardings = executable.output_shardings[0]

    def stored(part: str) -> int:
        placed = zip(jax.tree.leaves(trainer.state_shape[part]), jax.tree.leaves(state_shardings[part]))
        return sum(math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize for x, where in placed)

    parameters, moments = stored("params"), stored("opt_state")
    gradients = parameters  # of the same shapes and shardings
    stats = executable.memory_analysis()
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes  # donated arguments that outputs take the place of
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    return {
        "parameters": parameters,
        "optimizer": moments,
        "gradients": gradients,
        "activations": max(total - parameters - moments - gradients, 0),
        "total": total,
    }


def _sequences(config: Config, mesh: Mesh) -> int:
    """Sequences that a device holds at a time."""
    return config.batch_size // config.accumulate // sharding.batch_shards(mesh)


def _batch_that_fits(one: CompiledStep, two: CompiledStep | None, chip: chips.Chip) -> dict:
    """Bytes a sequence and the largest micro-batch of a device, from a line through two compiled batch sizes.

    Args:
      two: None if it has more sequences and its chip's compiler found no room for it.
    """
    if two is None:
        activations = one.memory["activations"]
        return {
            "fixed": one.memory["total"] - activations,
            "each_sequence": activations / one.sequences,
            "largest_sequences_a_device": one.sequences,
        }
    each = (one.memory["total"] - two.memory["total"]) / (one.sequences - two.sequences)
    fixed = one.memory["total"] - each * one.sequences
    largest = max(0, int((chip.memory - fixed) / each)) if each > 0 else one.sequences
    return {"fixed": fixed, "each_sequence": each, "largest_sequences_a_device": largest}


def _flops_a_token(config: Config, rows: int) -> dict[str, float]:
    tokens = config.batch_size * config.seq_len
    return {
        "per_token": flops.train_flops(config, tokens, rows) / tokens,
        "per_token_plain": flops.train_flops(config, 1, 1),
        "recomputed_per_token": _recomputed(config, tokens, rows) / tokens,
    }


def _recomputed(config: Config, tokens: int, rows: int) -> float:
    """FLOPs that the backward pass computes again: all of the layers' forward pass under `full`, else none."""
    if config.model.remat != "full":
        return 0.0
    # A forward pass is a third of a step; the head's is not computed again.
    head = 2 * tokens * config.model.dim * config.model.vocab_size
    return flops.train_flops(config, tokens, rows) / 3 - head


def _traffic(transfers: list[collectives.Transfer], mesh: Mesh, chip: chips.Chip, domain: int) -> list[dict]:
    """Each transfer's bytes that a device sends and its seconds, the largest first.

    Args:
      domain: devices that `chip.network` joins, in the mesh's order.
    """
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    found = []
    for transfer in transfers:
        along = tuple(slice(None) if axis in transfer.axes else 0 for axis in mesh.axis_names)
        group = places[along].ravel()
        inside = len(set(group // domain)) == 1
        sent = transfer.sent_bytes(len(group))
        found.append(
            {
                "what": transfer.what,
                "kind": transfer.kind,
                "group": len(group),
                "over": "links" if inside else "network",
                "bytes": sent,
                "seconds": sent / (chip.network if inside else chip.between),
            }
        )
    return sorted(found, key=lambda part: -part["bytes"])


def _times(devices: int, chip: chips.Chip, tokens: int, flops_a_token, traffic, memory) -> dict[str, float]:
    """Seconds of a step by the roofline."""
    computed = (flops_a_token["per_token"] + flops_a_token["recomputed_per_token"]) * tokens
    compute = computed / (devices * chip.peak_flops * EFFICIENCY)
    network = sum(part["seconds"] for part in traffic)
    optimizer = _UPDATES * memory["parameters"] / chip.bandwidth
    return {
        "compute": compute,
        "network": network,
        "optimizer": optimizer,
        "step": max(compute, network) + optimizer,
    }


def _advice(config: Config, mesh: Mesh, memory: dict, chip: chips.Chip) -> list[str]:
    """What to change where the step does not fit; empty where it does."""
    if memory["total"] <= chip.memory:
        return []
    parts = -(-_sequences(config, mesh) // max(memory["largest_sequences_a_device"], 1))
    out = _changes(config, mesh, chip, max(2, parts))
    if mesh.shape["data"] > 1:
        state = _gb(memory["parameters"] + memory["optimizer"])
        out.append(f"--config.mesh.data=1 --config.mesh.fsdp=-1: splits the {state} of parameters and moments further")
    return out or ["more devices"]


def _changes(config: Config, mesh: Mesh, chip: chips.Chip, least: int) -> list[str]:
    """Settings that need less memory, compiled to make sure.

    Args:
      least: micro-batches to try first in place of each one.
    """
    sequences, out = _sequences(config, mesh), []
    for parts in range(least, sequences + 1):
        if sequences % parts:
            continue
        accumulate = config.accumulate * parts
        try:
            total = CompiledStep(dataclasses.replace(config, accumulate=accumulate), mesh).memory["total"]
        except _OutOfMemoryError:
            continue
        if total <= chip.memory:
            out.append(f"--config.accumulate={accumulate}: {_gb(total)} a device")
            break
    if config.model.remat != "full":
        m = config.model
        kept = m.layers * config.seq_len * m.dim * jnp.dtype(m.dtype).itemsize
        out.append(f"--config.model.remat=full: recomputes the layers, for activations of {_gb(kept)} a sequence")
    return out


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def text(p: dict) -> str:
    """The plan for people."""
    shape = ", ".join(f"{name} {size}" for name, size in p["mesh"].items())
    lines = [
        f"{p['architecture']} on {p['devices']} x {p['chip']} ({shape}), attention {p['attention']}",
        f"compiled in {p['compile_seconds']:.0f} s by {p.get('compiler', 'XLA')}",
        *(f"assumed: {line}" for line in p["assumed"]),
        "",
        *_size_lines(p),
        "",
        *_memory_lines(p),
        "",
        *_work_lines(p),
        "",
        *_time_lines(p),
    ]
    return "\n".join(lines)


def _size_lines(p: dict) -> list[str]:
    millions = {name: f"{count / 1e6:,.1f}M" for name, count in p["parameters"].items()}
    return [
        f"parameters       {millions['total']}: active {millions['active']} (attention {millions['attention']}, FFN-C "
        f"{millions['ffn_c']}), token memory {millions['memory']}, embedding and head "
        f"{millions['embedding_and_head']}",
        f"a step           {p['batch_size']} x {p['seq_len']} = {p['tokens_a_step']:,} tokens, "
        f"{p['sequences_a_device']} sequences a device at a time, {p['accumulate']} times; {p['rows_a_step']:,} rows "
        "of token memory",
    ]


def _memory_lines(p: dict) -> list[str]:
    m = p["memory"]
    lines = [
        f"memory a device  {_gb(m['total'])} of {_gb(p['memory_of_device'])}: parameters {_gb(m['parameters'])}, "
        f"optimizer {_gb(m['optimizer'])}, gradients {_gb(m['gradients'])}, activations and workspace "
        f"{_gb(m['activations'])}",
        f"largest batch    {m['largest_sequences_a_device']} sequences a device at a time, by "
        f"{_gb(m['each_sequence'])} a sequence",
    ]
    if not p["fits"]:
        lines.append("DOES NOT FIT.     " + "; or ".join(p["advice"]))
    return lines


def _work_lines(p: dict) -> list[str]:
    f = p["flops"]
    lines = [
        f"FLOPs a token    {f['per_token'] / 1e9:.2f} G, with FFN-M at every position {f['per_token_plain'] / 1e9:.2f} "
        f"G, computed again {f['recomputed_per_token'] / 1e9:.2f} G"
    ]
    label = "traffic"
    # What would read as 0.00 GB is left out, as is less than a hundredth of all traffic.
    least = max(5e6, 0.01 * p["collective_bytes"])
    shown = [part for part in p["collectives"] if part["bytes"] >= least]
    for part in shown:
        lines.append(
            f"{label:<16} {part['what']}: {_gb(part['bytes'])} sent a device, {part['kind']} among {part['group']} "
            f"over the {part['over']}, {1e3 * part['seconds']:.1f} ms"
        )
        label = ""
    return lines


def _time_lines(p: dict) -> list[str]:
    s = p["seconds"]
    hours = p["run_device_hours"]
    return [
        f"step             {_ms(s['step'])} ms = max(compute {_ms(s['compute'])}, network {_ms(s['network'])}) + "
        f"optimizer {_ms(s['optimizer'])} ms; {p['tokens_per_second']:,.0f} tokens/s, MFU {100 * p['mfu']:.0f}%",
        f"the run          {p['run_tokens'] / 1e9:,.1f} G tokens: {hours:,.0f} device hours, "
        f"{progress.duration(hours / p['devices'] * 3600)}",
        f"roofline, not a measurement: compute at {100 * EFFICIENCY:.0f}% of peak FLOP/s, collectives by ring and "
        "hidden behind it, speeds of the data sheets (memoryllm_jax/training/chips.py)",
    ]
