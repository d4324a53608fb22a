"""Plans a run before it is paid for: `train --dry_run` compiles the real step for devices that need not exist here.

    python -m memoryllm_jax.train --config=configs/1b.py:flex-3 --dry_run --devices=256 --chip=v5p

Memory is read from the compiled step. Traffic follows from the shardings (collectives.py). Times are a roofline from
data sheets (roofline.py).
"""

import dataclasses
import functools
import math
import re
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memoryllm_jax.checkpoint import branch
from memoryllm_jax.checkpoint.description import describe
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError, one_line
from memoryllm_jax.config import Config
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.documents import EMBEDDED
from memoryllm_jax.model import attention, flops, memories, sharding
from memoryllm_jax.training import (
    chips,
    collectives,
    compilation,
    distillation,
    loop,
    muon,
    optimizer,
    plan_text,
    roofline,
    schedules,
    sizes,
    tracking,
)
from memoryllm_jax.training.batches import TrainBatches, abstract_batch
from memoryllm_jax.training.during import OpenTasks
from memoryllm_jax.training.plan_text import gb
from memoryllm_jax.training.step import Trainer

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


def dry_run(
    config: Config, chip: str, count: int, slices: int, output: str, open_tasks: OpenTasks | None = None
) -> int:
    """Prints the plan and, with `output`, writes it as JSON.

    Args:
      chip: name of the device, as in chips.CHIPS.
      count: number of devices.
      slices: number of TPU slices; 0: as few as hold the devices.
      output: JSON file to write, "" for none.
      open_tasks: as of `loop.train`: tasks and trackers that the run would refuse are refused here.
    Returns: the exit code: 0 if the run fits the devices' memory, else 1.
    Raises: UserError.
    """
    chips.emulate(count)
    devices, compiler = chips.devices(chip, count, slices)
    tracking.check(config.log)
    loop.opened_tasks(config, open_tasks)
    result = plan(config, chip, devices, slices) | {"compiler": compiler}
    print(plan_text.text(result))
    if output:
        storage.write_json(output, result)
    return 0 if result["fits"] else 1


def plan(config: Config, name: str, devices: list[jax.Device], slices: int = 0) -> dict:
    """The plan as JSON values: sizes in bytes, times in seconds.

    Args:
      name: name of the chip.
      devices: devices to compile for, as `chips.devices` returns them.
      slices: as in `dry_run`.
    Raises: UserError.
    """
    chip = chips.get(name)
    config, assumed = _completed(config, chip)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_mesh(config, mesh)
    start = time.monotonic()
    compiled, memory = _compile(config, mesh, chip)
    step_tokens = config.batch_size * config.seq_len
    # The run that this one goes on from has made the steps before.
    run_start = max(config.start.step, 0) if config.start.optimizer == "continue" else 0
    steps = config.steps - run_start
    data_use = _data_use(config, sharding.batch_shards(mesh))
    flops_a_token = roofline.flops_a_token(config, compiled.rows, data_use["attention_share"])
    domain = len(devices) // slices if slices else chip.domain
    traffic = roofline.traffic(compiled.transfers, mesh, chip, domain)
    work = muon.work(config, optimizer.trained(config, compiled.params), mesh)
    times = roofline.times(mesh.size, chip, step_tokens, flops_a_token, traffic, memory["gradients"], work)
    peak_tokens_per_second = mesh.size * chip.peak_flops / flops_a_token["per_token"]
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
        "besides": _besides(config, mesh, compiled.rows),
        "optimizer": [group._asdict() for group in optimizer.groups(config, mesh.devices.flat[0])],
        "learning_rate": schedules.text(config),
        "newton_schulz_flops": work.flops,
        "memory": memory,
        "memory_of_device": chip.memory,
        "fits": memory["total"] <= chip.memory,
        "advice": _advice(config, mesh, memory, chip),
        "rows_a_step": compiled.rows,
        **data_use,
        "tokens_a_step": step_tokens,
        "flops": flops_a_token,
        "collectives": traffic,
        "collective_bytes": sum(part["bytes"] for part in traffic),
        "seconds": times,
        "tokens_per_second": _bounds(times, lambda seconds: step_tokens / seconds),
        "mfu": _bounds(times, lambda seconds: step_tokens / seconds / peak_tokens_per_second),
        "run_start": run_start,
        "run_steps": steps,
        "run_tokens": steps * step_tokens,
        "run_device_hours": _bounds(times, lambda seconds: steps * seconds * mesh.size / 3600),
        "compile_seconds": time.monotonic() - start,
    }


def _besides(config: Config, mesh: Mesh, rows: int) -> list[str]:
    """What the run does besides training, validating and saving, a line for each option that asks for it."""
    lines = []
    o, sample, tasks, log = config.optimizer, config.sample, config.eval, config.log
    if config.start.memory == "distill":
        lines.append(distillation.plan_line(config, mesh, rows))
    if o.max_skipped:
        spikes = f" or more than {o.spike_deviations:g} deviations above the mean" if o.spike_deviations else ""
        lines.append(f"skips at most {o.max_skipped:,} steps whose loss or gradient norm is not finite{spikes}")
    if log.norms_every:
        lines.append(f"norms by layer every {log.norms_every:,} steps; all steps compute them")
    if sample.tokens:
        lines.append(f"a sample of {sample.tokens:,} tokens {_when(sample.every)}")
    if tasks.tasks:
        lines.append(f"tasks {tasks.tasks}, {tasks.tasks_limit or 'all'} examples of each, {_when(tasks.tasks_every)}")
    return lines


def _when(every: int) -> str:
    return f"every {every:,} steps and after the last" if every else "after the last step"


def _bounds(times: dict, value: Callable[[float], float]) -> dict[str, float]:
    """The bounds of a value that follows from the seconds of a step. A speed is least where the time is most."""
    values = [value(seconds) for seconds in times["step"].values()]
    return {"least": min(values), "most": max(values)}


def _completed(config: Config, chip: chips.Chip) -> tuple[Config, list[str]]:
    """(the config as the run completes it, what was assumed for it). Raises: UserError.

    As in `loop.complete`, that is vocab_size and attention; for a branch it is also the step that it goes on from.
    """
    assumed = []
    if config.data.path != EMBEDDED:
        dataset = Dataset(config.data.path)
        config = loop.complete(config, dataset, chip.accelerator)
        if config.start.optimizer == "continue":
            described = describe(config, dataset.digest, dataset.tokenizer(), shares=dataset.shares)
            origin = branch.origin(config, described)
            config = dataclasses.replace(config, start=dataclasses.replace(config.start, step=origin.step))
    else:
        m = config.model
        if not m.vocab_size:
            assumed.append(f"{VOCABULARY:,} token ids (Llama 3), as neither data nor config.model.vocab_size is given")
        if memories.of(m).by_bigram:
            assumed.append("that no bigram occurs twice in a batch shard, which needs the most memory")
        elif m.unique_tokens and m.row_dim:
            assumed.append("distinct ids as in English text with the Llama 3 tokenizer")
        backend = attention.resolve_backend(m.attention, m.dtype, m.head_dim, chip.accelerator)
        if config.data.document_mask:
            attention.check_documents(backend, config.seq_len)
            assumed.append("a document for each sequence, so that config.data.document_mask masks nothing")
        model = dataclasses.replace(m, vocab_size=m.vocab_size or VOCABULARY, attention=backend)
        config = dataclasses.replace(config, model=model)
    if compilation.options(config, "gpu" if chip.gpu else chip.platform) and not chip.has_compiler():
        assumed.append(f"config.xla=default: XLA for CPUs does not know {config.xla}, which needs more memory")
    return config, assumed


def distinct_ids(config: Config, shards: int) -> sizes.Sizes:
    """The sizes that a batch shard's distinct ids are padded to: those of the run, if its data is there.

    Without config.data.path they are estimated for English text with the Llama 3 tokenizer.

    Args:
      shards: number of batch shards.
    Raises: UserError if the data cannot be read, or is too short for the run.
    """
    if config.data.path != EMBEDDED:
        return TrainBatches(config, Dataset(config.data.path), shards, local=[]).sizes()
    tokens = config.batch_size * config.seq_len // shards
    if not config.model.unique_tokens or memories.of(config.model).by_bigram:  # no estimate of distinct bigrams
        return sizes.Sizes((tokens,), tokens)
    mean = tokens * np.interp(math.log(tokens), [math.log(n) for n in _DISTINCT], list(_DISTINCT.values()))
    # Sequences are drawn independently.
    std = mean * _DISTINCT_DEVIATION / (tokens / config.seq_len) ** 0.5
    most = min(tokens, config.model.vocab_size)
    return sizes.plan(mean, std, shards, config.steps, most, only_last=not config.model.row_dim)


def _data_use(config: Config, shards: int) -> dict:
    """{"attention_share": the share of causal attention's pairs inside documents, "sources": as of `Order.uses`}.

    Without config.data.path these are 1 and none.
    """
    if config.data.path == EMBEDDED:
        return {"attention_share": 1.0, "sources": []}
    batches = TrainBatches(config, Dataset(config.data.path), shards, local=[])
    uses = [use._asdict() for use in batches.order.uses()]
    return {"attention_share": batches.attention_share(), "sources": uses}


# The TPU compiler's errors for a step that does not fit are known only by these sentences.
_NO_MEMORY = re.compile(r"Used [\d.]+\w? of [\d.]+\w? hbm|memory required .*\([\d.]+\w\) exceeds .*\([\d.]+\w\)")


class _OutOfMemoryError(Exception):
    """The TPU compiler refuses a step that does not fit the memory. Other compilers do not check it."""


def _compile(config: Config, mesh: Mesh, chip: chips.Chip) -> tuple["CompiledStep", dict]:
    """(the compiled step, its memory together with `_batch_that_fits`). Raises: UserError if it does not compile."""
    sequences = _sequences(config, mesh)
    # A second batch size tells the bytes of one sequence. It is half as large where it can be, so that it fits too.
    other_sequences = sequences // 2 if sequences > 1 else 2
    data = dataclasses.replace(config.data, epochs=2 * config.data.epochs)  # a batch twice as large reads twice as much
    other = dataclasses.replace(config, batch_size=config.batch_size // sequences * other_sequences, data=data)
    print(f"compiling the step for {mesh.size} x {chip.title}, with two sizes of batches", file=sys.stderr, flush=True)
    # In order, as Flax modules must not be built, nor JAX functions be traced, in two threads at once.
    lowered = LoweredStep(config, mesh), LoweredStep(other, mesh)
    compiled, other_compiled = compilation.all_at_once([functools.partial(_or_no_room, step) for step in lowered])
    if isinstance(compiled, _OutOfMemoryError):
        advice = "; or ".join(_changes(config, mesh, chip, lowered[0].state, 2)) or "take more devices"
        raise UserError(f"the step does not fit: {compiled}; {advice}") from compiled
    if isinstance(other_compiled, _OutOfMemoryError):
        other_compiled = None
    return compiled, compiled.memory | _batch_that_fits(compiled, other_compiled, chip)


def _or_no_room(step: "LoweredStep") -> "CompiledStep | _OutOfMemoryError":
    """The compiled step, or the error if its compiler finds that it does not fit. Raises: UserError for others."""
    try:
        return step.compile()
    except _OutOfMemoryError as error:
        return error


class CompiledStep(NamedTuple):
    """A compiled train step.

    Attributes:
      executable: the jax.stages.Compiled step for the largest of the planned numbers of distinct ids.
      rows: rows of the token memory that a usual step evaluates, of all batch shards.
      sequences: sequences of a micro-batch on one device.
      memory: bytes on one device, by part.
      transfers: what the step sends.
      params: abstract parameters with their shardings.
    """

    executable: jax.stages.Compiled
    rows: int
    sequences: int
    memory: dict[str, int]
    transfers: list[collectives.Transfer]
    params: dict


class LoweredStep:
    """The train step of a config, traced and lowered for a mesh: what JAX does in Python before XLA compiles it.

    Attributes:
      state: bytes of the parameters, moments and gradients on one device.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self._on_cpu = mesh.devices.flat[0].platform == "cpu"
        if self._on_cpu:  # cannot compile the chip's attention kernel; `blocked` needs as little memory
            model = dataclasses.replace(config.model, attention="blocked")
            config = dataclasses.replace(config, model=model, xla="default")
        self._config, self._mesh, self._trainer = config, mesh, Trainer(config, mesh)
        shapes = self._trainer.state_shape
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        self.state = sum(_state_memory(config, shapes, shardings).values())
        shards = self._trainer.shards
        planned = distinct_ids(config, shards).planned
        self._usual, self._largest = planned[0], planned[-1]
        batch = abstract_batch(config, shards, self._trainer.batch_sharding, self._largest)
        self._lowered = self._trainer.train.lower(shapes, batch)

    def compile(self) -> CompiledStep:
        """Compiles the step. Raises: _OutOfMemoryError, from the TPU compiler, and UserError."""
        config, trainer, mesh = self._config, self._trainer, self._mesh
        # An emulated step is never run, so LLVM need not optimise it.
        options = {"xla_backend_optimization_level": "0"} if self._on_cpu else {}
        try:
            executable = self._lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            if used := _NO_MEMORY.search(str(error)):
                raise _OutOfMemoryError(used[0]) from error
            raise UserError(f"the step cannot be compiled: {one_line(error, 600)}") from error
        return CompiledStep(
            executable,
            rows=self._usual * trainer.shards if config.model.row_dim else 0,
            sequences=_sequences(config, mesh),
            memory=_memory(config, executable, trainer),
            transfers=collectives.transfers(config, trainer.params_shape, mesh.shape, self._largest),
            params=trainer.params_shape,
        )


def _memory(config: Config, executable, trainer: Trainer) -> dict[str, int]:
    """Bytes on one device by part: parameters, optimizer, gradients, activations (the rest), and the total."""
    parts = _state_memory(config, trainer.state_shape, executable.output_shardings[0])
    total = compilation.memory_needed(executable)
    return parts | {"activations": max(total - sum(parts.values()), 0), "total": total}


def _state_memory(config: Config, shapes: dict, shardings: dict) -> dict[str, int]:
    """Bytes on one device of the parameters, the optimizer's state and the gradients.

    Args:
      shapes, shardings: of the trainer's state.
    """
    # Gradients have the shapes and shardings of the parameters that are trained.
    trained = (optimizer.trained(config, tree["params"]) for tree in (shapes, shardings))
    return {
        "parameters": _stored(shapes["params"], shardings["params"]),
        "optimizer": _stored(shapes["opt_state"], shardings["opt_state"]),
        "gradients": _stored(*trained),
    }


def _stored(shapes, shardings) -> int:
    """Bytes on one device of a tree of arrays with these shardings."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in pairs)


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


def _advice(config: Config, mesh: Mesh, memory: dict, chip: chips.Chip) -> list[str]:
    """What to change if the step does not fit; empty if it fits."""
    if memory["total"] <= chip.memory:
        return []
    parts = -(-_sequences(config, mesh) // max(memory["largest_sequences_a_device"], 1))
    state = memory["parameters"] + memory["optimizer"] + memory["gradients"]
    out = _changes(config, mesh, chip, state, max(2, parts))
    if mesh.shape["data"] > 1:
        out.append(f"--config.mesh.data=1 --config.mesh.fsdp=-1: splits the {gb(state)} of the state further")
    return out or ["more devices"]


def _changes(config: Config, mesh: Mesh, chip: chips.Chip, state: int, least: int) -> list[str]:
    """Settings that need less memory. Each number of micro-batches is compiled to make sure that it fits.

    Args:
      state: bytes of the parameters, moments and gradients on a device, which no setting here makes smaller.
      least: the smallest number of parts to split each micro-batch into.
    """
    if state > chip.memory:
        return [f"more devices: parameters, moments and gradients alone take {gb(state)} a device"]
    sequences, out = _sequences(config, mesh), []
    for parts in range(least, sequences + 1):
        if sequences % parts:
            continue
        accumulate = config.accumulate * parts
        print(f"it does not fit; compiling it with config.accumulate={accumulate}", file=sys.stderr, flush=True)
        lowered = LoweredStep(dataclasses.replace(config, accumulate=accumulate), mesh)
        (step,) = compilation.all_at_once([functools.partial(_or_no_room, lowered)])
        if not isinstance(step, _OutOfMemoryError) and step.memory["total"] <= chip.memory:
            out.append(f"--config.accumulate={accumulate}: {gb(step.memory['total'])} a device")
            break
    if config.model.remat != "full":
        m = config.model
        kept = m.layers * config.seq_len * m.dim * jnp.dtype(m.dtype).itemsize
        out.append(f"--config.model.remat=full: recomputes the layers, and keeps {gb(kept)} of activations a sequence")
    return out
