"""Time and memory of the views of the server's page, which look into a model on demand.

    python benchmarks/look.py --workdir=DIR --output=FILE
    python benchmarks/look.py --workdir=DIR --tol=FILE --output=FILE

Each view is asked for tokens, keys and positions that change from round to round. The first one compiles; its time is
given apart. A search for neighbours over all layers is stopped after --most_s seconds, and its share is given with its
time. Memory is that of the process beyond what it had when the model was open: its peak while views are looked at, and
what stays.
"""

import os
import random
import time
from typing import Annotated

import common

from memoryllm_jax.analysis.key_values import Parameters
from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.server.looker import Looker
from memoryllm_jax.server.worker_rows import WorkerRows
from memoryllm_jax.tol import serving


class _StoppedError(Exception):
    """A measurement has taken long enough."""


class _Watch:
    """In place of a `Job`: notes the share that is done, and ends the work after a time."""

    def __init__(self, most_s: float):
        self.share, self.doing = 0.0, []
        self._end = time.monotonic() + most_s

    def begin(self, doing: str, is_kept: bool = False):
        self.doing.append(doing)
        return self._report

    def _report(self, share):
        self.share = share
        if time.monotonic() > self._end:
            raise _StoppedError


def main(
    workdir: Annotated[str, Option("checkpoints of a model")],
    tol: Annotated[str, Option("ToL file that rows are looked up in")] = "",
    rounds: Annotated[int, Option("measurements of each view after the first", least=1)] = 7,
    length: Annotated[int, Option("positions of the text that is looked at", least=1)] = 32,
    most_s: Annotated[float, Option("seconds after which a measurement is ended")] = 60.0,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    engine = serving.open_engine(workdir, tol)
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here on, VmHWM is the peak of the views
    rows, params = WorkerRows(engine), Parameters(engine.trained, engine.params)
    looker, draw = Looker(engine, rows.source, params), random.Random(0)
    config = engine.config
    start = time.monotonic()
    looker.search("", 1)
    results = {"token_texts_s": time.monotonic() - start}

    def token():
        return draw.randrange(config.vocab_size)

    text = [token() for _ in range(length)]
    views = {
        "search": lambda begin: looker.search(draw.choice(("the", "#17", "Ab", "zz")), 50),
        "token": lambda begin: looker.token(token(), 5, begin),
        "key": lambda begin: looker.key(draw.randrange(config.layers), draw.randrange(config.memory_dim), 5, begin),
        "position": lambda begin: looker.position(text, draw.randrange(length // 2, length), 3, begin),
        "nearest_one_layer": lambda begin: looker.nearest(token(), draw.randrange(config.layers), 8, begin),
        "nearest_all_layers": lambda begin: looker.nearest(token(), None, 8, begin),
    }
    for name, view in views.items():
        results[name] = measure(view, rounds, most_s)
        print(f"{name:>18}: {results[name]}", flush=True)
    beside = {"peak_bytes": memory("VmHWM") - before, "bytes_that_stay": memory("VmRSS") - before}
    print(f"memory beside the engine: {beside}", flush=True)
    model = engine.trained.facts()["model"]
    common.write(output, results, {"model": model, "tol_bytes": os.path.getsize(tol) if tol else 0, "memory": beside})
    looker.close()
    rows.close()
    engine.close()


def measure(view, rounds: int, most_s: float) -> dict:
    """Times a view.

    Returns: seconds of the first call; milliseconds of the later ones, by the clock and in time of all processors,
      which depends less on other work; and for a view that was ended early, the share that was done in which time.
    """
    clock, processors = [], []
    for _ in range(rounds + 1):
        watch = _Watch(most_s)
        start, used = time.perf_counter(), time.process_time()
        try:
            view(watch.begin)
        except _StoppedError:
            seconds = {"in_s": time.perf_counter() - start, "in_processors_s": time.process_time() - used}
            return {"share_done": watch.share, **seconds}
        clock.append(time.perf_counter() - start)
        processors.append(time.process_time() - used)
        if sum(clock) > most_s and len(clock) > 1:
            break
    return {
        "first_s": clock[0],
        "ms": common.spread([1e3 * x for x in clock[1:]]),
        "processors_ms": common.spread([1e3 * x for x in processors[1:]]),
        "rounds": len(clock) - 1,
    }


def memory(name: str) -> int:
    """A figure of this process in bytes, by its name in /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


if __name__ == "__main__":
    cli.run(main)
