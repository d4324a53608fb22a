"""Time of what surrounds training steps (loading data, placing batches, checkpoints, compiling), and of analyses.

    python benchmarks/overheads.py --data=DIR --output=benchmarks/results/NAME.json
    python benchmarks/overheads.py --workdir=DIR --scratch=DIR --output=FILE.json \\
        --command=outliers --command='clusters --layers=0,12,23'

With --data, a folder that `prepare` wrote, the overheads of training are measured. Loading is that of a host with eight
devices, with 16 sequences of 2,048 tokens a step for each device, from the disk and from storage with a latency of
0.1 s. Checkpoints are of a memory model of 8 layers of width 512: `save` returns when the state has left the devices,
and writes to disk while training goes on. Dry runs of 1b compile its step with 2 and with 24 layers.

With --workdir, a model's checkpoints, the time and peak memory of commands of `analyze` are measured, each in a process
of its own; `open` is a process that only loads the checkpoint as they do. A command that is on record in --output is
not repeated: after an interruption, run the same line again.
"""

import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Annotated

import common
import fsspec.asyn
import jax

from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.description import describe
from memoryllm_jax.common import cli, config_files
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import default, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding
from memoryllm_jax.model.flops import train_flops
from memoryllm_jax.training import chips, loop
from memoryllm_jax.training.batches import TrainBatches, place
from memoryllm_jax.training.step import Trainer

DEVICES = 8  # of a host
SEQUENCES = 16  # of a device in each step
LATENCY = 0.1  # seconds of one read from object storage
HERE = os.path.dirname(os.path.abspath(__file__))
# A program that loads a checkpoint as the analyses do, and ends.
_OPEN = """
import sys
from memoryllm_jax.analysis.key_values import KeyValueModel
KeyValueModel.open(sys.argv[1], with_attention=False).params.read()
"""


# Training


def loading(dataset, tokens_wanted):
    """Speed of one host's data loader, which also finds distinct ids, beside what eight H100 need at 60% MFU.

    Returns: tokens a second, those needed, their ratio, and the distinct ids of a batch.
    """
    c = config_files.load(f"{HERE}/../configs/1b.py:memory")
    c.batch_size, c.data.epochs = DEVICES * SEQUENCES, 1000
    c.steps, c.optimizer.warmup_steps = 500, 25
    config = loop.complete(resolve(c), dataset)
    batches = TrainBatches(config, dataset, DEVICES, list(range(DEVICES)))
    step = config.batch_size * config.seq_len
    iterator = batches.iterate(0)
    for _ in range(3):  # until the reader threads are busy
        next(iterator)
    start, count = time.perf_counter(), max(4, tokens_wanted // step)
    for _ in range(count):
        distinct = next(iterator).distinct
    rate = count * step / (time.perf_counter() - start)
    flops = train_flops(config, SEQUENCES * config.seq_len, distinct) / (SEQUENCES * config.seq_len)
    need = DEVICES * 0.6 * chips.get("h100").peak_flops / flops
    return {"tokens_per_second": rate, "needed": need, "times_needed": rate / need, "distinct": distinct}


class SlowStorage(fsspec.asyn.AsyncFileSystem):
    """Files on a disk behind a fixed latency, as of object storage. Reads of one call run concurrently."""

    async def _cat_file(self, path, start=None, end=None, **_):
        await asyncio.sleep(LATENCY)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class ShardByShard(TrainBatches):
    """Reads one batch shard after the other, as before."""

    def windows(self, places):
        return [read for place in places for read in super(ShardByShard, self).windows([place])]


def remote_loading(dataset, rounds):
    """Seconds of a batch from storage with latency, for a host of eight devices: alone, and with threads reading ahead.

    All shards of the host in one call, and shard by shard, take turns.
    """
    c = config_files.load(f"{HERE}/../configs/1b.py:memory")
    c.batch_size, c.data.epochs = DEVICES * SEQUENCES, 1000
    c.steps, c.optimizer.warmup_steps = 500, 25
    config = loop.complete(resolve(c), dataset)
    storage = SlowStorage()
    dataset.train.shards = tuple(shard._replace(fs=storage) for shard in dataset.train.shards)
    found = {}
    for number in range(rounds):
        for name, kind in (("one call", TrainBatches), ("shard by shard", ShardByShard)):
            batches = kind(config, dataset, DEVICES, list(range(DEVICES)))
            start = time.perf_counter()
            batches[number]
            alone = time.perf_counter() - start
            ahead = batches.iterate(0)
            for _ in range(8):  # until the read-ahead is steady
                next(ahead)
            start = time.perf_counter()
            for _ in range(16):
                next(ahead)
            times = found.setdefault(name, {"alone_s": [], "read_ahead_s": []})
            times["alone_s"].append(alone)
            times["read_ahead_s"].append((time.perf_counter() - start) / 16)
    return {"latency_s": LATENCY, "shards": DEVICES, "sequences_a_shard": SEQUENCES} | found


def planning(layers):
    """Seconds of a dry run of 1b flex-3 on 256 H100, which compiles the step for two batches."""
    config = f"--config={HERE}/../configs/1b.py:flex-3"
    command = [sys.executable, "-m", "memoryllm_jax.train", config, "--dry_run", "--devices=256", "--chip=h100"]
    start = time.perf_counter()
    text = subprocess.run([*command, f"--config.model.layers={layers}"], capture_output=True, text=True, check=True)
    return {"seconds": time.perf_counter() - start, "compiled_for": text.stdout.splitlines()[1]}


def stalls(dataset, path):
    """Trains a few steps. Returns: seconds of a step, of placing a batch, of `save`, and until it is on disk."""
    c = default("memory")
    c.model.dim, c.model.layers, c.model.heads, c.batch_size = 512, 8, 8, 1
    c.data.path, c.steps, c.optimizer.warmup_steps, c.model.dtype = path, 6, 1, "float32"
    config = loop.complete(resolve(c), dataset)
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    batches = TrainBatches(config, dataset, 1, [0])
    size = batches.sizes().planned[-1]
    state = trainer.init(jax.random.key(0))
    description = describe(config, dataset.digest, dataset.tokenizer())
    placing, steps, held, written = [], [], [], []
    with tempfile.TemporaryDirectory() as workdir:
        checkpoints = store.Checkpoints(workdir, keep=1)
        for step in range(config.steps):
            batch = batches[step]
            start = time.perf_counter()
            placed = place(batch, size, trainer.batch_sharding)
            placing.append(time.perf_counter() - start)
            state, values = trainer.train(state, placed)
            jax.block_until_ready(values)
            steps.append(time.perf_counter() - start)
            if step % 2:
                start = time.perf_counter()
                checkpoints.save(step, state, description)
                held.append(time.perf_counter() - start)
                checkpoints.wait()
                written.append(time.perf_counter() - start)
        checkpoints.close()
    return {
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "step_s": statistics.median(steps[1:]),
        "place_batch_s": statistics.median(placing[1:]),
        "save_holds_up_s": held[1:],
        "save_on_disk_s": written[1:],
    }


def training(data: str, tokens: int, output: str) -> None:
    """Measures the overheads of training and writes the record."""
    dataset = Dataset(data)
    results = {}

    def keep(name, found):
        results[name] = found
        print(json.dumps(found), flush=True)

    keep("loading", loading(dataset, tokens))
    keep("checkpoints", stalls(dataset, data))
    keep("dry_run", {f"{layers} layers": planning(layers) for layers in (2, 24)})
    keep("remote_loading", remote_loading(dataset, rounds=5))  # last, as it makes the data set slow
    common.write(output, results, {"vocabulary": dataset.vocab_size})


# Analyses


def measure(arguments: list[str]) -> dict[str, float]:
    """Runs a Python process. Returns: its time in seconds and peak memory in MB. Raises: UserError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    # wait4 gives this process's own usage, where resource.getrusage would add up all children.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{shlex.join(arguments)}: ended with exit code {process.returncode}")
    wall = time.perf_counter() - start
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def analyses(workdir: str, scratch: str, commands: tuple[str, ...], output: str) -> None:
    """Measures commands of `analyze` that are not on record yet, and adds them to it."""
    results = {}
    if os.path.exists(output):
        with open(output) as file:
            results = json.load(file)["results"]
    for line in ["open", *commands]:
        name, *options = shlex.split(line)
        arguments = ["-c", _OPEN, workdir]
        if name != "open":
            arguments = ["-m", "memoryllm_jax.analyze", name, f"--workdir={workdir}", f"--output={scratch}", *options]
        if line not in results:
            results[line] = measure(arguments)
            common.write(output, results, {"units": "seconds; peak resident memory in units of 10^6 bytes"})
        print(line, json.dumps(results[line]), flush=True)


def main(
    data: Annotated[str, Option("prepared data, to measure the overheads of training")] = "",
    tokens: Annotated[int, Option("tokens to load", least=1)] = 1 << 25,
    workdir: Annotated[str, Option("a model's checkpoints, to measure analyses")] = "",
    scratch: Annotated[str, Option("folder for the pages of analyses")] = "",
    command: Annotated[tuple[str, ...], Option("an analysis with its options", many=True)] = (),
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    if bool(data) == bool(workdir):
        raise UserError(f"expected --data=DIR or --workdir=DIR, found {'both' if data else 'neither'}")
    if data:
        training(data, tokens, output)
        return
    if not scratch:
        raise UserError("expected --scratch=DIR too, as a folder for the pages of analyses")
    analyses(workdir, scratch, command, output)


if __name__ == "__main__":
    cli.run(main)
