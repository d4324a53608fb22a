"""What a training run spends beside arithmetic: loading data, placing batches, checkpoints, compiling.

    python benchmarks/overheads.py --data=DIR --output=benchmarks/results/NAME.json

DIR is a folder that `prepare` wrote. Loading is that of a host with eight devices, a global batch of 16 sequences of
2,048 tokens for each. Checkpoints are of a memory model of 8 layers of width 512: `save` returns when the state has
left the devices, and the rest is written beside training. Dry runs of 1b compile its step with 2 and with 24 layers.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import common
import jax
from absl import flags

from memoryllm_jax.checkpoint import store
from memoryllm_jax.common import legacy
from memoryllm_jax.config import default, load, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import sharding
from memoryllm_jax.model.flops import train_flops
from memoryllm_jax.training import chips, loop
from memoryllm_jax.training.batches import TrainBatches, place
from memoryllm_jax.training.step import Trainer

DEVICES, SEQUENCES = 8, 16  # of a host; of a device and step
FLAGS = flags.FLAGS
HERE = os.path.dirname(os.path.abspath(__file__))


def loading(dataset, tokens_wanted):
    """Tokens a second that one host's loader makes, distinct ids included, and what eight H100 need at 60% MFU."""
    c = load(f"{HERE}/../configs/1b.py:memory")
    c.batch_size, c.data.epochs, c.steps = DEVICES * SEQUENCES, 1000, 500
    config = loop.complete(resolve(c), dataset)
    batches = TrainBatches(config, dataset, DEVICES, list(range(DEVICES)))
    step = config.batch_size * config.seq_len
    for _ in zip(range(3), iterator := batches.iterate(0)):
        pass
    start, count = time.perf_counter(), max(4, tokens_wanted // step)
    for _ in range(count):
        distinct = next(iterator).distinct
    rate = count * step / (time.perf_counter() - start)
    flops = train_flops(config, SEQUENCES * config.seq_len, distinct) / (SEQUENCES * config.seq_len)
    need = DEVICES * 0.6 * chips.PEAK_FLOPS["H100"] / flops
    return {"tokens_per_second": rate, "needed": need, "times_needed": rate / need, "distinct": distinct}


def planning(layers):
    """Seconds of a dry run of 1b flex-3 on 256 H100, which compiles the step for two batches."""
    config = f"--config={HERE}/../configs/1b.py:flex-3"
    command = [sys.executable, "-m", "memoryllm_jax.train", config, "--dry_run", "--devices=256", "--chip=h100"]
    start = time.perf_counter()
    text = subprocess.run([*command, f"--config.model.layers={layers}"], capture_output=True, text=True, check=True)
    return {"seconds": time.perf_counter() - start, "compiled_for": text.stdout.splitlines()[1]}


def stalls(dataset, path):
    """Of a run: seconds a step, seconds that a save holds the loop up, and seconds until it is on disk."""
    c = default("memory")
    c.model.dim, c.model.layers, c.model.heads, c.batch_size = 512, 8, 8, 1
    c.data.path, c.steps, c.optimizer.warmup_steps, c.model.dtype = path, 6, 1, "float32"
    config = loop.complete(resolve(c), dataset)
    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    batches = TrainBatches(config, dataset, 1, [0])
    size = batches.sizes()[0]
    state = trainer.init(jax.random.key(0))
    description = store.describe(config, dataset, dataset.tokenizer())
    placing, steps, held, written = [], [], [], []
    with tempfile.TemporaryDirectory() as workdir:
        checkpoints = store.Checkpoints(workdir, keep=1)
        for step in range(config.steps):
            batch = batches[step]
            start = time.perf_counter()
            placed = place(batch, size, trainer.batch_sharding, config.model)
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


def main():
    dataset = Dataset(FLAGS.data)
    results = {"loading": loading(dataset, FLAGS.tokens)}
    print(json.dumps(results["loading"]))
    results["checkpoints"] = stalls(dataset, FLAGS.data)
    print(json.dumps(results["checkpoints"]))
    results["dry_run"] = {f"{layers} layers": planning(layers) for layers in (2, 24)}
    print(json.dumps(results["dry_run"]))
    common.write(FLAGS.output, results, {"vocabulary": dataset.vocab_size})
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "prepared data", required=True)
    flags.DEFINE_integer("tokens", 1 << 25, "how many to load")
    flags.DEFINE_string("output", "", "JSON file for the result")
    legacy.run(main)
