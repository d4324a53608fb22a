"""Plans a run before it is paid for: `train --dry_run` compiles the real step for devices that need not exist here.

    python -m memoryllm_jax.train --config=configs/1b.py:flex-3 --dry_run --devices=256 --chip=v5p

Memory is read from the compiled step. Traffic follows from the shardings (collectives.py). Time is a roofline from data
sheets, not a measurement:

    compute   = (FLOPs of a step by model/flops.py + recomputed FLOPs) / (peak FLOP/s * EFFICIENCY)
    network   = sum over transfers of (bytes that a device sends / bytes/s of the links that the group spans)
    optimizer = bytes of parameters, moments and gradients read and written / memory bandwidth
    step      = max(compute, network) + optimizer
"""

import concurrent.futures
import dataclasses
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
from memoryllm_jax.training import chips, collectives, sizes
from memoryllm_jax.training.batches import abstract_batch
from memoryllm_jax.training.step import Trainer, compiler_options, memory_needed

EFFICIENCY = 0.5  # share of peak FLOP/s that well-tuned trainers publish near 1B parameters
VOCABULARY = 128_256  # token ids of Llama 3, assumed if neither config nor data give their number
# {tokens: share of distinct ids among them}, for English text with the Llama 3 tokenizer. Measured from 8,192 tokens
# on; below, extrapolated with the slope of other text.
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
# Standard deviation of the distinct ids of one sequence of such text, over their mean (docs/performance.md)
_DISTINCT_DEVIATION = 0.25
# The optimizer reads and writes the parameters and two moments, and reads the gradients: 7 times the parameters' bytes.
_UPDATES = 7


def dry_run(config: Config, chip: str, count: int, slices: int, tokens: float, output: str) -> int:
    """Prints the plan and, with `output`, writes it as JSON.

    Args:
      chip: name of the device, as in chips.CHIPS.
      count: number of devices.
      slices: number of TPU slices; 0: as few as hold the devices.
      tokens: tokens of the whole run; 0: those of the config's steps.
      output: JSON file to write, "" for none.
    Returns: the exit code: 0 if the run fits the devices' memory, else 1.
    Raises: UserError.
    """
    chips.emulate(count)
    devices, compiler = chips.devices(chip, count, slices)
    result = plan(config, chip, devices, tokens, slices) | {"compiler": compiler}
    print(text(result))
    if output:
        storage.write_json(output, result)
    return 0 if result["fits"] else 1


def plan(config: Config, name: str, devices: list[jax.Device], tokens: float = 0, slices: int = 0) -> dict:
    """The plan as JSON values: sizes in bytes, times in seconds.

    Args:
      name: name of the chip.
      devices: devices to compile for, as `chips.devices` returns them.
      tokens, slices: as in `dry_run`.
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
    """(the config with vocab_size and attention filled in as `loop.complete` would, what was assumed for it)."""
    model, assumed = config.model, []
    if config.data.path != "embedded":
        vocab_size = model.vocab_size or dataset.Dataset(config.data.path).vocab_size
        model = dataclasses.replace(model, vocab_size=vocab_size)
    elif not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=VOCABULARY)
        assumed.append(f"{VOCABULARY:,} token ids (Llama 3), as neither data nor config.model.vocab_size is given")
    if model.unique_tokens and model.row_dim:
        assumed.append("distinct ids as in English text with the Llama 3 tokenizer")
    if compiler_options(config, "gpu" if chip.gpu else chip.platform) and not chip.has_compiler():
        assumed.append(f"config.xla=default: XLA for CPUs does not know {config.xla}, which needs more memory")
    backend = attention.resolve_backend(model.attention, model.dtype, model.head_dim, chip.accelerator)
    return dataclasses.replace(config, model=dataclasses.replace(model, attention=backend)), assumed


def distinct_ids(config: Config, shards: int) -> sizes.Sizes:
    """The sizes that a batch shard's distinct ids are padded to (`Batches.sizes`), estimated from English text.

    Args:
      shards: number of batch shards.
    """
    tokens = config.batch_size * config.seq_len // shards
    if not config.model.unique_tokens:
        return sizes.Sizes((tokens,), tokens)
    mean = tokens * np.interp(math.log(tokens), [math.log(n) for n in _DISTINCT], list(_DISTINCT.values()))
    # Sequences are drawn independently.
    std = mean * _DISTINCT_DEVIATION / (tokens / config.seq_len) ** 0.5
    most = min(tokens, config.model.vocab_size)
    return sizes.plan(mean, std, shards, config.steps, most, only_last=not config.model.row_dim)


class _OutOfMemoryError(Exception):
    """The TPU compiler refuses a step that does not fit the memory. Other compilers do not check it."""


def _compile(config: Config, mesh: Mesh, chip: chips.Chip) -> tuple["CompiledStep", dict]:
    """(the compiled step, its memory together with `_batch_that_fits`). Raises: UserError if it does not compile."""
    sequences = _sequences(config, mesh)
    # A second batch size tells the bytes of one sequence. It is half as large where it can be, so that it fits too.
    other_sequences = sequences // 2 if sequences > 1 else 2
    other = dataclasses.replace(config, batch_size=config.batch_size // sequences * other_sequences)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # threads, as XLA releases Python's lock while it compiles
        first = pool.submit(CompiledStep, config, mesh)
        second = pool.submit(CompiledStep, other, mesh)
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
      executable: the jax.stages.Compiled step for the largest of the planned numbers of distinct ids.
      rows: rows of the token memory that a usual step evaluates, of all batch shards.
      sequences: sequences of a micro-batch on one device.
      memory: bytes on one device, by part.
      transfers: what the step sends.
    Raises: _OutOfMemoryError, from the TPU compiler, and UserError.
    """

    def __init__(self, config: Config, mesh: Mesh):
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        if on_cpu:  # cannot compile the chip's attention kernel; `blocked` needs as little memory
            model = dataclasses.replace(config.model, attention="blocked")
            config = dataclasses.replace(config, model=model, xla="default")
        trainer = Trainer(config, mesh)
        planned = distinct_ids(config, trainer.shards).planned
        usual, largest = planned[0], planned[-1]
        batch = abstract_batch(config, trainer.shards, trainer.batch_sharding, largest)
        try:
            # An emulated step is never run, so LLVM need not optimise it.
            options = {"xla_backend_optimization_level": "0"} if on_cpu else {}
            lowered = trainer.train.lower(trainer.state_shape, batch)
            self.executable = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            # The TPU compiler's error for a step that does not fit is known only by this sentence.
            if used := re.search(r"Used [\d.]+\w? of [\d.]+\w? hbm", str(error)):
                raise _OutOfMemoryError(used[0]) from error
            raise UserError(f"the step cannot be compiled: {' '.join(str(error).split())[:600]}") from error
        self.rows = usual * trainer.shards if config.model.row_dim else 0
        self.sequences = _sequences(config, mesh)
        self.memory = _memory(self.executable, trainer)
        self.transfers = collectives.transfers(config, trainer.params_shape, mesh.shape, largest)


def _memory(executable, trainer: Trainer) -> dict[str, int]:
    """Bytes on one device by part: parameters, optimizer, gradients, activations (the rest), and the total."""
    state_shardings = executable.output_shardings[0]

    def stored(part: str) -> int:
        leaves = jax.tree.leaves(trainer.state_shape[part])
        shardings = jax.tree.leaves(state_shardings[part])
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in zip(leaves, shardings, strict=True))

    parameters, moments = stored("params"), stored("opt_state")
    gradients = parameters  # they have the same shapes and shardings
    total = memory_needed(executable)
    return {
        "parameters": parameters,
        "optimizer": moments,
        "gradients": gradients,
        "activations": max(total - parameters - moments - gradients, 0),
        "total": total,
    }


def _sequences(config: Config, mesh: Mesh) -> int:
    """Sequences of a micro-batch on one device."""
    return config.batch_size // config.accumulate // sharding.batch_shards(mesh)


def _batch_that_fits(one: CompiledStep, two: CompiledStep | None, chip: chips.Chip) -> dict:
    """The largest micro-batch that fits a device, from a line through two compiled batch sizes.

    Args:
      two: the step with another batch size; None if it is larger and the compiler found that it does not fit.
    Returns: "fixed" bytes, "each_sequence" bytes, and "largest_sequences_a_device".
    """
    if two is None:
        # `one` has a single sequence, and two do not fit.
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
    """FLOPs per token of a step that evaluates `rows` rows of token memory.

    "per_token_plain" is for a row at every position; "recomputed_per_token" comes on top.
    """
    tokens = config.batch_size * config.seq_len
    return {
        "per_token": flops.train_flops(config, tokens, rows) / tokens,
        "per_token_plain": flops.train_flops(config, 1, 1),
        "recomputed_per_token": _recomputed(config, tokens, rows) / tokens,
    }


def _recomputed(config: Config, tokens: int, rows: int) -> float:
    """FLOPs that the backward pass recomputes: the layers' whole forward pass with remat `full`, else none."""
    if config.model.remat != "full":
        return 0.0
    # A forward pass is a third of a step. The head's is not recomputed.
    head = 2 * tokens * config.model.dim * config.model.vocab_size
    return flops.train_flops(config, tokens, rows) / 3 - head


def _traffic(transfers: list[collectives.Transfer], mesh: Mesh, chip: chips.Chip, domain: int) -> list[dict]:
    """Each transfer's bytes that one device sends, and their seconds, the largest first.

    Args:
      domain: number of devices that `chip.network` joins, which follow each other in the mesh.
    """
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    found = []
    for transfer in transfers:
        # All groups of a transfer are alike, so look at the one with the first device.
        along = tuple(slice(None) if axis in transfer.axes else 0 for axis in mesh.axis_names)
        group = places[along].ravel()
        is_inside_domain = len(set(group // domain)) == 1
        sent = transfer.sent_bytes(len(group))
        found.append(
            {
                "what": transfer.what,
                "kind": transfer.kind,
                "group": len(group),
                "over": "links" if is_inside_domain else "network",
                "bytes": sent,
                "seconds": sent / (chip.network if is_inside_domain else chip.between),
            }
        )
    return sorted(found, key=lambda part: -part["bytes"])


def _times(devices: int, chip: chips.Chip, tokens: int, flops_a_token, traffic, memory) -> dict[str, float]:
    """Seconds of a step by the roofline, in all and by part."""
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
    """What to change if the step does not fit; empty if it fits."""
    if memory["total"] <= chip.memory:
        return []
    parts = -(-_sequences(config, mesh) // max(memory["largest_sequences_a_device"], 1))
    out = _changes(config, mesh, chip, max(2, parts))
    if mesh.shape["data"] > 1:
        state = _gb(memory["parameters"] + memory["optimizer"])
        out.append(f"--config.mesh.data=1 --config.mesh.fsdp=-1: splits the {state} of parameters and moments further")
    return out or ["more devices"]


def _changes(config: Config, mesh: Mesh, chip: chips.Chip, least: int) -> list[str]:
    """Settings that need less memory. Each number of micro-batches is compiled to make sure that it fits.

    Args:
      least: the smallest number of parts to split each micro-batch into.
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
        out.append(f"--config.model.remat=full: recomputes the layers, and keeps {_gb(kept)} of activations a sequence")
    return out


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def text(p: dict) -> str:
    """The plan as text to print.

    Args:
      p: as `plan` returns it.
    """
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
        f"G, recomputed {f['recomputed_per_token'] / 1e9:.2f} G"
    ]
    label = "traffic"
    # Leaves out transfers that would print as 0.00 GB, and those below a hundredth of all traffic.
    least = max(5e6, 0.01 * p["collective_bytes"])
    for part in p["collectives"]:
        if part["bytes"] < least:
            continue
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
        f"roofline, not a measurement: compute at {100 * EFFICIENCY:.0f}% of peak FLOP/s, ring collectives that "
        "overlap with compute, speeds of data sheets (memoryllm_jax/training/chips.py)",
    ]
