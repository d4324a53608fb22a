"""A decode step of one sequence on real text: live FFN-M, ToL on device, host and disk, and base of the same size.

    python benchmarks/decode.py --workdir=DIR --base=DIR --tol=FILE --data=DIR --output=benchmarks/results/NAME.json

Each side is a process that lives through its group, and they take turns, each on the same next stretch of text: the
token is given by the text, so that cold rows are as frequent as they are; as in `generate`, the row is fetched when
the token before it is known. Sides that do not fit the memory together are split into groups (--groups); every group
holds `disk`, which the others are compared with in the same round. disk-warm: the file's pages that the stretch needs
are in the page cache; disk-cold: all of the file's pages are dropped before the round. The device cache of rows
stays as text has left it.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from memoryllm_jax import cli, data
from memoryllm_jax.generate import Model

FLAGS = flags.FLAGS


def bandwidth() -> float:
    """Bytes a second that the device reads, by the sum of a large array; the best of several."""
    x = jnp.ones(1 << 28, jnp.float32)
    add = jax.jit(jnp.sum)
    add(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        add(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def peak_memory() -> int:
    """Bytes: of the device where it tells, else of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def worker(side):
    """One side: reads {"state", "first"} lines, answers with milliseconds a step."""
    workdir = FLAGS.base if side == "base" else FLAGS.workdir
    looked_up = side in ("device", "host", "disk")
    model = Model(
        workdir, FLAGS.tol if looked_up else "", side if looked_up else "disk", FLAGS.cache << 20, dtype=FLAGS.dtype
    )
    stream = data.Dataset(FLAGS.data).validation
    decoder, rows = model.decoder, model.rows
    live = sum(x.nbytes for x in jax.tree.leaves(rows._params.get("memory"))) if side == "live" else 0
    row_bytes = model._tol.layout.stride if looked_up else 0
    cache = decoder.empty_cache(1, FLAGS.capacity)
    kv_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))

    def step(token, position, cache):
        index = np.zeros(1, np.int32)
        logits, cache = decoder.step(rows.fetch(np.array([token], np.int32)), index, np.array([position]), cache)
        rows.prefetch(np.array([token]))
        return int(logits[0].argmax()), cache

    for position, token in enumerate(stream.read(0, 3)):
        _, cache = step(token, position, cache)
    facts = {
        "weights_bytes": decoder.weights_bytes + live,
        "row_bytes": row_bytes,
        "kv_cache_bytes": kv_bytes,
        "peak_bytes": peak_memory(),
        "bandwidth": bandwidth() if side == "disk" else None,
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        tokens = stream.read(task["first"], FLAGS.steps)
        if side == "disk" and task["state"] == "cold":
            os.sync()
            os.posix_fadvise(model._tol.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        elif side == "disk":
            rows.table.read(np.unique(tokens))
        before = dict(rows.stats())
        start = time.perf_counter()
        for position, token in enumerate(tokens):
            _, cache = step(token, position, cache)
        seconds = time.perf_counter() - start
        after = rows.stats()
        requests = after.get("row_requests", 0) - before.get("row_requests", 0)
        hits = after.get("hit_rate", 1) * after.get("row_requests", 0) - before.get("hit_rate", 1) * before.get(
            "row_requests", 0
        )
        print(json.dumps({"ms": 1e3 * seconds / FLAGS.steps, "hit_rate": hits / max(requests, 1)}), flush=True)


def run_group(sides):
    """{(side, state): figures of each round}, and the facts of each side."""
    workers, facts = {}, {}
    for side in sides:
        command = [sys.executable, *sys.argv, f"--worker={side}"]
        workers[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts[side] = json.loads(workers[side].stdout.readline())
    runs = [(side, state) for side in sides for state in (("warm", "cold") if side == "disk" else ("warm",))]
    figures = {run: [] for run in runs}
    for number in range(FLAGS.rounds):
        # Cold and warm read other text, so that neither finds the other's rows in the device cache.
        for side, state in runs[number % len(runs) :] + runs[: number % len(runs)]:
            stretch = 2 * number + (state == "cold")
            process = workers[side]
            process.stdin.write(json.dumps({"state": state, "first": 1000 + stretch * FLAGS.steps}) + "\n")
            process.stdin.flush()
            figures[side, state].append(json.loads(process.stdout.readline()))
    for process in workers.values():
        process.stdin.close()
        process.wait()
    return figures, facts


def main():
    logging.set_verbosity(logging.FATAL)
    if FLAGS.worker:
        worker(FLAGS.worker)
        return 0
    results, speed = {}, None
    for group in FLAGS.groups:
        sides = [*group.split("+"), "disk"]
        figures, facts = run_group(sides)
        speed = speed or facts["disk"]["bandwidth"]
        warm = [r["ms"] for r in figures["disk", "warm"]]
        for (side, state), rounds in figures.items():
            name = f"disk-{state}" if side == "disk" else side
            if name in results:
                continue
            ms = [r["ms"] for r in rounds]
            touched = facts[side]["weights_bytes"] + facts[side]["row_bytes"] + facts[side]["kv_cache_bytes"]
            results[name] = {
                "ms_per_token": ms,
                "speed_over_disk_warm": ratio(warm, ms),
                "bytes_touched": touched,
                "bandwidth_ms": 1e3 * touched / speed,
                "hit_rate": statistics.mean(r["hit_rate"] for r in rounds),
                **facts[side],
            }
            if "base" in sides:
                results[name]["speed_over_base"] = ratio([r["ms"] for r in figures["base", "warm"]], ms)
    print(f"memory reads at {speed / 1e9:.1f} GB/s")
    print(f"{'side':<11}{'ms':>8}{'over base':>11}{'over disk-warm':>16}{'GB touched':>12}", end="")
    print(f"{'bandwidth ms':>14}{'peak GB':>9}{'hits':>7}")
    for name, r in results.items():
        over_base = f"{r['speed_over_base']['median']:.2f}" if "speed_over_base" in r else ""
        print(
            f"{name:<11}{statistics.median(r['ms_per_token']):>8.1f}{over_base:>11}"
            f"{r['speed_over_disk_warm']['median']:>16.3f}{r['bytes_touched'] / 1e9:>12.3f}{r['bandwidth_ms']:>14.1f}"
            f"{r['peak_bytes'] / 1e9:>9.2f}{r['hit_rate']:>7.2f}"
        )
    more = {"dtype": FLAGS.dtype, "capacity": FLAGS.capacity, "steps": FLAGS.steps, "bandwidth": speed}
    common.write(FLAGS.output, results, more)
    return 0


def ratio(of, ms):
    values = sorted(a / b for a, b in zip(of, ms))
    return {"median": statistics.median(values), "min": values[0], "max": values[-1]}


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "checkpoints of the memory model", required=True)
    flags.DEFINE_string("base", None, "checkpoints of base of the same total", required=True)
    flags.DEFINE_string("tol", None, "ToL file of the memory model", required=True)
    flags.DEFINE_string("data", None, "prepared data", required=True)
    flags.DEFINE_list("groups", ["live+base", "device", "host"], "sides that are measured together, beside disk")
    flags.DEFINE_string("dtype", "float32", "of the computation")
    flags.DEFINE_integer("cache", 256, "MiB of the device cache of rows")
    flags.DEFINE_integer("capacity", 512, "positions of the key-value cache")
    flags.DEFINE_integer("steps", 48, "tokens a round")
    flags.DEFINE_integer("rounds", 8, "rounds of each group")
    flags.DEFINE_string("output", "", "JSON file for the result")
    flags.DEFINE_string("worker", "", "internal: the side this process is")
    cli.run(main)
