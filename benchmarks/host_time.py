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
not given where STEPS is 1. It must be able to read the checkpoint: an older one refuses fields of the config that it
lacks.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import common
import numpy as np
import workers

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option

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


def prepare(side: str, settings: Settings) -> tuple[dict, Callable[[], dict]]:
    """Opens the model. Returns: no facts, and a function that samples a text and returns the round's figures.

    host: seconds of the main thread for a step; wall: by the clock; hit_rate: of the device's cache of rows so far.
    """
    from memoryllm_jax.inference.sampling import Sampling  # only here: the first process needs no JAX
    from memoryllm_jax.tol.serving import open_engine

    _, place, steps = side.split("/")
    arguments = () if place == "live" else (settings.tol, place, settings.cache << 10)
    more = {} if steps == "1" else {"steps_per_call": int(steps)}
    engine = open_engine(settings.workdir, *arguments)
    prompts = [np.random.default_rng(k).integers(3, 99, 12).tolist() for k in range(settings.batch)]
    seeds = itertools.count()

    def measure():
        # Sampled, so that the text has as many different tokens as the model can make: each round has new ones.
        texts = engine.generate(prompts, settings.tokens, Sampling(1.0), seed=next(seeds), **more)
        next(texts)
        host, wall = time.thread_time(), time.perf_counter()
        count = sum(1 for _ in texts)
        host, wall = time.thread_time() - host, time.perf_counter() - wall
        hit_rate = engine.rows.stats().get("hit_rate", 1.0)
        return {"host": host / count, "wall": wall / count, "hit_rate": hit_rate}

    return {}, measure


def measure_all(settings: Settings) -> dict[str, dict]:
    """{side: its figures}. Raises: FailedError."""
    running = {}
    try:
        for side in settings.sides:
            tree = settings.other if side.startswith("other/") else str(Path(__file__).parent.parent)
            running[side] = workers.Worker(side, environment={"PYTHONPATH": tree})
        for worker in running.values():
            worker.read()
        _, *rounds = [  # the first round compiles
            {side: worker.round() for side, worker in running.items()} for _ in range(settings.rounds + 1)
        ]
    finally:
        for worker in running.values():
            worker.end()
    return {side: _figures(side, rounds) for side in settings.sides}


def _figures(side, rounds):
    """Milliseconds a token, and how many times less host time this side takes than the other tree, round by round."""
    out = {"hit_rate": rounds[-1][side]["hit_rate"]}
    other = f"other/{side.split('/')[1]}/1"
    for clock in ("host", "wall"):
        seconds = [found[side][clock] for found in rounds]
        out[f"{clock}_ms"] = common.spread([1e3 * s for s in seconds])
        if other in rounds[0]:
            out[f"other_over_this_{clock}"] = common.ratio([found[other][clock] for found in rounds], seconds)
    return out


def main(
    settings: Settings,
    # Without writes=True, as this file also runs with the package of --other, which may be older than that option.
    output: Annotated[str, Option("JSON file for the result")] = "",
    worker: Annotated[str, Option("internal: the side that this process measures")] = "",
) -> None:
    if worker:
        return workers.serve(lambda: prepare(worker, settings))
    results = measure_all(settings)
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
