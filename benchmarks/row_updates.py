"""What AdamW's update of all rows of embedding and tables costs, where a batch reads only some of them.

    python benchmarks/row_updates.py --output=benchmarks/results/row_updates_cpu.json

AdamW reads and writes parameters and moments of every row of the input embedding and of the tables of value-B and
ple-B, in each step, although the rows of ids that are not in the batch have no gradient. Two figures say what an update
of the batch's rows alone could save:

planned   for 1b on H100s: 9 passes over the rows that the batch does not read (7 of AdamW, the zeros of their gradient,
          and its norm) at the bandwidth of the data sheet, over the planner's least time of a step. An upper bound,
          as gathering and scattering rows is counted as free.
measured  for a small model on this CPU: processor seconds of both updates of the same arrays, and of the whole step,
          in turns.
"""

import json
import subprocess
import sys
import time
from typing import Annotated

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from memoryllm_jax.common import cli
from memoryllm_jax.common.config_files import load
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import default, resolve
from memoryllm_jax.model import flops, sharding
from memoryllm_jax.training import chips, collectives, muon, plan, roofline
from memoryllm_jax.training.batches import Batch
from memoryllm_jax.training.step import Trainer

ARCHITECTURES = ("base", "memory", "value-3", "ple-3")
PASSES = 9
# (data, fsdp) of H100s; a batch has 512 sequences.
MESHES = ((1, 8), (8, 1), (1, 64), (8, 8), (1, 512), (64, 8), (512, 1))
VOCABULARY = 32_768  # of the small model
SEQUENCES, LENGTH = 8, 256


def is_rows(path) -> bool:
    """Whether a parameter is a table whose gradient has only the rows of the batch's ids."""
    return path[-1].key in ("embedding", "table")


def planned(architecture: str, data: int, fsdp: int) -> dict:
    """The upper bound of what updates of rows alone save, as a share of a step of 1b."""
    c = load(f"configs/1b.py:{architecture}")
    c.model.vocab_size, c.batch_size, c.mesh.data, c.mesh.fsdp = plan.VOCABULARY, 512, data, fsdp
    c.accumulate = max(1, 512 // data // fsdp // 8)
    c.model.attention = "blocked"
    config = resolve(c)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: data * fsdp])
    params = Trainer(config, mesh).params_shape
    usual = plan.distinct_ids(config, data * fsdp).planned
    rows = data * fsdp * usual[0] if config.model.row_dim else 0
    chip = chips.get("h100")
    traffic = roofline.traffic(collectives.transfers(config, params, mesh.shape, usual[-1]), mesh, chip, chip.domain)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    stored = {path: 4 * np.prod(x.sharding.shard_shape(x.shape)) for path, x in leaves}
    work = roofline.flops_a_token(config, rows), traffic, sum(stored.values()), muon.Work()
    step = roofline.times(mesh.size, chip, config.batch_size * config.seq_len, *work)["step"]["least"]
    read = plan.distinct_ids(config, 1).planned[0] / plan.VOCABULARY
    of_rows = float(sum(size for path, size in stored.items() if is_rows(path)))
    saved = PASSES * (1 - read) * of_rows / chip.bandwidth
    return {
        "rows_read": read,
        "bytes_of_rows_a_device": of_rows,
        "state_bytes_a_device": 4 * float(sum(stored.values())),
        "step_ms": 1e3 * float(step),
        "sums_of_tables_ms": 1e3
        * sum(t["seconds"]["least"] for t in traffic if t["what"] == "gradients of the tables"),
        "saved_ms": 1e3 * saved,
        "saved_share": saved / float(step),
    }


def batch_of(rng) -> tuple[Batch, np.ndarray]:
    """A batch of one shard, with ids whose frequencies follow Zipf's law; and its distinct ids."""
    weights = 1 / np.arange(1, VOCABULARY + 1)
    tokens = rng.choice(VOCABULARY, (SEQUENCES, LENGTH + 1), p=weights / weights.sum())
    ids, index = np.unique(tokens[:, :-1], return_inverse=True)
    shape = (1, 1, SEQUENCES * LENGTH)
    ids = ids.astype(np.int32)
    targets, index = (x.reshape(shape).astype(np.int32) for x in (tokens[:, 1:], index))
    return Batch(ids[None], index, targets, np.ones(shape, np.float32)), ids


def dense(tx, params, state, grads, ids_U):
    """AdamW on all rows of tables [..., V, R]."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    grads = jax.tree.map(lambda zero, g: zero.at[..., ids_U, :].add(g), zeros, grads)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def by_rows(tx, params, state, grads, ids_U):
    """AdamW on the rows of these ids alone."""
    adam, *rest = state

    def rows(tree):
        return jax.tree.map(lambda x: x[..., ids_U, :], tree)

    part = adam._replace(mu=rows(adam.mu), nu=rows(adam.nu)), *rest
    updates, (new, *rest) = tx.update(grads, part, rows(params))

    def put(tree, values):
        return jax.tree.map(lambda x, v: x.at[..., ids_U, :].set(v), tree, values)

    params = jax.tree.map(lambda x, u: x.at[..., ids_U, :].add(u), params, updates)
    return params, (new._replace(mu=put(adam.mu, new.mu), nu=put(adam.nu, new.nu)), *rest)


def measured(architecture: str, rounds: int) -> dict:
    """Processor seconds of a step and of both updates of its tables, in turns."""
    c = default(architecture)
    c.model.dim, c.model.layers, c.model.heads, c.model.vocab_size = 256, 2, 8, VOCABULARY
    c.model.dtype, c.batch_size, c.seq_len, c.steps = "float32", SEQUENCES, LENGTH, 1000
    c.optimizer.warmup_steps = 10
    config = resolve(c)
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    batch, ids = batch_of(np.random.default_rng(0))
    batch = jax.tree.map(lambda x: jax.device_put(x, trainer.batch_sharding), batch)
    state = trainer.init(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(state["params"])
    tables = {jax.tree_util.keystr(path): x + 0 for path, x in leaves if is_rows(path)}
    grads = jax.tree.map(lambda x: jnp.full((*x.shape[:-2], len(ids), x.shape[-1]), 1e-3), tables)
    tx = optax.adamw(1e-4, 0.9, 0.95, weight_decay=0.1)
    sides = {}
    for name, update in (("dense", dense), ("by_rows", by_rows)):
        jitted = jax.jit(lambda p, s, update=update: update(tx, p, s, grads, ids), donate_argnums=(0, 1))
        params = jax.tree.map(lambda x: x + 0, tables)
        sides[name] = [jitted, (params, tx.init(params))]
    seconds = {"step": [], "dense": [], "by_rows": []}
    for number in range(rounds + 2):  # the first two compile, as the results of the first have other shardings
        start = time.process_time()
        state, _ = trainer.train(state, batch)
        jax.block_until_ready(state)
        taken = {"step": time.process_time() - start}
        for name, side in sides.items():
            start = time.process_time()
            side[1] = jax.block_until_ready(side[0](*side[1]))
            taken[name] = time.process_time() - start
        if number > 1:
            for name, value in taken.items():
                seconds[name].append(value)
    saved = [d - r for d, r in zip(seconds["dense"], seconds["by_rows"], strict=True)]
    return {
        "parameters": flops.parameters(config)["total"],
        "parameters_of_rows": int(sum(x.size for x in tables.values())),
        "rows_read": len(ids) / VOCABULARY,
        "processor_seconds": {name: common.spread(values) for name, values in seconds.items()},
        "dense_share": common.ratio(seconds["dense"], seconds["step"]),
        "saved_share": common.ratio(saved, seconds["step"]),
    }


def main(
    rounds: Annotated[int, Option("rounds that are measured, after two that compile", least=1)] = 7,
    measure: Annotated[str, Option("architecture to measure in this process; it is printed as JSON")] = "",
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    if measure:
        print(json.dumps(measured(measure, rounds)))
        return
    results = {"measured": {}, "planned": {}}
    for architecture in ARCHITECTURES:  # in a process of its own, as plans need emulated devices
        command = [sys.executable, __file__, f"--measure={architecture}", f"--rounds={rounds}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results["measured"][architecture] = json.loads(done.stdout)
        print(architecture, results["measured"][architecture], flush=True)
    chips.emulate(512)
    for architecture in ARCHITECTURES:
        for data, fsdp in MESHES:
            name = f"{architecture}, data {data} x fsdp {fsdp}"
            results["planned"][name] = planned(architecture, data, fsdp)
            print(name, results["planned"][name], flush=True)
    shape = {"vocabulary": VOCABULARY, "sequences": SEQUENCES, "length": LENGTH}
    common.write(output, results, {"small_model": shape})


if __name__ == "__main__":
    cli.run(main)
