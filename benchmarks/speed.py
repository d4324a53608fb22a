"""Training speed of our models and of other libraries.

    python benchmarks/speed.py --platform=cpu --data=DIR --output=benchmarks/results/NAME.json
    python benchmarks/speed.py --platform=gpu --output=benchmarks/results/NAME.json
    python benchmarks/speed.py --table=NAME.json,NAME.json

DIR is a folder that `prepare` wrote; without it ids are drawn at random (synthetic.py), and the record says so. The
third command prints the Markdown tables of docs/performance.md. A side is a peer (base in another library; peers.py
says what to install, and which of them run on a GPU) or an architecture, with its own settings after slashes:
memory/accumulate=4, flex-3/model.remat=full.

All sides have the same shape, batch, AdamW and clipping, and each is a process of its own (speed_side.py). On a CPU all
processes live through the whole run and take turns, and ratios are taken within a round, so that both sides saw the
same load of the machine. On an accelerator they run one after another, as each needs all of its memory. A side that
fails is recorded with its error, the others go on, and the exit code is 1. gpu.py runs this script with the other
measurements of a GPU.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Annotated

import common
import peers
import speed_tables
import synthetic
import workers
from peers import PEERS

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data.dataset import Dataset

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


class Side:
    """A side's process, and the facts that it has reported so far.

    Attributes:
      facts: its facts, the seconds of its rounds and the last round's other figures; only {"error"} once it failed.
    """

    def __init__(self, side: str, data: str, platform: str):
        environment = {"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {}
        if side.split("/")[0] in PEERS and side != "keras-hub-jax":
            environment["JAX_PLATFORMS"] = "cpu"  # JAX would reserve the GPU's memory, which PyTorch needs
        # The same command line, with the data that this process may have drawn.
        self._worker = workers.Worker(side, (f"--data={data}",), environment)
        try:
            self.facts = self._worker.read() | {"seconds": []}
        except workers.FailedError as error:
            self.facts = {"error": str(error)}

    def round(self) -> None:
        """Trains a round, unless the side has failed."""
        if "error" in self.facts:
            return
        try:
            found = self._worker.round()
            self.facts["seconds"].append(found.pop("seconds"))
            self.facts |= found
        except workers.FailedError as error:
            self.facts = {"error": str(error)}

    def end(self) -> None:
        """Ends the process and waits for it."""
        self._worker.end()


def measure(settings: Settings, sides: tuple[str, ...], data: str) -> Iterator[dict]:
    """Runs sides whose processes live at the same time. Yields: {side: its facts} after each round."""
    running = {}
    for side in sides:
        running[side] = Side(side, data, settings.platform)
        print(running[side].facts.get("error", f"{side}: ready"), flush=True)
    for number in range(settings.rounds):
        for process in running.values():
            process.round()
        print(f"round {number + 1} of {settings.rounds}", flush=True)
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
    if settings.platform == "cpu":
        return
    # JAX is started in another process, as this one must not take the device's memory.
    look = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(look, capture_output=True, text=True)
    found = done.stdout.strip() or f"none: {workers.last_line(done.stderr)}"
    if found != settings.platform:
        raise ArgumentError("platform", f"expected a device of {settings.platform}, found {found}")
    for side in settings.sides:
        if side in PEERS and side not in peers.ON_GPU:
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
        for found in measure(settings, group, data):
            results = compare(results | found, settings.tokens)
            common.write(output, results, more)  # after each round, in case there is no time for all of them
    failed = [side for side, r in results.items() if "error" in r]
    for side in failed:
        print(f"error: {results[side]['error']}", file=sys.stderr)
    return 1 if failed else 0


def main(
    settings: Settings,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
    table: Annotated[tuple[str, ...], Option("records to print as Markdown instead of measuring")] = (),
    worker: Annotated[str, Option("internal: the side that this process measures")] = "",
) -> int:
    if table:
        print("\n\n".join(speed_tables.markdown(path) for path in table))
        return 0
    if settings.platform is None:
        raise ArgumentError("platform", f"expected one of {', '.join(PRESETS)}, or --table=FILE, found neither")
    settings = settings.with_preset()
    if worker:
        import speed_side  # only here: the first process needs no JAX

        workers.serve(lambda: speed_side.prepare(worker, settings))
        return 0
    check_platform(settings)
    with tempfile.TemporaryDirectory() as folder:
        data = settings.data
        if data is None:
            data = os.path.join(folder, "data")
            synthetic.write(data, settings.vocab_size, 40 * settings.tokens)
        return measure_all(settings, data, output)


if __name__ == "__main__":
    cli.run(main)
