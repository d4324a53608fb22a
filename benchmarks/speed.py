"""Training speed of our models and of other libraries.

    python benchmarks/speed.py --platform=cpu --data=DIR --output=benchmarks/results/NAME.json
    python benchmarks/speed.py --platform=gpu --output=benchmarks/results/NAME.json
    python benchmarks/speed.py --table=NAME.json,NAME.json

DIR is a folder that `prepare` wrote; without it ids are drawn at random (synthetic.py), and the record says so. The
third command prints the Markdown tables of docs/performance.md. A side is a peer (base in another library; peers.py
says what to install, and which of them run on a GPU) or an architecture, with its own settings after slashes:
memory/accumulate=4, flex-3/model.remat=full.

All sides have the same shape, batch, AdamW and clipping, and each is a process of its own. On a CPU all processes live
through the whole run and take turns, and ratios are taken within a round, so that both sides saw the same load of the
machine. On an accelerator they run one after another, as each needs all of its memory. A side that fails is recorded
with its error, the others go on, and the exit code is 1. gpu.py runs this script with the other measurements of a GPU.
"""

import ast
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Annotated

import common
import numpy as np
import peers
import synthetic
from peers import PEERS

from memoryllm_jax.common import cli, records
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import default, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.model import flops, sharding
from memoryllm_jax.training import loop, metrics
from memoryllm_jax.training.batches import HostBatch, TrainBatches, Windows, place
from memoryllm_jax.training.compilation import memory_needed
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
        "sides": (*PEERS, "base", "memory/model.unique_tokens=False", "memory", "flex-3"),
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
        "sides": ("base", "memory", "flex-3", "llama-compile"),
    },
}
SHAPE = ("dim", "layers", "heads", "seq_len", "batch_size", "dtype", "loss_chunk")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; None stands for the value in the platform's preset."""

    platform: Annotated[str | None, Option("device to measure", choices=tuple(PRESETS))] = None
    data: Annotated[str | None, Option("prepared data; by default ids drawn at random")] = None
    vocab_size: Annotated[int, Option("vocabulary size of ids drawn at random")] = 128_256
    sides: Annotated[tuple[str, ...] | None, Option("which sides to run; empty for none")] = None
    dim: Annotated[int | None, Option("model width")] = None
    layers: Annotated[int | None, Option("layers")] = None
    heads: Annotated[int | None, Option("heads")] = None
    seq_len: Annotated[int | None, Option("tokens a sequence")] = None
    batch_size: Annotated[int | None, Option("sequences a step")] = None
    dtype: Annotated[str | None, Option("of the computation: float32 or bfloat16")] = None
    loss_chunk: Annotated[int | None, Option("tokens whose logits are in memory at one time")] = None
    rounds: Annotated[int | None, Option("timed rounds of each side, after a first step that is not timed")] = None
    steps: Annotated[int | None, Option("training steps of a round, dispatched without waiting")] = None

    def with_preset(self) -> "Settings":
        """These settings, with the preset's values in place of None."""
        missing = {name: value for name, value in PRESETS[self.platform].items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch_size * self.seq_len


# A side's process


def config_of(side: str, dataset: Dataset, settings: Settings):
    """The config of a side such as memory/accumulate=4; a peer has that of base. Raises: UserError."""
    name, *overrides = side.split("/")
    c = default("base" if name in PEERS else name)
    for field in ("dim", "layers", "heads", "dtype", "loss_chunk"):
        c.model[field] = getattr(settings, field)
    c.batch_size, c.seq_len = settings.batch_size, settings.seq_len
    c.steps, c.optimizer.warmup_steps = 32, 1
    for override in overrides:
        field, _, value = override.partition("=")
        with contextlib.suppress(ValueError):  # a word such as full is no Python literal, and stays a string
            value = ast.literal_eval(value)
        try:
            c.update_from_flattened_dict({field: value})
        except (KeyError, TypeError) as error:
            raise ArgumentError("sides", f"{side}: {field}: expected a field of the config and its value") from error
    return loop.complete(resolve(c), dataset)


def windows_of(dataset: Dataset, settings: Settings) -> np.ndarray:
    """A batch from the middle of the training text: ids [B, T + 1]."""
    T = settings.seq_len
    stream = dataset.train.read(dataset.train.tokens // 2, settings.tokens + 1)
    return np.stack([stream[i * T : i * T + T + 1] for i in range(settings.batch_size)])


def flops_of(config, rows: int) -> dict:
    """FLOPs of a step by the formula of flops.py.

    Args:
      rows: rows of the token memory that are computed in a step.
    Returns: those done, those with the masked half of attention too, and those with FFN-M at every position.
    """
    m, tokens = config.model, config.batch_size * config.seq_len
    done = flops.train_flops(config, tokens, rows)
    masked_half = 3 * tokens * m.layers * 2 * m.dim * config.seq_len  # forward once, backward twice
    return {
        "flops": done,
        "flops_full_attention": done + masked_half,
        "flops_every_position": flops.train_flops(config, tokens, tokens),
    }


def our_step(config, dataset: Dataset, settings: Settings):
    """Makes the training step of one of our architectures.

    Returns: facts for the record, and a function steps(n) that trains n steps and returns the last loss. The fact
      "planned_bytes" is the compiled step's memory, by which a dry run decides whether it fits.
    """
    import jax

    trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    state = trainer.init(jax.random.key(0))
    batches = TrainBatches(config, dataset, 1, [0])
    read = Windows(windows_of(dataset, settings), np.ones((config.batch_size, config.seq_len)))
    host = HostBatch({0: batches.shard_batch(read)})
    size = batches.sizes().holding(host.distinct)
    start = time.perf_counter()
    step = trainer.train.lower(trainer.state_shape, place(host, size, trainer.batch_sharding)).compile()
    compile_seconds = time.perf_counter() - start

    def steps(count):
        nonlocal state
        for _ in range(count):
            batch = place(host, size, trainer.batch_sharding)
            state, values = step(state, batch)
        return float(jax.device_get(values["loss"]))

    facts = {
        **flops_of(config, size),
        "parameters": flops.parameters(config)["total"],
        "rows": size,
        "distinct": host.distinct,
        "device": jax.devices()[0].device_kind,
        "attention": config.model.attention,
        "peak_flops": metrics.peak_flops(config) and metrics.peak_flops(config) / jax.device_count(),
        "compile_seconds": compile_seconds,
        "planned_bytes": memory_needed(step),
    }
    return facts, steps


def peer_step(name: str, config, dataset: Dataset, settings: Settings):
    """As `our_step`, for a peer. Raises: UserError if it has not as many parameters as base."""
    facts = flops_of(config, settings.tokens)
    if settings.platform == "gpu":
        facts |= peers.gpu_facts()
    facts["parameters"], step = PEERS[name](config.model, windows_of(dataset, settings), settings.platform)
    m = config.model
    expected = 2 * m.vocab_size * m.dim + m.layers * m.dim * (4 * m.dim + 3 * m.ffn_dim + 2) + m.dim
    if facts["parameters"] != expected:
        raise UserError(f"{name}: expected the {expected:,} parameters of base, found {facts['parameters']:,}")

    def steps(count):
        for _ in range(count):
            loss = step()
        return float(loss)  # read once, so that a GPU does not wait for this process between steps

    return facts, steps


def work(side: str, settings: Settings) -> None:
    """Measures a side in this process: prints facts, then for each line of input trains a round and prints its figures.

    All output lines are JSON.
    """
    # Libraries may print to stdout: it is redirected to stderr, and only this function writes to the pipe.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    dataset = Dataset(settings.data)
    config, name = config_of(side, dataset, settings), side.split("/")[0]
    start = time.perf_counter()
    if name in PEERS:
        facts, steps = peer_step(name, config, dataset, settings)
    else:
        facts, steps = our_step(config, dataset, settings)
    first = steps(1)
    if abs(first - math.log(dataset.vocab_size)) > 0.5:
        raise UserError(f"{side}: expected a first loss near ln V = {math.log(dataset.vocab_size):.2f}, found {first}")
    print(json.dumps(facts | {"first_loss": first, "first_seconds": time.perf_counter() - start}), file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = steps(settings.steps)
        seconds = (time.perf_counter() - start) / settings.steps
        figures = {"seconds": seconds, "loss": loss, "peak_bytes": peak_memory(name, settings.platform)}
        print(json.dumps(figures), file=out, flush=True)


def peak_memory(name: str, platform: str) -> int:
    """Peak memory in bytes of the side's device or, on a CPU, of this process."""
    if name not in PEERS:
        import jax

        return common.peak_memory(jax.devices()[0])
    return peers.gpu_peak_memory() if platform == "gpu" else common.peak_memory()


# The run


class FailedError(Exception):
    """A side's process ended; the message is the last line that it wrote to stderr."""


class Side:
    """A side's process, and the facts that it has reported so far.

    Attributes:
      facts: its facts, the seconds of its rounds and the last round's other figures; only {"error"} once it failed.
    """

    def __init__(self, side, data):
        self._errors = tempfile.TemporaryFile("w+")
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
        if side.split("/")[0] in PEERS and side != "keras-hub-jax":
            environment["JAX_PLATFORMS"] = "cpu"  # JAX would reserve the GPU's memory, which PyTorch needs
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        # The same command line, with the data that this process may have drawn.
        command = [sys.executable, *sys.argv, f"--data={data}", f"--worker={side}"]
        self._process = subprocess.Popen(command, **pipes, text=True, env=environment)
        try:
            self.facts = self._read_facts() | {"seconds": []}
        except FailedError as error:
            self.facts = {"error": str(error)}

    def round(self):
        """Trains a round, unless the side has failed."""
        if "error" in self.facts:
            return
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            facts = self._read_facts()
            self.facts["seconds"].append(facts.pop("seconds"))
            self.facts |= facts
        except (FailedError, BrokenPipeError) as error:
            self.facts = {"error": str(error)}

    def _read_facts(self):
        """The next line that the process prints. Raises: FailedError if it ended."""
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        raise FailedError(f"exit code {code}: {lines[-1][:300] if lines else 'nothing was written'}")

    def end(self):
        """Ends the process and waits for it."""
        self._process.stdin.close()
        self._process.wait()


def measure(sides: tuple[str, ...], data: str, rounds: int) -> Iterator[dict]:
    """Runs sides whose processes live at the same time. Yields: {side: its facts} after each round."""
    running = {}
    for side in sides:
        running[side] = Side(side, data)
        print(f"{side}: {running[side].facts.get('error', 'ready')}", flush=True)
    for number in range(rounds):
        for process in running.values():
            process.round()
        print(f"round {number + 1} of {rounds}", flush=True)
        yield {side: process.facts for side, process in running.items()}
    for process in running.values():
        process.end()


def base_of(side: str, results: dict) -> str | None:
    """The side that a side is compared with: base with the same settings, else plain base, else None.

    Only sides that were measured count.
    """
    own = "/".join(["base", *side.split("/")[1:]])
    return next((base for base in (own, "base") if "seconds" in results.get(base, {})), None)


def compare(results: dict, tokens: int) -> dict:
    """Adds comparisons to the results, and returns them.

    All sides get tokens a second, and MFU if the device's peak is known. Ours also get their speed over each peer and
    over base, with the speed over base that FLOPs predict and the share of it that is reached.

    Args:
      tokens: tokens a step.
    """
    done = {side: r for side, r in results.items() if "seconds" in r}
    for side, r in done.items():
        seconds = statistics.median(r["seconds"])
        r["tokens_per_second"] = tokens / seconds
        if r.get("peak_flops"):
            for ending in ("", "_full_attention", "_every_position"):
                r[f"mfu{ending}"] = r[f"flops{ending}"] / seconds / r["peak_flops"]
        r["speed_over"] = {}
        if side in PEERS:
            continue
        for peer in done:
            if peer in PEERS:
                r["speed_over"][peer] = common.ratio(done[peer]["seconds"], r["seconds"])
        base = base_of(side, results)
        if base:
            over = common.ratio(done[base]["seconds"], r["seconds"])
            predicted = done[base]["flops"] / r["flops"]
            r["speed_over"]["base"] = over | {"predicted": predicted, "share": over["median"] / predicted}
    return results


def check_platform(settings: Settings) -> None:
    """Raises: ArgumentError if JAX has no device of the platform, or a side cannot run on it."""
    # JAX is started in another process, as this one must not take the device's memory.
    look = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(look, capture_output=True, text=True).stdout.strip()
    if found != settings.platform:
        raise ArgumentError("platform", f"expected a device of {settings.platform}, found {found or 'none'}")
    for side in settings.sides:
        if side in PEERS and side not in peers.ON_GPU and settings.platform != "cpu":
            expected = (
                f"expected architectures and {', '.join(peers.ON_GPU)}, as other peers are measured on a CPU only"
            )
            raise ArgumentError("sides", f"{expected}, found {side}")


def measure_all(settings: Settings, data: str, output: str) -> int:
    """Measures all sides and writes the record. Returns: the exit code."""
    dataset = Dataset(data)
    ids = f"{dataset.vocab_size} ids, tokenizer SHA-256 {dataset.tokenizer().digest[:16]}"
    if settings.data is None:
        ids = f"no text: {synthetic.LAW}, {dataset.vocab_size} ids"
    more = {"ids": ids, "shape": {name: getattr(settings, name) for name in SHAPE}, "platform": settings.platform}
    results = {}
    groups = [settings.sides]  # whose processes live at the same time
    if settings.platform != "cpu":
        groups = [(side,) for side in settings.sides]
    for group in groups:
        for found in measure(group, data, settings.rounds):
            results = compare(results | found, settings.tokens)
            common.write(output, results, more)  # after each round, in case there is no time for all of them
    failed = [side for side, r in results.items() if "error" in r]
    for side in failed:
        print(f"error: {side}: {results[side]['error']}", file=sys.stderr)
    return 1 if failed else 0


def main(
    settings: Settings,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
    table: Annotated[tuple[str, ...], Option("records to print as Markdown instead of measuring")] = (),
    worker: Annotated[str, Option("internal: the side that this process measures")] = "",
) -> int:
    if table:
        print("\n\n".join(markdown(path) for path in table))
        return 0
    if settings.platform is None:
        raise ArgumentError("platform", f"expected one of {', '.join(PRESETS)}, or --table=FILE, found neither")
    settings = settings.with_preset()
    if worker:
        work(worker, settings)
        return 0
    check_platform(settings)
    with tempfile.TemporaryDirectory() as folder:
        data = settings.data
        if data is None:
            data = os.path.join(folder, "data")
            synthetic.write(data, settings.vocab_size, 40 * settings.tokens)
        return measure_all(settings, data, output)


# The tables of docs/performance.md


def markdown(path: str) -> str:
    """A line about the setup, the tables and the command of one record of this script."""
    record = records.read(dict, path, "a record of speed.py")
    shape, results = record["shape"], record["results"]
    tokens = shape["batch_size"] * shape["seq_len"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [
        f"{shape['layers']} layers of width {shape['dim']}, {tokens:,} tokens a step in sequences of "
        f"{shape['seq_len']:,}, {shape['dtype']}; {record['ids']}; {record['machine']}; Python {record['python']}, "
        f"{versions}; commit {record['commit']}.",
        _table(*_ours(results)),
    ]
    head, rows = _peers(results)
    if rows:
        parts.append(_table(head, rows))
    return "\n\n".join([*parts, f"    {record['command']}"])


def _ours(results):
    on_device = any("mfu" in r for r in results.values())
    head = ["side", "s a step", "tokens/s", "peak GB", "over base", "FLOPs predict", "share"]
    if on_device:
        head += ["MFU", "all attention", "FFN-M everywhere"]
    rows = []
    for side, r in results.items():
        if "error" in r:
            rows.append([side, r["error"], *[""] * (len(head) - 2)])
        elif "rows" in r:  # peers have none
            row = [*_plain(side, r), "", "", ""]
            if "base" in r["speed_over"]:
                base = r["speed_over"]["base"]
                row[-3:] = [_range(base), f"{base['predicted']:.2f}", f"{base['share']:.0%}"]
            if on_device:
                row += [f"{r[f'mfu{ending}']:.1%}" for ending in ("", "_full_attention", "_every_position")]
            rows.append(row)
    return head, rows


def _peers(results):
    ours = [side for side, r in results.items() if "rows" in r]
    head = ["side", "s a step", "tokens/s", "peak GB", *(f"{side} over it" for side in ours)]
    rows = []
    for peer, r in results.items():
        if "seconds" in r and "rows" not in r:
            rows.append([*_plain(peer, r), *(_range(results[side]["speed_over"][peer]) for side in ours)])
    return head, rows


def _plain(side, r):
    seconds = statistics.median(r["seconds"])
    return [side, f"{seconds:.2f}", f"{r['tokens_per_second']:,.0f}", f"{r['peak_bytes'] / 1e9:.1f}"]


def _range(ratio):
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    cli.run(main)
