"""What a decode step costs, live and with looked-up rows: memory on the device, time a token (MemoryLLM, Table 6)."""

import contextlib
import os
import statistics
import tempfile
import time

import jax
import numpy as np

from memoryllm_jax.common import legacy, plots, report
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import dataset
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.tol import compress, serving


def cost(
    models: Models,
    page: report.Report,
    data: str = "",
    steps: int = 128,
    rounds: int = 5,
    places: tuple = ("disk",),
    cache: str = "16MiB",
) -> dict:
    """Memory on the device and ms a token of each model at batch 1, live and from a ToL file (MemoryLLM, Table 6).

    On the first device. ToL files are made for the purpose, beside the page, and removed. Sides take turns, --rounds
    times --steps tokens of held-out text from --data each, after one round that does not count; the time is the median
    of the rounds, and its ratio to the first model's is that of the same round. All sides are in memory at a time. A
    step reads the token's row, runs the decoder with a key-value cache of the model's context, and brings the likeliest
    next token to the host. Memory is that of weights, of rows held on the device and of the cache, without temporaries.
    """
    if models.tol:
        raise UserError(f"--tol={models.tol}: expected none, as ToL files are made for the purpose")
    if steps < 1 or rounds < 1:
        raise UserError(f"--steps, --rounds: expected at least 1, found {steps} and {rounds}")
    for place in places:
        if place not in serving.PLACES:
            raise UserError(f"--places: expected some of {', '.join(serving.PLACES)}, found {place}")
    page.facts |= {"text": f"{data}, validation", "device": jax.devices()[0].device_kind}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=page.folder, prefix="tol-"))
        opened = _opener(models, data, steps, rounds, stack)
        sides = _sides(models, places, legacy.size(cache, "cache"), data, folder, opened)
        for side in sides.values():
            side.decode(0)  # compiles what a round needs
        times = {name: [] for name in sides}
        for number in range(rounds):
            for name, side in sides.items():
                times[name].append(side.decode(number + 1))
        first = next(iter(times.values()))
        rows = []
        for name, side in sides.items():
            ratios = [mine / theirs for mine, theirs in zip(times[name], first)]
            memory = side.memory()
            rows.append([name, *(n / 1e6 for n in memory.values()), sum(memory.values()) / 1e6])
            rows[-1] += [1e3 * statistics.median(times[name]), statistics.median(ratios)]
    head = ["side", *(f"{name}, MB" for name in memory), "memory, MB", "ms a token", "time over the first side's"]
    page.table(head, rows, "A decode step of one sequence (Table 6)", csv="sides")
    page.figure("sides", _draw(head, rows), "Memory on the device, and time a token")
    return {"sides": [dict(zip(head, row)) for row in rows], "seconds": times}


class _Side:
    """A model that decodes one sequence of given tokens."""

    def __init__(self, model: Engine, path: str, steps: int, rounds: int):
        """Raises: UserError if the text is too short for all rounds."""
        self.model, self.steps = model, min(steps, model.trained.context)
        self.stream = dataset.open_for(path, model.tokenizer.digest).validation
        needed = (rounds + 1) * self.steps
        if self.stream.tokens < needed:
            raise UserError(f"--data: expected {needed:,} held-out tokens for all rounds, found {self.stream.tokens:,}")
        self.cache = model.decoder.empty_cache(1, model.trained.context)

    def decode(self, number: int) -> float:
        """Seconds a token, of a round's own tokens."""
        tokens = self.stream.read(number * self.steps, self.steps)
        start = time.perf_counter()
        self._run(tokens)
        return (time.perf_counter() - start) / len(tokens)

    def _run(self, tokens):
        index = np.zeros(1, np.int32)
        for number, token in enumerate(tokens):
            ids, position = np.array([token], np.int32), np.array([number], np.int32)
            logits, self.cache = self.model.decoder.step(self.model.rows.fetch(ids), index, position, self.cache)
            np.asarray(logits[0].argmax())

    def memory(self) -> dict[str, int]:
        """Bytes on the device."""
        stats = self.model.rows.stats()
        rows = stats.get("device_bytes", stats.get("cache_bytes", 0))
        live = getattr(self.model.rows, "weights_bytes", 0)
        cache = sum(x.nbytes for x in jax.tree.leaves(self.cache))
        return {"decoder": self.model.decoder.weights_bytes, "FFN-M and embedding": live, "rows": rows, "cache": cache}


def _opener(models, path, steps, rounds, stack):
    """(workdir, tol, ...) -> the side of a model that stays open as long as the stack."""
    if not path:
        raise UserError("--data: expected prepared data of the models' tokenizer, found nothing")

    def opened(*args):
        model = stack.enter_context(contextlib.closing(serving.open_engine(*args, dtype=models.dtype)))
        return _Side(model, path, steps, rounds)

    return opened


def _sides(models, places, cache, path, folder, opened):
    sides = {}
    for number, (label, workdir) in enumerate(zip(models.labels, models.workdirs)):
        live = opened(workdir)
        memory_dim = live.model.config.memory_dim
        sides[label if not memory_dim else f"{label}, live"] = live
        if memory_dim:
            tol = os.path.join(folder, f"{number}.safetensors")
            print(compress.precompute(workdir, tol, compress.Options(data=path), dtype=models.dtype), flush=True)
            for place in places:
                sides[f"{label}, rows on {place}"] = opened(workdir, tol, place, cache)
    return sides


def _draw(head, rows):
    figure, (left, right) = plots.new_figure(9.5, 0.6 + 0.35 * len(rows) + 0.8, columns=2)
    names, at = [row[0] for row in rows], np.arange(len(rows))
    base = np.zeros(len(rows))
    for column, name in enumerate(head[1:5], 1):
        sizes = np.array([row[column] for row in rows])
        left.barh(at, sizes, left=base, label=name.removesuffix(", MB"))
        base += sizes
    left.set_yticks(at, names)
    left.set(xlabel="memory on the device, MB")
    left.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    right.barh(at, [row[6] for row in rows], color="C4")
    right.set_yticks(at, [""] * len(rows))
    right.set(xlabel="ms a token")
    for axis in (left, right):
        axis.invert_yaxis()
    return figure
