"""Time of a decode step of one sequence on real text: live FFN-M, a ToL on device, host and disk, and base.

    python benchmarks/decode.py --workdir=DIR --base=DIR --tol=FILE --data=DIR --output=benchmarks/results/NAME.json

`analyze decode_cost` compares whole models of any size in a minute. This script is for 1b. It also measures rows from a
cold and from a warm page cache, the bandwidth of memory, and the time that reading a step's bytes at this bandwidth
takes; and its sides need not fit the memory together.

The sides take turns, and each decodes the next stretch of held-out text. The text gives the tokens, so that uncached
rows are as frequent as in text. As in `generate`, a row from host or disk is fetched once its token is known to the
host; where rows are on the device, the next step is dispatched before the token is read. disk-warm: the pages of the
file that the stretch needs are in the page cache. disk-cold: all pages of the file are dropped from it before the
round. The device's cache of rows keeps the rows of earlier rounds.

Sides that do not fit the memory together are split into groups (--groups). Within a group, a plus joins sides that
share a decoder and a process, and a slash separates processes. Every group contains `disk`, with which the other sides
are compared in the same round.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import common
import jax
import numpy as np
import workers

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.data import dataset
from memoryllm_jax.inference.given import GivenTokens
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.tol.cached_rows import CachedRows
from memoryllm_jax.tol.format import TolFile
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.rows import DeviceRows, HostTable
from memoryllm_jax.tol.serving import open_engine

FIRST = 1000  # position of the rounds' first token in the held-out text


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    workdir: Annotated[str, Option("checkpoints of the memory model")]
    base: Annotated[str, Option("checkpoints of base with as many parameters in total")]
    tol: Annotated[str, Option("ToL file of the memory model")]
    data: Annotated[str, Option("prepared data")]
    groups: Annotated[tuple[str, ...], Option("sides that are measured together")] = (
        *("live+disk/base", "device+disk", "host+disk"),
    )
    dtype: Annotated[str, Option("of the computation")] = "float32"
    cache: Annotated[int, Option("MiB of the device cache of rows")] = 256
    capacity: Annotated[int, Option("positions of the key-value cache")] = 512
    steps: Annotated[int, Option("tokens a round")] = 48
    rounds: Annotated[int, Option("rounds of each group")] = 8


class Sides:
    """Sides that share one decoder, and are measured in a process of their own."""

    def __init__(self, sides: list[str], settings: Settings):
        self.settings = settings
        is_base = sides == ["base"]
        self.tol = None if is_base else TolFile(settings.tol)
        self.model = open_engine(
            settings.base if is_base else settings.workdir,
            "" if is_base else settings.tol,
            cache=settings.cache << 20,
            dtype=settings.dtype,
        )
        self.sources = {side: self._rows(side) for side in sides}
        self.stream = dataset.Dataset(settings.data).validation
        self.given = GivenTokens(self.model.decoder, 1, settings.capacity, self.model.tokenizer.vocab_size)

    def _rows(self, side):
        """The source of a side's rows."""
        model, mesh = self.model, self.model.trained.mesh
        if side == "base":
            return model.rows
        if side == "live":
            trained = model.trained
            params = trained.load(lambda name: trained.is_memory(name) or name == "embedding")
            return LiveRows(model.config, params, mesh)
        if side == "device":
            return DeviceRows(self.tol, mesh)
        table = HostTable(self.tol) if side == "host" else RowReader(self.tol)
        return CachedRows(table, mesh, self.settings.cache << 20)

    def facts(self) -> dict:
        """Facts about the process and about each side, whose steps it compiles."""
        facts = {side: self._facts(side) for side in self.sources}
        peak = common.peak_memory(jax.devices()[0])
        return {"facts": facts, "bandwidth": common.bandwidth(), "peak_bytes": peak}

    def _facts(self, side):
        rows, decoder = self.sources[side], self.model.decoder
        self._decode(rows, self.stream.read(0, 4))  # compiles, before the rounds
        weights = decoder.weights_bytes
        if side == "live":
            weights += sum(x.nbytes for x in jax.tree.leaves(rows.arrays.get("memory")))
        held = weights + rows.stats().get("device_bytes", rows.stats().get("cache_bytes", 0))
        if side == "host":
            held += self.tol.layout.row_bytes
        return {
            "weights_bytes": weights,
            "row_bytes": 0 if side in ("live", "base") else self.tol.layout.stride,
            "kv_cache_bytes": sum(x.nbytes for x in jax.tree.leaves(self.given.cache)),
            "held_bytes": held,
        }

    def round(self, side: str, state: str, first: int) -> dict:
        """Decodes a stretch. Returns: milliseconds a token, and the share of rows found in the device's cache.

        Args:
          state: warm or cold, the file's pages.
          first: position of the stretch's first token.
        """
        rows, steps = self.sources[side], self.settings.steps
        tokens = self.stream.read(first, steps)
        if side == "disk" and state == "cold":
            os.sync()  # only pages that are written back can be dropped
            os.posix_fadvise(self.tol.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        elif side == "disk":
            rows.table.read(np.unique(tokens))  # brings the pages into the page cache
        hits_before, requests_before = counts_of(rows)
        start = time.perf_counter()
        self._decode(rows, tokens)
        seconds = time.perf_counter() - start
        hits, requests = counts_of(rows)
        hit_rate = (hits - hits_before) / max(requests - requests_before, 1)
        return {"ms": 1e3 * seconds / steps, "hit_rate": hit_rate}

    def _decode(self, rows, tokens):
        """Runs a step for each token, and draws a next token from it as `generate` does."""
        unread = None
        for position, token in enumerate(tokens):
            drawn = self.given.step(rows, np.array([token], np.int32), position)
            if rows.on_device:  # read the token of the step before, now that this step is dispatched
                unread, drawn = drawn, unread
            if drawn is not None:
                np.asarray(drawn)  # waits for the token, as `generate` does
        jax.block_until_ready((unread, self.given.cache))


def prepare(sides: list[str], settings: Settings) -> tuple[dict, Callable[..., dict]]:
    """Opens the sides of one process. Returns: their facts, and the function that measures a round."""
    opened = Sides(sides, settings)
    return opened.facts(), opened.round


def counts_of(rows) -> tuple[int, int]:
    """How many rows were found in the device's cache, and how many were requested, since the start."""
    return getattr(rows, "hits", 0), getattr(rows, "requests", 0)


class Group:
    """Worker processes whose sides take turns.

    Args:
      text: the group as --groups states it, such as live+disk/base.
    Attributes:
      facts: {side: its facts}.
      bandwidth: bytes a second, the best that a process measured.
      runs: the (side, state) pairs that take turns.
      figures: {(side, state): the figures of its rounds}.
    """

    def __init__(self, text: str):
        self.facts, self.bandwidth, self._processes = {}, 0.0, {}
        for part in text.split("/"):
            process = workers.Worker(part)
            reported = process.read()
            self.bandwidth = max(self.bandwidth, reported["bandwidth"])
            for side in part.split("+"):
                self._processes[side] = process
                self.facts[side] = reported["facts"][side] | {"process_peak_bytes": reported["peak_bytes"]}
        self.runs = []
        for side in self._processes:
            states = ("warm", "cold") if side == "disk" else ("warm",)
            self.runs += [(side, state) for state in states]
        self.figures = {run: [] for run in self.runs}

    def measure(self, rounds: int, steps: int) -> None:
        for number in range(rounds):
            turn = number % len(self.runs)  # each round starts with another one, so that order favours none
            for side, state in self.runs[turn:] + self.runs[:turn]:
                # Cold and warm read different text, so that neither finds the other's rows in the device's cache.
                stretch = 2 * number
                if state == "cold":
                    stretch += 1
                figures = self._processes[side].round(side=side, state=state, first=FIRST + stretch * steps)
                self.figures[side, state].append(figures)
        for process in set(self._processes.values()):
            process.end()

    def results(self, bytes_a_second: float) -> dict[str, dict]:
        """Figures of all rounds.

        Args:
          bytes_a_second: memory bandwidth, from which the least time of a step follows.
        Returns: {side: figures}, where disk appears as disk-warm and disk-cold.
        """
        ms = {run: [figure["ms"] for figure in rounds] for run, rounds in self.figures.items()}
        results = {}
        for (side, state), rounds in self.figures.items():
            facts = self.facts[side]
            touched = facts["weights_bytes"] + facts["row_bytes"] + facts["kv_cache_bytes"]
            name = f"disk-{state}" if side == "disk" else side
            results[name] = {
                "ms_per_token": ms[side, state],
                "speed_over_disk_warm": common.ratio(ms["disk", "warm"], ms[side, state]),
                "bytes_touched": touched,
                "bandwidth_ms": 1e3 * touched / bytes_a_second,
                "hit_rate": statistics.mean(figure["hit_rate"] for figure in rounds),
                **facts,
            }
            if ("base", "warm") in ms:
                results[name]["speed_over_base"] = common.ratio(ms["base", "warm"], ms[side, state])
        return results


def print_line(name: str, r: dict) -> None:
    over_base = f"{r['speed_over_base']['median']:.2f}" if "speed_over_base" in r else ""
    print(
        f"{name:<11}{statistics.median(r['ms_per_token']):>8.2f}{over_base:>11}"
        f"{r['speed_over_disk_warm']['median']:>16.3f}{r['bytes_touched'] / 1e9:>12.3f}{r['bandwidth_ms']:>14.2f}"
        f"{r['held_bytes'] / 1e9:>9.2f}{r['hit_rate']:>7.2f}",
        flush=True,
    )


def main(
    settings: Settings,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
    worker: Annotated[str, Option("internal: the sides that this process measures")] = "",
) -> None:
    if worker:
        return workers.serve(lambda: prepare(worker.split("+"), settings))
    needed, found = FIRST + 2 * settings.rounds * settings.steps, dataset.Dataset(settings.data).validation.tokens
    if found < needed:
        raise ArgumentError("data", f"expected {needed:,} held-out tokens for all rounds, found {found:,}")
    results, speed = {}, 0.0
    print(f"{'side':<11}{'ms':>8}{'over base':>11}{'over disk-warm':>16}{'GB touched':>12}", end="")
    print(f"{'bandwidth ms':>14}{'held GB':>9}{'hits':>7}")
    for text in settings.groups:
        group = Group(text)
        group.measure(settings.rounds, settings.steps)
        speed = max(speed, group.bandwidth)
        for name, found in group.results(speed).items():
            results[f"{text}: {name}"] = found
            print_line(name, found)
        more = {"dtype": settings.dtype, "capacity": settings.capacity, "steps": settings.steps, "bandwidth": speed}
        common.write(output, results, more)
    print(f"memory reads at {speed / 1e9:.1f} GB/s")


if __name__ == "__main__":
    cli.run(main)
