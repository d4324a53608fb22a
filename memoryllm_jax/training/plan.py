"""A run planned before it is paid for: `train --dry_run` compiles the real step for devices that are not here.

    python -m memoryllm_jax.train --config=configs/1b.py:flex-3 --dry_run --devices=256 --chip=v5p

Memory and collectives are read off the compiled step. Time is a roofline from data sheets, not a measurement:

    compute   = FLOPs of a step (metrics.py, and what rematerialisation computes again) / (peak FLOP/s * EFFICIENCY)
    network   = sum over collectives of bytes a device sends / bytes/s of the links that the group spans
    optimizer = bytes of parameters, moments and gradients read and written / memory bandwidth
    step      = max(compute, network) + optimizer
"""

import collections
import concurrent.futures
import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import progress, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data import dataset
from memoryllm_jax.model import attention, flops, sharding
from memoryllm_jax.model.flops import parameters, train_flops
from memoryllm_jax.training import chips, collectives
from memoryllm_jax.training.batches import Batch
from memoryllm_jax.training.step import Trainer

EFFICIENCY = 0.5  # of peak FLOP/s in compute: what well-tuned trainers publish near 1B parameters
VOCABULARY = 128_256  # Llama 3's, where neither config nor data say
# Share of distinct ids among so many tokens of English with the Llama 3 tokenizer; below 8,192 by other text's slope.
_DISTINCT = {1024: 0.49, 2048: 0.41, 4096: 0.34, 8192: 0.29}
_DISTINCT |= {16384: 0.25, 32768: 0.20, 65536: 0.16, 131072: 0.12, 1048576: 0.04}
_UPDATES = 7  # times the parameters' bytes: read and write them and two moments, read their gradient


def dry_run(config: Config, chip: str, count: int, slices: int, tokens: float, output: str) -> int:
    """Prints the plan and, with `output`, writes it as JSON. Returns 0 if the run fits, else 1. Raises: UserError."""
    chips.emulate(count)
    devices, compiler = chips.devices(chip, count, slices)
    result = plan(config, chip, devices, tokens) | {"compiler": compiler}
    print(text(result))
    if output:
        storage.write_json(output, result)
    return 0 if result["fits"] else 1


def plan(config: Config, name: str, devices: list[jax.Device], tokens: float = 0) -> dict:
    """Everything the plan says, for machines. Sizes in bytes, times in seconds. Raises: UserError.

    Args:
      tokens: of the whole run; 0: what the config's steps come to.
    """
    chip = chips.get(name)
    config, assumed = _completed(config, chip)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_mesh(config, mesh)
    start = time.monotonic()
    sequences = _sequences(config, mesh)
    other = dataclasses.replace(
        config, batch_size=config.batch_size // sequences * (sequences // 2 if sequences > 1 else 2)
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiling = [pool.submit(_Compiled, c, mesh) for c in (config, other)]
    if error := compiling[0].exception():
        if not isinstance(error, _OutOfMemoryError):
            raise error
        advice = "; or ".join(_changes(config, mesh, chip, 2)) or "take more devices"
        raise UserError(f"the step does not fit: {error}; {advice}") from error
    compiled = compiling[0].result()
    second = None if isinstance(compiling[1].exception(), _OutOfMemoryError) else compiling[1].result()
    memory = compiled.memory | _batch_that_fits(compiled, second, chip)
    step_tokens = config.batch_size * config.seq_len
    rows = compiled.rows
    flops = {
        "per_token": train_flops(config, step_tokens, rows) / step_tokens,
        "per_token_plain": train_flops(config, 1, 1),
        "recomputed_per_token": _recomputed(config, step_tokens, rows) / step_tokens,
    }
    traffic = _traffic(compiled.collectives, chip)
    times = {
        "compute": (flops["per_token"] + flops["recomputed_per_token"])
        * step_tokens
        / (mesh.size * chip.peak_flops * EFFICIENCY),
        "network": sum(part["seconds"] for part in traffic),
        "optimizer": _UPDATES * compiled.memory["parameters"] / chip.bandwidth,
    }
    seconds = max(times["compute"], times["network"]) + times["optimizer"]
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
        "sequences_a_device": sequences,
        "assumed": assumed,
        "parameters": parameters(config),
        "memory": memory,
        "memory_of_device": chip.memory,
        "fits": memory["total"] <= chip.memory,
        "advice": _advice(config, mesh, memory, chip),
        "rows_a_step": rows,
        "tokens_a_step": step_tokens,
        "flops": flops,
        "collectives": traffic,
        "collective_bytes": sum(part["bytes"] for part in traffic),
        "seconds": times | {"step": seconds},
        "tokens_per_second": step_tokens / seconds,
        "mfu": flops["per_token"] * step_tokens / seconds / (mesh.size * chip.peak_flops),
        "run_tokens": tokens,
        "run_device_hours": tokens / step_tokens * seconds * mesh.size / 3600,
        "compile_seconds": time.monotonic() - start,
    }


def _completed(config: Config, chip) -> tuple[Config, list[str]]:
    """The config with what data and machine would decide filled in, and what was assumed instead of them."""
    model, assumed = config.model, []
    if config.data.path != "embedded":
        model = dataclasses.replace(model, vocab_size=model.vocab_size or dataset.Dataset(config.data.path).vocab_size)
    elif not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=VOCABULARY)
        assumed.append(f"{VOCABULARY:,} token ids (Llama 3); --config.data.path or --config.model.vocab_size tells")
    if model.unique_tokens and model.row_dim:
        assumed.append("distinct ids as in English text with the Llama 3 tokenizer")
    backend = attention.resolve_backend(model.attention, model.dtype, chip.platform)
    return dataclasses.replace(config, model=dataclasses.replace(model, attention=backend)), assumed


def distinct_ids(config: Config, tokens: int) -> int:
    """Distinct ids that a shard of so many tokens is padded to, by what was measured on English text."""
    if not config.model.unique_tokens:
        return tokens
    share = np.interp(math.log(tokens), [math.log(n) for n in _DISTINCT], list(_DISTINCT.values()))
    return min(-(-int(1.05 * share * tokens) // 128) * 128, tokens, config.model.vocab_size)


class _OutOfMemoryError(Exception):
    """What a TPU's compiler says where the step does not fit; others leave that to us."""


class _Compiled:
    """The train step of a config, compiled for a mesh, and what can be read off it."""

    def __init__(self, config: Config, mesh):
        platform = mesh.devices.flat[0].platform
        if platform == "cpu":  # the chip's kernel cannot be compiled: another that holds as little
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="blocked"))
        trainer = Trainer(config, mesh)
        shards = trainer.shards
        tokens = config.batch_size * config.seq_len // shards
        distinct = distinct_ids(config, tokens)
        self.rows = distinct * shards if config.model.row_dim else 0

        def array(dtype, *shape):
            return jax.ShapeDtypeStruct((shards, *shape), dtype, sharding=trainer.batch_sharding)

        micro = (config.accumulate, tokens // config.accumulate)
        batch = Batch(
            array(jnp.int32, distinct), array(jnp.int32, *micro), array(jnp.int32, *micro), array(jnp.float32, *micro)
        )
        try:
            # Nothing of an emulated step is run, so LLVM need not optimise it.
            options = {"xla_backend_optimization_level": "0"} if platform == "cpu" else {}
            self.compiled = trainer.train.lower(trainer.state_shape, batch).compile(options)
        except jax.errors.JaxRuntimeError as error:
            if used := re.search(r"Used [\d.]+\w? of [\d.]+\w? hbm", str(error)):
                raise _OutOfMemoryError(used[0]) from error
            raise UserError(f"the step cannot be compiled: {' '.join(str(error).split())[:600]}") from error
        self.collectives = collectives.collectives(self.compiled.as_text(), mesh.size)
        self.sequences = _sequences(config, mesh)
        stats = self.compiled.memory_analysis()
        placed = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            trainer.state_shape,
            self.compiled.output_shardings[0],
        )
        state, moments = (sum(map(_local_bytes, jax.tree.leaves(placed[k]))) for k in ("params", "opt_state"))
        gradients = state  # as large and placed as the parameters, which they become
        total = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        total += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
        self.memory = {
            "parameters": state,
            "optimizer": moments,
            "gradients": gradients,
            "activations": max(total - state - moments - gradients, 0),
            "total": total,
        }


def _sequences(config: Config, mesh) -> int:
    """That a device holds at a time."""
    return config.batch_size // config.accumulate // sharding.batch_shards(mesh)


def _local_bytes(x) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _batch_that_fits(one: _Compiled, two: _Compiled | None, chip) -> dict:
    """Bytes a sequence and the largest micro-batch of a device, from a line through two compiled batch sizes.

    `two` is None if it has more sequences and its chip's compiler found no room for it.
    """
    if two is None:
        activations = one.memory["activations"]
        each, fixed = activations / one.sequences, one.memory["total"] - activations
        return {"fixed": fixed, "each_sequence": each, "largest_sequences_a_device": one.sequences}
    each = (one.memory["total"] - two.memory["total"]) / (one.sequences - two.sequences)
    fixed = one.memory["total"] - each * one.sequences
    return {
        "fixed": fixed,
        "each_sequence": each,
        "largest_sequences_a_device": max(0, int((chip.memory - fixed) / each)) if each > 0 else one.sequences,
    }


def _recomputed(config: Config, tokens: int, rows: int) -> float:
    """FLOPs that the backward pass computes again: all of the blocks' forward pass under `full`, else none."""
    if config.model.remat != "full":
        return 0.0
    head = 2 * tokens * config.model.dim * config.model.vocab_size
    return flops.train_flops(config, tokens, rows) / 3 - head


def _traffic(found: list[collectives.Collective], chip) -> list[dict]:
    """Collectives by kind and reach: times, bytes a device sends and seconds, all of one step."""
    parts = collections.defaultdict(lambda: {"times": 0, "bytes": 0.0})
    for c in found:
        inside = len({device // chip.domain for device in c.group}) == 1
        part = parts[c.kind, len(c.group), "links" if inside else "network"]
        part["times"] += c.times
        part["bytes"] += c.sent_bytes
    out = []
    for (kind, group, over), part in sorted(parts.items(), key=lambda item: -item[1]["bytes"]):
        speed = chip.network if over == "links" else chip.between
        out.append({"kind": kind, "group": group, "over": over, **part, "seconds": part["bytes"] / speed})
    return out


def _advice(config: Config, mesh, memory: dict, chip) -> list[str]:
    """What to change where the step does not fit; empty where it does."""
    if memory["total"] <= chip.memory:
        return []
    sequences = _sequences(config, mesh)
    out = _changes(config, mesh, chip, max(2, -(-sequences // max(memory["largest_sequences_a_device"], 1))))
    if mesh.shape["data"] > 1:
        state = _gb(memory["parameters"] + memory["optimizer"])
        out.append(f"--config.mesh.data=1 --config.mesh.fsdp=-1: splits the {state} of parameters and moments further")
    return out or ["more devices"]


def _changes(config: Config, mesh, chip, least: int) -> list[str]:
    """Settings that need less memory; `least`: micro-batches in place of one to begin with. Compiled to make sure."""
    sequences, out = _sequences(config, mesh), []
    for parts in (n for n in range(least, sequences + 1) if sequences % n == 0):
        accumulate = config.accumulate * parts
        try:
            total = _Compiled(dataclasses.replace(config, accumulate=accumulate), mesh).memory["total"]
        except _OutOfMemoryError:
            continue
        if total <= chip.memory:
            out.append(f"--config.accumulate={accumulate}: {_gb(total)} a device")
            break
    if config.model.remat != "full":
        out.append(f"--config.model.remat=full: recomputes a block, for activations of {_blocks(config)} a sequence")
    return out


def _blocks(config: Config) -> str:
    m = config.model
    return _gb(m.layers * config.seq_len * m.dim * jnp.dtype(m.dtype).itemsize)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def text(p: dict) -> str:
    """The plan for people."""
    n, m, f, s = p["parameters"], p["memory"], p["flops"], p["seconds"]
    shape = ", ".join(f"{name} {size}" for name, size in p["mesh"].items())
    lines = [
        f"{p['architecture']} on {p['devices']} x {p['chip']} ({shape}), attention {p['attention']}",
        f"compiled in {p['compile_seconds']:.0f} s by {p.get('compiler', 'XLA')}",
        *(f"assumed: {line}" for line in p["assumed"]),
        "",
        f"parameters       {n['total'] / 1e6:,.1f}M: active {n['active'] / 1e6:,.1f}M (attention "
        f"{n['attention'] / 1e6:,.1f}M, FFN-C {n['ffn_c'] / 1e6:,.1f}M), token memory {n['memory'] / 1e6:,.1f}M, "
        f"embedding and head {n['embedding_and_head'] / 1e6:,.1f}M",
        f"a step           {p['batch_size']} x {p['seq_len']} = {p['tokens_a_step']:,} tokens, "
        f"{p['sequences_a_device']} sequences a device at a time, {p['accumulate']} times; {p['rows_a_step']:,} rows "
        "of token memory",
        "",
        f"memory a device  {_gb(m['total'])} of {_gb(p['memory_of_device'])}: parameters {_gb(m['parameters'])}, "
        f"optimizer {_gb(m['optimizer'])}, gradients {_gb(m['gradients'])}, activations and workspace "
        f"{_gb(m['activations'])}",
        f"largest batch    {m['largest_sequences_a_device']} sequences a device at a time, by "
        f"{_gb(m['each_sequence'])} a sequence",
        *([] if p["fits"] else ["DOES NOT FIT.     " + "; or ".join(p["advice"])]),
        "",
        f"FLOPs a token    {f['per_token'] / 1e9:.2f} G, with FFN-M at every position {f['per_token_plain'] / 1e9:.2f} "
        f"G, computed again {f['recomputed_per_token'] / 1e9:.2f} G",
        *(
            f"{'collectives' if i == 0 else '':<16} {c['kind']} among {c['group']} over the {c['over']}: "
            f"{c['times']} times, {_gb(c['bytes'])} sent a device, {1e3 * c['seconds']:.1f} ms"
            for i, c in enumerate(p["collectives"])
        ),
        "",
        f"step             {1e3 * s['step']:.0f} ms = max(compute {1e3 * s['compute']:.0f}, network "
        f"{1e3 * s['network']:.0f}) + optimizer {1e3 * s['optimizer']:.0f} ms; {p['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {100 * p['mfu']:.0f}%",
        f"the run          {p['run_tokens'] / 1e9:,.1f} G tokens: {p['run_device_hours']:,.0f} device hours, "
        f"{progress.duration(p['run_device_hours'] / p['devices'] * 3600)}",
        f"roofline, not a measurement: compute at {100 * EFFICIENCY:.0f}% of peak FLOP/s, collectives by ring and "
        "hidden behind it, speeds of the data sheets (memoryllm_jax/chips.py)",
    ]
    return "\n".join(lines)
