"""A decode step of one sequence on real text: live FFN-M, ToL on device, host and disk, and base of the same size.

    python benchmarks/decode.py --workdir=DIR --base=DIR --tol=FILE --data=DIR --output=benchmarks/results/NAME.json

Sides that share a decoder share a process, which lives through its group, and they take turns, each on the same next
stretch of text: the token is given by the text, so that cold rows are as frequent as they are. As in `generate`, a
row from host or disk is fetched when the token before it is known, and where rows are on the device the next step goes
before the token is read. Sides that do not fit the memory together are split into groups
(--groups, with a slash between processes); every group holds `disk`, which the others are compared with in the same
round. disk-warm: the file's pages that the stretch needs are in the page cache; disk-cold: all of the file's pages are
dropped before the round. The device cache of rows stays as text has left it.
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

from memoryllm_jax.common import legacy
from memoryllm_jax.data import dataset
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling, draw
from memoryllm_jax.tol.rows import CachedRows, DeviceRows, DiskTable, HostTable
from memoryllm_jax.tol.serving import open_engine

FLAGS = flags.FLAGS


def bandwidth() -> float:
    """Bytes a second that the device reads, by the sum of a large array; the best of several."""
    x = jnp.ones(1 << (28 if jax.default_backend() == "cpu" else 30), jnp.float32)
    add = jax.jit(jnp.sum)
    add(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        add(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def rows_of(model, side):
    """A source of rows for the model's decoder."""
    trained, tol = model.trained, model._tol
    if side == "live":
        params, _ = trained.load(lambda name: trained.is_memory(name) or name == "embedding")
        return LiveRows(model.config, params, trained.mesh)
    if side == "device":
        return DeviceRows(tol, trained.mesh)
    table = HostTable(tol) if side == "host" else DiskTable(tol)
    return CachedRows(table, trained.mesh, FLAGS.cache << 20)


def worker(sides):
    """Sides that share one decoder: reads {"side", "state", "first"} lines, answers with milliseconds a token."""
    base = sides == ["base"]
    model = open_engine(
        FLAGS.base if base else FLAGS.workdir,
        "" if base else FLAGS.tol,
        cache_bytes=FLAGS.cache << 20,
        dtype=FLAGS.dtype,
    )
    sources = {"base": model.rows} if base else {side: rows_of(model, side) for side in sides}
    stream = dataset.Dataset(FLAGS.data).validation
    decoder = model.decoder
    cache = decoder.empty_cache(1, FLAGS.capacity)

    zero = np.zeros(1, np.int32)
    greedy = {"sampling": Sampling(0.0), "vocab_size": model.tokenizer.vocab_size}

    def decode(rows, tokens, cache):
        earlier = None
        for number, token in enumerate(tokens):
            ids, position = np.array([token], np.int32), np.array([number], np.int32)
            logits, cache = decoder.step(rows.fetch(ids), zero, position, cache)
            drawn = draw(logits, np.uint32(0), zero, position, **greedy)
            if rows.on_device:
                earlier, drawn = drawn, earlier
            if drawn is not None:
                np.asarray(drawn)
        jax.block_until_ready((earlier, cache))
        return cache

    facts = {}
    for side, rows in sources.items():
        cache = decode(rows, stream.read(0, 4), cache)
        live = sum(x.nbytes for x in jax.tree.leaves(rows._params.get("memory"))) if side == "live" else 0
        facts[side] = {
            "weights_bytes": decoder.weights_bytes + live,
            "row_bytes": 0 if side in ("live", "base") else model._tol.layout.stride,
            "kv_cache_bytes": sum(x.nbytes for x in jax.tree.leaves(cache)),
            "held_bytes": decoder.weights_bytes
            + live
            + rows.stats().get("device_bytes", rows.stats().get("cache_bytes", 0)),
        }
        facts[side]["held_bytes"] += model._tol.layout.row_bytes if side == "host" else 0
    peak = common.peak_memory(jax.devices()[0])
    print(json.dumps({"facts": facts, "bandwidth": bandwidth(), "peak_bytes": peak}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        side, rows = task["side"], sources[task["side"]]
        tokens = stream.read(task["first"], FLAGS.steps)
        if side == "disk" and task["state"] == "cold":
            os.sync()
            os.posix_fadvise(model._tol.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        elif side == "disk":
            rows.table.read(np.unique(tokens))
        before = hits_of(rows)
        start = time.perf_counter()
        cache = decode(rows, tokens, cache)
        seconds = time.perf_counter() - start
        hits, requests = (b - a for a, b in zip(before, hits_of(rows)))
        print(
            json.dumps({"ms": 1e3 * seconds / FLAGS.steps, "hit_rate": hits / max(requests, 1)}),
            flush=True,
        )


def hits_of(rows):
    return (getattr(rows, "hits", 0), getattr(rows, "requests", 0))


def run_group(group):
    """Figures of each (side, state) and round, and facts; `group`: lists of sides that share a process."""
    workers, facts, speeds = {}, {}, []
    for sides in group:
        command = [sys.executable, *sys.argv, f"--worker={'+'.join(sides)}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        told = json.loads(process.stdout.readline())
        speeds.append(told["bandwidth"])
        for side in sides:
            workers[side], facts[side] = process, told["facts"][side] | {"process_peak_bytes": told["peak_bytes"]}
    runs = [(side, state) for side in workers for state in (("warm", "cold") if side == "disk" else ("warm",))]
    figures = {run: [] for run in runs}
    for number in range(FLAGS.rounds):
        # Cold and warm read other text, so that neither finds the other's rows in the device cache.
        for side, state in runs[number % len(runs) :] + runs[: number % len(runs)]:
            stretch = 2 * number + (state == "cold")
            task = {"side": side, "state": state, "first": 1000 + stretch * FLAGS.steps}
            workers[side].stdin.write(json.dumps(task) + "\n")
            workers[side].stdin.flush()
            figures[side, state].append(json.loads(workers[side].stdout.readline()))
    for process in set(workers.values()):
        process.stdin.close()
        process.wait()
    return figures, facts, max(speeds)


def main():
    logging.set_verbosity(logging.FATAL)
    if FLAGS.worker:
        worker(FLAGS.worker.split("+"))
        return 0
    results, speed = {}, 0.0
    print(f"{'side':<11}{'ms':>8}{'over base':>11}{'over disk-warm':>16}{'GB touched':>12}", end="")
    print(f"{'bandwidth ms':>14}{'held GB':>9}{'hits':>7}")
    for group in FLAGS.groups:
        figures, facts, found = run_group([part.split("+") for part in group.split("/")])
        speed = max(speed, found)
        warm = [r["ms"] for r in figures["disk", "warm"]]
        for (side, state), rounds in figures.items():
            name = f"disk-{state}" if side == "disk" else side
            ms = [r["ms"] for r in rounds]
            touched = sum(facts[side][part] for part in ("weights_bytes", "row_bytes", "kv_cache_bytes"))
            r = {
                "ms_per_token": ms,
                "speed_over_disk_warm": common.ratio(warm, ms),
                "bytes_touched": touched,
                "bandwidth_ms": 1e3 * touched / speed,
                "hit_rate": statistics.mean(r["hit_rate"] for r in rounds),
                **facts[side],
            }
            over_base = ""
            if ("base", "warm") in figures:
                r["speed_over_base"] = common.ratio([b["ms"] for b in figures["base", "warm"]], ms)
                over_base = f"{r['speed_over_base']['median']:.2f}"
            results[f"{group}: {name}"] = r
            hits = "" if r["hit_rate"] is None else f"{r['hit_rate']:.2f}"
            print(
                f"{name:<11}{statistics.median(ms):>8.2f}{over_base:>11}{r['speed_over_disk_warm']['median']:>16.3f}"
                f"{touched / 1e9:>12.3f}{r['bandwidth_ms']:>14.2f}{r['held_bytes'] / 1e9:>9.2f}{hits:>7}",
                flush=True,
            )
        more = {"dtype": FLAGS.dtype, "capacity": FLAGS.capacity, "steps": FLAGS.steps, "bandwidth": speed}
        common.write(FLAGS.output, results, more)
    print(f"memory reads at {speed / 1e9:.1f} GB/s")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "checkpoints of the memory model", required=True)
    flags.DEFINE_string("base", None, "checkpoints of base of the same total", required=True)
    flags.DEFINE_string("tol", None, "ToL file of the memory model", required=True)
    flags.DEFINE_string("data", None, "prepared data", required=True)
    flags.DEFINE_list("groups", ["live+disk/base", "device+disk", "host+disk"], "sides that are measured together")
    flags.DEFINE_string("dtype", "float32", "of the computation")
    flags.DEFINE_integer("cache", 256, "MiB of the device cache of rows")
    flags.DEFINE_integer("capacity", 512, "positions of the key-value cache")
    flags.DEFINE_integer("steps", 48, "tokens a round")
    flags.DEFINE_integer("rounds", 8, "rounds of each group")
    flags.DEFINE_string("output", "", "JSON file for the result")
    flags.DEFINE_string("worker", "", "internal: the side this process is")
    legacy.run(main)
