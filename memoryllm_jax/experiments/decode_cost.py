"""The cost of a decode step, live and with looked-up rows: memory on the device, time a token (MemoryLLM, Table 6)."""

import contextlib
import os
import statistics
import tempfile
import time
from typing import Annotated, NamedTuple

import jax
import numpy as np

from memoryllm_jax.checkpoint import run_data
from memoryllm_jax.common import devices, options, plots, report
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.experiments.models import Models
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.given import GivenTokens
from memoryllm_jax.tol import compress, serving


def decode_cost(
    models: Models,
    page: report.Report,
    *,
    data: Annotated[
        str, Option("prepared data, whose held-out tokens are decoded; by default that of the first model")
    ] = "",
    steps: Annotated[int, Option("tokens that a side decodes in a round", least=1)] = 128,
    rounds: Annotated[int, Option("times that each side takes its turn", least=1)] = 5,
    places: Annotated[tuple[str, ...], Option(f"where rows are served from: {', '.join(serving.PLACES)}")] = ("disk",),
    cache: Annotated[str, Option("rows kept on the device, of those served from host or disk")] = "16MiB",
) -> dict:
    """Memory on the device and ms a token of each model at batch 1, live and from a ToL file (MemoryLLM, Table 6).

    Measured on the first device. A ToL file of each model is made beside the page and removed at the end. All sides
    (models, live or with a ToL file) are loaded together and take turns: in each of --rounds rounds, each side decodes
    --steps held-out tokens of --data. A first round does not count. The time is the median of the rounds; its ratio to
    the first side's time is taken within each round. A step reads the token's row, runs the decoder with a key-value
    cache of the model's context, and brings the likeliest next token to the host. Memory is that of weights, of rows
    held on the device and of the key-value cache, without temporaries.
    """
    if models.tol:
        raise ArgumentError("tol", f"expected none, as the experiment makes its own ToL files, found {models.tol}")
    for place in places:
        if place not in serving.PLACES:
            raise ArgumentError("places", f"expected some of {', '.join(serving.PLACES)}, found {place}")
    data = data or models.data_of(models.labels[0], "data")
    page.facts |= {"text": f"{data}, validation", "device": devices.find()[0].device_kind}
    cache_bytes = options.size(cache, "cache")
    with contextlib.ExitStack() as stack:
        # Not in the system's temporary folder, which is often kept in memory: reads of rows on disk are measured.
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=page.folder, prefix="tol-"))

        def open_side(*arguments):
            engine = stack.enter_context(contextlib.closing(serving.open_engine(*arguments, dtype=models.dtype)))
            return _Side(engine, data, steps, rounds)

        sides = _open_sides(models, places, cache_bytes, data, folder, open_side)
        seconds = _take_turns(sides, rounds)
        memory = {name: side.memory() for name, side in sides.items()}
    rows = _rows(memory, seconds)
    cells = [list(row.values()) for row in rows]
    page.table(list(rows[0]), cells, "A decode step of one sequence (Table 6)", csv="sides")
    page.figure("sides", _draw(rows), "Memory on the device, and time a token")
    return {"sides": rows, "seconds": seconds}


class Memory(NamedTuple):
    """Bytes on the device.

    decoder: weights of the decoder.
    live: weights that live rows are computed from.
    rows: rows that are on the device, all of them or those cached.
    cache: the key-value cache.
    """

    decoder: int
    live: int
    rows: int
    cache: int


class _Side:
    """A model that decodes one sequence, whose tokens a text gives. Raises: UserError if the text is too short."""

    def __init__(self, model: Engine, path: str, steps: int, rounds: int):
        self.model, self.steps = model, min(steps, model.trained.context)
        self.stream = run_data.open_data(model.trained, path).validation
        needed = (rounds + 1) * self.steps
        if self.stream.tokens < needed:
            found = f"{self.stream.tokens:,}"
            raise ArgumentError("data", f"expected {needed:,} held-out tokens for all rounds, found {found}")
        self.stream.verify([0], needed)
        # All rounds use one cache. Each starts at position 0 again, so it sees nothing of the round before.
        self.given = GivenTokens(model.decoder, 1, model.trained.context, model.tokenizer.vocab_size)

    def decode(self, number: int) -> float:
        """Decodes a round's tokens. Returns: seconds a token.

        Each round has its own tokens, so that rows are found in the cache only as often as in new text.
        """
        tokens = self.stream.read(number * self.steps, self.steps)
        start = time.perf_counter()
        self._run(tokens)
        return (time.perf_counter() - start) / len(tokens)

    def _run(self, tokens):
        for position, token in enumerate(tokens):
            # Waits for the step, as greedy decoding must.
            np.asarray(self.given.step(self.model.rows, np.array([token], np.int32), position))

    def memory(self) -> Memory:
        # Rows that are all on the device report device_bytes, those behind a cache cache_bytes, live rows neither.
        stats = self.model.rows.stats()
        rows = stats.get("device_bytes", stats.get("cache_bytes", 0))
        cache = sum(x.nbytes for x in jax.tree.leaves(self.given.cache))
        return Memory(self.model.decoder.weights_bytes, self.model.rows.weights_bytes, rows, cache)


def _open_sides(models, places, cache_bytes, data, folder, open_side) -> dict[str, _Side]:
    """Opens each model live and, if it has FFN-M, also with the rows of a new ToL file in each place."""
    sides = {}
    for number, (label, workdir) in enumerate(zip(models.labels, models.workdirs)):
        if not models.configs[number].memory_dim:
            sides[label] = open_side(workdir)
            continue
        sides[f"{label}, live"] = open_side(workdir)
        tol = os.path.join(folder, f"{number}.safetensors")
        print(compress.precompute(workdir, tol, compress.Options(data=data), dtype=models.dtype), flush=True)
        for place in places:
            sides[f"{label}, rows on {place}"] = open_side(workdir, tol, place, cache_bytes)
    return sides


def _take_turns(sides: dict[str, _Side], rounds: int) -> dict[str, list[float]]:
    """Seconds a token of each side's rounds."""
    for side in sides.values():
        side.decode(0)  # not counted: it compiles
    # Sides take turns within a round, so that a change in the machine's speed meets all of them.
    seconds = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.decode(number + 1))
    return seconds


def _rows(memory: dict[str, Memory], seconds: dict[str, list[float]]) -> list[dict]:
    """The rows of the table, as {column: value}."""
    first = next(iter(seconds.values()))
    rows = []
    for name, of_side in memory.items():
        # Within a round, where both sides met the machine in the same state; a ratio of medians would mix rounds.
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], first)]
        rows.append(
            {
                "side": name,
                "decoder, MB": of_side.decoder / 1e6,
                "FFN-M and embedding, MB": of_side.live / 1e6,
                "rows, MB": of_side.rows / 1e6,
                "cache, MB": of_side.cache / 1e6,
                "memory, MB": sum(of_side) / 1e6,
                "ms a token": 1e3 * statistics.median(seconds[name]),
                "time over the first side's": statistics.median(ratios),
            }
        )
    return rows


def _draw(rows: list[dict]):
    figure, (left, right) = plots.new_figure(9.5, 0.6 + 0.35 * len(rows) + 0.8, columns=2)
    at, stacked = np.arange(len(rows)), np.zeros(len(rows))
    for column in ("decoder, MB", "FFN-M and embedding, MB", "rows, MB", "cache, MB"):
        sizes = np.array([row[column] for row in rows])
        left.barh(at, sizes, left=stacked, label=column.removesuffix(", MB"))
        stacked += sizes
    left.set_yticks(at, [row["side"] for row in rows])
    left.set(xlabel="memory on the device, MB")
    left.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    right.barh(at, [row["ms a token"] for row in rows], color="C4")
    right.set_yticks(at, [""] * len(rows))
    right.set(xlabel="ms a token")
    for axis in (left, right):
        axis.invert_yaxis()
    return figure
