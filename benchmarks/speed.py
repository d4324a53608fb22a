"""Training speed of our models and of peers; on an accelerator also decoding at batch 1 and the build of a ToL file.

    python benchmarks/speed.py --platform=cpu --data=DIR --output=benchmarks/results/NAME.json
    python benchmarks/speed.py --platform=gpu --output=benchmarks/results/NAME.json
    python benchmarks/speed.py --table=NAME.json,NAME.json

DIR is a folder that `prepare` wrote; without it ids are drawn at random (synthetic.py), which the record says. The last
line prints the Markdown tables of docs/performance.md. A side is a peer (peers.py, which tells what to install) or an
architecture, with settings of its own after slashes: base, memory/accumulate=4, flex-3/model.remat=full.

All sides have one shape, one batch, AdamW and clipping. Each is a process of its own. On a CPU they live through the
whole run and take turns, so that the ratios of one round saw the same machine; on an accelerator they run one after
another, as each needs its memory. A side that fails is recorded with its error, the others go on, and the exit code
is 1. Decoding and ToL build use the other benchmarks and the project's own commands on untrained weights.
"""

import ast
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

import common
import numpy as np
from absl import flags
from peers import PEERS

from memoryllm_jax.common import legacy
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import default, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import flops, sharding
from memoryllm_jax.training import loop, metrics
from memoryllm_jax.training.batches import HostBatch, SizeAgreement, TrainBatches, place
from memoryllm_jax.training.step import Trainer

PRESETS = {
    "cpu": {
        "dim": 512,
        "layers": 8,
        "heads": 8,
        "seq_len": 2048,
        "batch_size": 4,
        "dtype": "float32",
        "loss_chunk": 512,
        "rounds": 5,
        "steps": 1,
        "sides": [*PEERS, "base", "memory/model.unique_tokens=False", "memory", "flex-3"],
    },
    "gpu": {
        "dim": 2048,
        "layers": 24,
        "heads": 32,
        "seq_len": 2048,
        "batch_size": 16,
        "dtype": "bfloat16",
        "loss_chunk": 4096,
        "rounds": 5,
        "steps": 4,
        "sides": ["base", "memory", "flex-3"],
    },
}
SHAPE = ("dim", "layers", "heads", "seq_len", "batch_size", "dtype", "loss_chunk")
FLAGS = flags.FLAGS


def setting(name):
    """A flag, or what the platform's preset has for it."""
    value = FLAGS[name].value
    return PRESETS[FLAGS.platform][name] if value is None else value


def config_of(side, dataset):
    """The config of a side like memory/accumulate=4, or of base for a peer. Raises: UserError."""

    name, *overrides = side.split("/")
    c = default("base" if name in PEERS else name)
    for field in ("dim", "layers", "heads", "dtype", "loss_chunk"):
        c.model[field] = setting(field)
    c.batch_size, c.seq_len = setting("batch_size"), setting("seq_len")
    c.steps, c.optimizer.warmup_steps = 32, 1
    for override in overrides:
        field, _, value = override.partition("=")
        with contextlib.suppress(ValueError):  # a word stays one
            value = ast.literal_eval(value)
        try:
            c.update_from_flattened_dict({field: value})
        except (KeyError, TypeError) as error:
            raise UserError(f"--sides={side}: {field}: expected a field of the config and its value") from error
    return loop.complete(resolve(c), dataset)


def windows_of(dataset):
    """[B, T + 1] ids from the middle of the training text."""
    B, T = setting("batch_size"), setting("seq_len")
    stream = dataset.train.read(dataset.train.tokens // 2, B * T + 1)
    return np.stack([stream[i * T : i * T + T + 1] for i in range(B)])


def flops_of(config, rows):
    """FLOPs of a step by metrics.py's formula: as done, with all of the attention square, with FFN-M everywhere."""

    m, tokens = config.model, config.batch_size * config.seq_len
    done = flops.train_flops(config, tokens, rows)
    rest_of_square = 3 * tokens * m.layers * 2 * m.dim * config.seq_len
    return {
        "flops": done,
        "flops_full_attention": done + rest_of_square,
        "flops_every_position": flops.train_flops(config, tokens, tokens),
    }


def our_step(config, dataset):
    """(facts, steps); steps(n) trains n times and returns the last loss."""
    import jax

    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    state = trainer.init(jax.random.key(0))
    batches = TrainBatches(config, dataset, 1, [0])
    host = HostBatch({0: batches._shard(windows_of(dataset), np.ones((config.batch_size, config.seq_len)))})
    size = SizeAgreement(batches.sizes(), trainer.mesh).size(host.distinct)

    def steps(count):
        nonlocal state
        for _ in range(count):
            batch = place(host, size, trainer.batch_sharding, config.model)
            state, values = trainer.train(state, batch)
        return float(jax.device_get(values["loss"]))

    facts = {
        **flops_of(config, size),
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(trainer.params_shape)),
        "rows": size,
        "distinct": host.distinct,
        "device": jax.devices()[0].device_kind,
        "attention": config.model.attention,
        "peak_flops": metrics.peak_flops(config) and metrics.peak_flops(config) / jax.device_count(),
    }
    return facts, steps


def peer_step(name, config, dataset):
    facts = flops_of(config, config.batch_size * config.seq_len)
    facts["parameters"], step = PEERS[name](config.model, windows_of(dataset))
    m = config.model
    expected = 2 * m.vocab_size * m.dim + m.layers * m.dim * (4 * m.dim + 3 * m.ffn_dim + 2) + m.dim
    if facts["parameters"] != expected:
        raise UserError(f"{name}: expected the {expected:,} parameters of base, found {facts['parameters']:,}")
    return facts, lambda count: [step() for _ in range(count)][-1]


def worker(side, out):
    """Tells facts, then trains whenever a line comes and tells how long it took."""

    dataset = Dataset(FLAGS.data)
    config, name = config_of(side, dataset), side.split("/")[0]
    facts, steps = peer_step(name, config, dataset) if name in PEERS else our_step(config, dataset)
    start = time.perf_counter()
    first = steps(1)
    if abs(first - math.log(dataset.vocab_size)) > 0.5:
        raise UserError(f"{side}: expected a first loss near ln V = {math.log(dataset.vocab_size):.2f}, found {first}")
    print(json.dumps(facts | {"first_loss": first, "first_seconds": time.perf_counter() - start}), file=out, flush=True)
    device = None
    if name not in PEERS:
        import jax

        device = jax.devices()[0]
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = steps(setting("steps"))
        seconds = (time.perf_counter() - start) / setting("steps")
        told = {"seconds": seconds, "loss": loss, "peak_bytes": common.peak_memory(device)}
        print(json.dumps(told), file=out, flush=True)


class FailedError(Exception):
    """A side's process ended; the text is the last line it wrote."""


class Side:
    """A side's process."""

    def __init__(self, side, data):
        self._errors = tempfile.TemporaryFile("w+")
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        command = [sys.executable, *sys.argv, f"--data={data}", f"--worker={side}"]
        self._process = subprocess.Popen(command, **pipes, text=True, env=environment)
        try:
            self.facts = self._told() | {"seconds": []}
        except FailedError as error:
            self.facts = {"error": str(error)}

    def round(self):
        if "error" in self.facts:
            return
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            told = self._told()
            self.facts["seconds"].append(told.pop("seconds"))
            self.facts |= told
        except (FailedError, BrokenPipeError) as error:
            self.facts = {"error": str(error)}

    def _told(self):
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        raise FailedError(f"exit code {code}: {lines[-1][:300] if lines else 'nothing was written'}")

    def end(self):
        self._process.stdin.close()
        self._process.wait()


def measure(sides, data):
    """Yields {side: facts and seconds} after each round; `sides` are processes at the same time."""
    running = {}
    for side in sides:
        running[side] = Side(side, data)
        print(f"{side}: {running[side].facts.get('error', 'ready')}", flush=True)
    for number in range(setting("rounds")):
        for process in running.values():
            process.round()
        print(f"round {number + 1} of {setting('rounds')}", flush=True)
        yield {side: process.facts for side, process in running.items()}
    for process in running.values():
        process.end()


def base_of(side, results):
    """The side that a side's speed is told over: base with its settings, else base, or None."""
    own = "/".join(["base", *side.split("/")[1:]])
    return next((b for b in (own, "base") if "seconds" in results.get(b, {})), None)


def compare(results):
    """Adds tokens/s and MFU, and to ours speed over base and peers, with the share of what FLOPs predict over base."""
    tokens = setting("batch_size") * setting("seq_len")
    done = {side: r for side, r in results.items() if "seconds" in r}
    for side, r in done.items():
        seconds = statistics.median(r["seconds"])
        r["tokens_per_second"] = tokens / seconds
        for name in ("flops", "flops_full_attention", "flops_every_position") if r.get("peak_flops") else ():
            r[name.replace("flops", "mfu")] = r[name] / seconds / r["peak_flops"]
        base = base_of(side, results)
        peers = [other for other in done if other in PEERS and side not in PEERS]
        r["speed_over"] = {peer: common.ratio(done[peer]["seconds"], r["seconds"]) for peer in peers}
        if base and side not in PEERS:
            over = common.ratio(done[base]["seconds"], r["seconds"])
            predicted = done[base]["flops"] / r["flops"]
            r["speed_over"]["base"] = over | {"predicted": predicted, "share": over["median"] / predicted}
    return results


def serving(data, scratch):
    """Decoding at batch 1 from live rows, a ToL on device and disk, and base; and the build of the ToL file."""
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ

    def run(*command):
        start = time.perf_counter()
        code = subprocess.run([sys.executable, *command], env=environment).returncode
        if code:
            raise UserError(f"{' '.join(command[:2])}: ended with exit code {code}")
        return time.perf_counter() - start

    shape = [f"--config.model.{field}={setting(field)}" for field in ("dim", "layers", "heads", "dtype")]
    for side in ("base", "memory"):
        config = f"--config={here}/../configs/1b.py:{side}"
        run(f"{here}/untrained.py", config, *shape, f"--data={data}", f"--workdir={scratch}/{side}")
    tol = f"{scratch}/tol.safetensors"
    seconds = run("-m", "memoryllm_jax.precompute", f"--workdir={scratch}/memory", f"--output={tol}")
    build = {"seconds": seconds, "bytes": os.path.getsize(tol)}
    run(
        *(f"{here}/decode.py", f"--workdir={scratch}/memory", f"--base={scratch}/base", f"--tol={tol}"),
        *(f"--data={data}", "--groups=live+device+disk/base", f"--dtype={setting('dtype')}"),
        *(f"--capacity={FLAGS.capacity}", "--steps=64", "--rounds=5", f"--output={scratch}/decode.json"),
    )
    with open(f"{scratch}/decode.json") as file:
        return {"tol_build": build, "decode": json.load(file)}


def main():
    if FLAGS.table:
        import tables

        print("\n\n".join(tables.markdown(path) for path in FLAGS.table))
        return 0
    if FLAGS.platform is None:
        raise UserError("--platform: expected cpu or gpu, or --table=FILE")
    if FLAGS.worker:
        # Whatever libraries print, only the worker's own lines reach the pipe.
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        return worker(FLAGS.worker, out)
    # Asked in a process of its own, as this one must not take the device's memory.
    look = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True
    )
    if look.stdout.strip() != FLAGS.platform:
        raise UserError(f"--platform={FLAGS.platform}: expected such a device, found {look.stdout.strip() or 'none'}")
    sides = setting("sides")
    for side in sides:
        if side in PEERS and FLAGS.platform != "cpu":
            raise UserError(f"--sides={side}: peers are measured on a CPU only")
    with tempfile.TemporaryDirectory(dir=FLAGS.scratch) as scratch:
        path = FLAGS.data
        if path is None:
            import synthetic

            path = os.path.join(scratch, "data")
            synthetic.write(path, FLAGS.vocab_size, 40 * setting("batch_size") * setting("seq_len"))
        return run(sides, path, scratch)


def run(sides, path, scratch):

    dataset = Dataset(path)
    more = {
        "ids": f"{dataset.vocab_size} ids, tokenizer SHA-256 {dataset.tokenizer().digest[:16]}",
        "shape": {name: setting(name) for name in SHAPE},
        "platform": FLAGS.platform,
    }
    if FLAGS.data is None:
        import synthetic

        more["ids"] = f"no text: {synthetic.LAW}, {dataset.vocab_size} ids"
    results = {}
    for group in [sides] if FLAGS.platform == "cpu" else [[side] for side in sides]:
        for found in measure(group, path):  # each round is written, in case there is not time for all
            results = compare(results | found)
            common.write(FLAGS.output, results, more)
    if FLAGS.decode or (FLAGS.decode is None and FLAGS.platform != "cpu"):
        more |= serving(path, scratch)
        common.write(FLAGS.output, results, more)
    failed = [side for side, r in results.items() if "error" in r]
    for side in failed:
        print(f"error: {side}: {results[side]['error']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    flags.DEFINE_enum("platform", None, list(PRESETS), "the device to measure, which also sets the defaults below")
    flags.DEFINE_string("data", None, "prepared data; by default ids drawn at random")
    flags.DEFINE_integer("vocab_size", 128_256, "of ids drawn at random")
    flags.DEFINE_string("output", "", "JSON file for the result")
    flags.DEFINE_list("sides", None, "which to run; empty for none")
    flags.DEFINE_bool("decode", None, "measure decoding and the ToL build too; by default not on a CPU")
    flags.DEFINE_integer("capacity", 2048, "positions of the key-value cache in decoding")
    flags.DEFINE_integer("dim", None, "model width")
    flags.DEFINE_integer("layers", None, "layers")
    flags.DEFINE_integer("heads", None, "heads")
    flags.DEFINE_integer("seq_len", None, "tokens a sequence")
    flags.DEFINE_integer("batch_size", None, "sequences of a step")
    flags.DEFINE_string("dtype", None, "of the computation: float32 or bfloat16")
    flags.DEFINE_integer("loss_chunk", None, "tokens whose logits exist at one time")
    flags.DEFINE_integer("rounds", None, "timed rounds of each side, after a first step that is not")
    flags.DEFINE_integer("steps", None, "training steps of a round, dispatched without waiting")
    flags.DEFINE_string("scratch", None, "folder for temporary files: at 1b, 27 GB")
    flags.DEFINE_list("table", None, "records to print as Markdown instead of measuring")
    flags.DEFINE_string("worker", None, "internal: the side this process is")
    legacy.run(main)
