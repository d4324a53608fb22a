"""Host time of a decoded token: the main thread's CPU time, side by side in this tree and in another one.

    python benchmarks/host_time.py --workdir=DIR --tol=FILE --other=TREE --output=benchmarks/results/NAME.json

While a device works on one token, the main thread prepares the next one: it looks rows up, calls compiled functions and
reads ids. Where that takes longer than the device needs for a token, the device waits for the host. The time is that of
the thread's CPU clock, which stands still while the thread waits for the device, so that the model's own work is left
out: on a CPU it runs in other threads. The model should be small but deep, as the time of a call grows with the number
of arrays, not with their size.

Each side runs in a process of its own, and the sides take turns: one round is one text of --tokens tokens after the
same prompt. The prefill and the first token are left out. A side is TREE/PLACE/STEPS: `new` or `other`; live, device,
host or disk; and the decode steps of one call. The other tree may be older than the argument for these, which it is
not given where STEPS is 1.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Annotated

import common
import numpy as np

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.tol.serving import open_engine

PLACES = ("live", "device", "host", "disk")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    workdir: Annotated[str, Option("checkpoints of a model with a token memory")]
    tol: Annotated[str, Option("ToL file of the model")]
    other: Annotated[str, Option("root of the tree that is compared with this one")]
    sides: Annotated[tuple[str, ...], Option("what takes turns, as TREE/PLACE/STEPS")] = (
        *(f"{tree}/{place}/1" for place in PLACES for tree in ("other", "new")),
        *(f"new/{place}/8" for place in PLACES),
    )
    batch: Annotated[int, Option("sequences that are decoded together")] = 1
    tokens: Annotated[int, Option("tokens of a round")] = 256
    rounds: Annotated[int, Option("rounds of each side")] = 7
    cache: Annotated[int, Option("KiB of the device cache of rows")] = 20480


def serve(settings: Settings, side: str) -> None:
    """Answers each line of the input with a round's figures.

    host: seconds of the main thread for a step; wall: by the clock; hit_rate: of the device's cache of rows so far.
    """
    _, place, steps = side.split("/")
    arguments = () if place == "live" else (settings.tol, place, settings.cache << 10)
    more = {} if steps == "1" else {"steps_per_call": int(steps)}
    with contextlib.closing(open_engine(settings.workdir, *arguments)) as engine:
        prompts = [np.random.default_rng(k).integers(3, 99, 12).tolist() for k in range(settings.batch)]
        for number, _ in enumerate(sys.stdin):
            # Sampled, so that the text has as many different tokens as the model can make: each round has new ones.
            texts = engine.generate(prompts, settings.tokens, Sampling(1.0), seed=number, **more)
            next(texts)
            host, wall = time.thread_time(), time.perf_counter()
            count = sum(1 for _ in texts)
            host, wall = time.thread_time() - host, time.perf_counter() - wall
            hit_rate = engine.rows.stats().get("hit_rate", 1.0)
            print(json.dumps({"host": host / count, "wall": wall / count, "hit_rate": hit_rate}), flush=True)


def measure(settings: Settings) -> dict[str, dict]:
    """{side: its figures}."""
    processes = {side: _start(settings, side) for side in settings.sides}
    rounds = {side: [] for side in settings.sides}
    for number in range(settings.rounds + 1):
        for side, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            if number:  # the first round compiles
                rounds[side].append(found)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return {side: _figures(side, rounds) for side in settings.sides}


def _start(settings, side):
    tree = settings.other if side.startswith("other/") else os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, *sys.argv, f"--worker={side}"]
    environment = os.environ | {"PYTHONPATH": tree}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _figures(side, rounds):
    """Milliseconds a token, and how many times less host time this side takes than the other tree, round by round."""
    out = {"hit_rate": rounds[side][-1]["hit_rate"]}
    for clock in ("host", "wall"):
        ms = [1e3 * found[clock] for found in rounds[side]]
        out[f"{clock}_ms"] = {"median": statistics.median(ms), "min": min(ms), "max": max(ms)}
        other = rounds.get(f"other/{side.split('/')[1]}/1")
        if other:
            of_other = [found[clock] for found in other]
            out[f"other_over_this_{clock}"] = common.ratio(of_other, [found[clock] for found in rounds[side]])
    return out


def main(
    settings: Settings,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
    worker: Annotated[str, Option("internal: the side that this process measures")] = "",
) -> None:
    if worker:
        serve(settings, worker)
        return
    results = measure(settings)
    print(f"{'side':<16}{'host ms a token':>24}{'wall ms a token':>24}{'other / this, host':>26}{'hits':>6}")
    for side, found in results.items():
        cells = [_spread(found[name]) for name in ("host_ms", "wall_ms")]
        ratio = _spread(found["other_over_this_host"]) if "other_over_this_host" in found else ""
        print(f"{side:<16}{cells[0]:>24}{cells[1]:>24}{ratio:>26}{found['hit_rate']:>6.2f}")
    shown = {"batch": settings.batch, "tokens": settings.tokens, "rounds": settings.rounds}
    common.write(output, results, shown | {"cache_kib": settings.cache})


def _spread(figure):
    return f"{figure['median']:.3f} ({figure['min']:.3f}-{figure['max']:.3f})"


if __name__ == "__main__":
    cli.run(main)
